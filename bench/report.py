"""What a run writes: JSON with every figure, Markdown tables, and plots.

python -m bench.report RESULTS.json     writes the tables and plots of a JSON file again
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench import names, plot
from bench.cases import Case
from bench.targets import Verdict, copy_seconds
from bench.timing import Figure

Json = Mapping[str, Any]

QUIET = 0.9
"""Least share of CPU time in a quiet run; a process alone on its processor reaches 0.99."""

ABOUT_FIGURES = """\
Times are medians of interleaved rounds; ± is the interquartile range over the median. Ge/s: billion
elements per second, padding counted. Share of copy: the bytes that must move (valid elements read,
all elements written) per second, relative to a copy of the whole tensor in the same rounds. The
columns after it are each baseline's time over ours: above 1, ours is faster. `torch.softmax` and
MLAS compute all columns, padding included."""


@dataclass
class Result:
    """A case that has been checked and measured."""

    case: Case
    valid_elems: int
    bytes_moved: int
    buffers: int
    in_cache: bool
    figures: dict[str, Figure]
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def elems_per_second(self) -> float:
        return self.case.elems / self.figures[names.OURS].seconds

    @property
    def share_of_copy(self) -> float:
        """Bandwidth relative to a copy of the whole tensor."""
        copy_bandwidth = 2 * self.case.tensor_bytes / copy_seconds(self.figures)
        return self.bytes_moved / self.figures[names.OURS].seconds / copy_bandwidth

    def ratios(self) -> dict[str, float]:
        """Each baseline's time over ours."""
        ours = self.figures[names.OURS].seconds
        return {
            name: figure.seconds / ours
            for name, figure in self.figures.items()
            if name not in (names.OURS, *names.COPIES)
        }

    def to_json(self) -> dict[str, Any]:
        return {
            "label": self.case.label,
            "case": asdict(self.case),
            "elems": self.case.elems,
            "valid_elems": self.valid_elems,
            "bytes_moved": self.bytes_moved,
            "buffers": self.buffers,
            "in_cache": self.in_cache,
            "elems_per_second": self.elems_per_second,
            "share_of_copy": self.share_of_copy,
            "ratios": self.ratios(),
            "seconds": {name: asdict(figure) for name, figure in self.figures.items()},
            "skipped": self.skipped,
        }


@dataclass
class Report:
    """The state of a run: all that it has measured so far."""

    machine: Json
    settings: Json
    missing: dict[str, str] = field(default_factory=dict)
    results: list[Result] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    finished: bool = False

    def disturbed(self) -> list[str]:
        """Labels of the cases in which a candidate waited for a processor."""
        return [
            result.case.label
            for result in self.results
            if min(
                figure.processor_share
                for name, figure in result.figures.items()
                if name != names.MXNET  # it computes in another process
            )
            < QUIET
        ]

    def to_json(self) -> dict[str, Any]:
        return {
            "machine": self.machine,
            "settings": self.settings,
            "finished": self.finished,
            "missing": self.missing,
            "failures": self.failures,
            "disturbed": self.disturbed(),
            "targets": [verdict_json(verdict) for verdict in self.verdicts],
            "results": [result.to_json() for result in self.results],
        }

    def write(self, stem: Path) -> None:
        """Writes STEM.json and STEM.md."""
        report = self.to_json()
        write_atomically(stem.with_name(stem.name + ".json"), json_text(report))
        write_atomically(stem.with_name(stem.name + ".md"), markdown(report))


def verdict_json(verdict: Verdict) -> dict[str, Any]:
    target = verdict.target
    return {
        "title": target.title,
        "label": target.case.label,
        "against": target.baseline,
        "level": verdict.level,
        "sense": target.sense,
        "bound": verdict.bound,
        "aim": target.aim,
        "ratio": verdict.ratio,
        "verdict": verdict.word,
        "note": verdict.note,
    }


def json_text(document: Json) -> str:
    """JSON with one line for each entry of a top-level list or object, so that diffs are short."""
    parts = []
    for key, value in document.items():
        opening, closing, lines = "", "", [json.dumps(value)]
        if value and isinstance(value, Mapping):
            opening, closing = "{\n  ", "\n }"
            lines = [f"{json.dumps(k)}: {json.dumps(v)}" for k, v in value.items()]
        elif value and isinstance(value, list):
            opening, closing = "[\n  ", "\n ]"
            lines = [json.dumps(entry) for entry in value]
        joined = ",\n  ".join(lines)
        parts.append(f" {json.dumps(key)}: {opening}{joined}{closing}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def write_atomically(path: Path, text: str) -> None:
    """An interrupted run leaves the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def markdown(report: Json) -> str:
    machine = report["machine"]
    parts = [
        f"# {machine['processor']}, {machine['date']}",
        f"{machine['model']} ({machine['core']}), instruction set {machine['capability']} "
        f"(torch: {machine['torch_capability']}), torch {machine['versions']['torch']}, "
        f"commit {(machine['commit'] or 'unknown')[:12]}"
        f"{' with changes' if machine['changed'] else ''}. "
        f"Caches: {caches_text(machine['cache_bytes'])}.",
    ]
    if not report["finished"]:
        parts.append("**Interrupted: only the cases below were measured.**")
    if report["disturbed"]:
        parts.append(disturbance(report))
    parts += [f"**FAILED:** {failure}" for failure in report["failures"]]
    if report["missing"]:
        lines = (f"- {name}: skipped: {reason}" for name, reason in report["missing"].items())
        parts.append("Baselines that are not in the table:\n\n" + "\n".join(lines))
    if report["targets"]:
        parts += ["## Targets", targets_table(report["targets"])]
    if report["results"]:
        parts += ["## Figures", ABOUT_FIGURES, results_table(report["results"])]
    return "\n\n".join(parts) + "\n"


def disturbance(report: Json) -> str:
    return (
        f"**Not quiet: in {len(report['disturbed'])} of {len(report['results'])} cases other work "
        "took the processor from this one; measure again.**"
    )


def caches_text(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {size >> 10} KiB" for name, size in sizes.items()) or "unknown"


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def targets_table(targets: Sequence[Json]) -> str:
    rows = [
        [
            target["title"],
            target["against"],
            target["level"],
            f"{target['sense']} {target['bound']:.2f}",
            "" if target["ratio"] is None else f"{target['ratio']:.2f}",
            target["verdict"] if target["verdict"] == "met" else f"**{target['verdict']}**",
            "" if target["aim"] is None else f"{target['aim']:.2f}",
            target["note"],
        ]
        for target in targets
    ]
    measured = [target for target in targets if target["ratio"] is not None]
    met = sum(target["verdict"] == "met" for target in measured)
    header = ("case", "against", "level", "bound", "ratio", "", "aim", "note")
    summary = f"{met} of {len(measured)} met; {len(targets) - len(measured)} not measured."
    return f"{markdown_table(header, rows)}\n\n{summary}"


def duration(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.2f} us"


def results_table(results: Sequence[Json]) -> str:
    baselines = dict.fromkeys(name for result in results for name in result["ratios"])
    header = ["case", "time", "±", "Ge/s", "share of copy", *baselines]
    rows = []
    for result in results:
        ratios = result["ratios"]
        ours = Figure(**result["seconds"][names.OURS])
        rows.append(
            [
                result["label"],
                duration(ours.seconds),
                f"{ours.spread:.0%}",
                f"{result['elems_per_second'] / 1e9:.2f}",
                f"{result['share_of_copy']:.2f}",
                *(f"{ratios[name]:.2f}" if name in ratios else "" for name in baselines),
            ]
        )
    return markdown_table(header, rows)


def main(arguments: Sequence[str]) -> int:
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print(__doc__)
        return 2
    path = Path(arguments[0])
    report = json.loads(path.read_text(encoding="utf-8"))
    write_atomically(path.with_suffix(".md"), markdown(report))
    plot.write_plots(report, path.with_suffix(""))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
