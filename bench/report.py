"""What a run leaves: JSON with everything, and Markdown to read."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.baselines import COPIES, OURS
from bench.cases import Case
from bench.mxnet_client import MXNet
from bench.targets import Verdict, copy_seconds
from bench.timing import Figure


@dataclass
class Result:
    """A case that has been checked and measured."""

    case: Case
    valid_elems: int
    bytes_that_must_move: int
    buffers: int
    in_cache: bool
    figures: dict[str, Figure]
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def elems_per_second(self) -> float:
        return self.case.elems / self.figures[OURS].seconds

    @property
    def share_of_copy(self) -> float:
        """Bytes that must move a second, as a share of the same of a copy of the whole tensor."""
        copied = 2 * self.case.tensor_bytes / copy_seconds(self.figures)
        return self.bytes_that_must_move / self.figures[OURS].seconds / copied

    def ratios(self) -> dict[str, float]:
        """Each peer's time over ours."""
        ours = self.figures[OURS].seconds
        return {n: f.seconds / ours for n, f in self.figures.items() if n not in (OURS, *COPIES)}

    def to_json(self) -> dict[str, Any]:
        return {
            "label": self.case.label,
            "case": asdict(self.case),
            "elems": self.case.elems,
            "valid_elems": self.valid_elems,
            "bytes_that_must_move": self.bytes_that_must_move,
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
    """A run, as far as it has come."""

    machine: Mapping[str, Any]
    settings: Mapping[str, Any]
    missing: dict[str, str] = field(default_factory=dict)
    results: list[Result] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    finished: bool = False

    def disturbed(self) -> list[str]:
        """The cases in which a candidate had to wait for a processor."""
        return [
            result.case.label
            for result in self.results
            if min(f.processor_share for n, f in result.figures.items() if n != MXNet.name) < QUIET
        ]

    def disturbance(self) -> str:
        return (
            f"**Not quiet: in {len(self.disturbed())} of {len(self.results)} cases other work took "
            "the processor from this one; measure again.**"
        )

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
        """STEM.json and STEM.md; each replaced at once, so that an interrupted run has both."""
        write_whole(
            stem.with_name(stem.name + ".json"), json.dumps(self.to_json(), indent=1) + "\n"
        )
        write_whole(stem.with_name(stem.name + ".md"), self.markdown())

    def markdown(self) -> str:
        machine = self.machine
        parts = [
            f"# {machine['processor']}, {machine['date']}",
            f"{machine['model']} ({machine['core']}), instruction set {machine['capability']} "
            f"(torch: {machine['torch_capability']}), torch {machine['versions']['torch']}, "
            f"commit {(machine['commit'] or 'unknown')[:12]}"
            f"{' with changes' if machine['changed'] else ''}. "
            f"Caches: {caches_text(machine['cache_bytes'])}.",
        ]
        if not self.finished:
            parts.append("**Interrupted: these are the cases that had been measured.**")
        if self.disturbed():
            parts.append(self.disturbance())
        parts += [f"**FAILED:** {failure}" for failure in self.failures]
        if self.missing:
            lines = (f"- {name}: skipped: {why}" for name, why in self.missing.items())
            parts.append("Peers that are not in the table:\n\n" + "\n".join(lines))
        if self.verdicts:
            parts += ["## Targets", targets_table(self.verdicts)]
        if self.results:
            parts += ["## Figures", ABOUT_FIGURES, results_table(self.results)]
        return "\n\n".join(parts) + "\n"


# A process that has the processor to itself reaches 0.99. MXNet's work is done by another one.
QUIET = 0.9

ABOUT_FIGURES = """\
Times are medians of interleaved rounds; ± is the middle half of the rounds, as a share of the
median. Ge/s: billion elements a second, padding counted. Share of copy: the bytes that must move
(valid elements read, all elements written) over the time, as a share of what a copy of the whole
tensor reaches in the same rounds. The columns after it are each peer's time over ours: above 1,
ours is faster. `torch.softmax` and MLAS compute all columns, padding too."""


def write_whole(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def caches_text(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {size >> 10} KiB" for name, size in sizes.items()) or "unknown"


def verdict_json(verdict: Verdict) -> dict[str, Any]:
    target = verdict.target
    return {
        "title": target.title,
        "label": target.case.label,
        "against": target.peer,
        "level": verdict.level,
        "sense": target.sense,
        "bound": verdict.bound,
        "aim": target.aim,
        "ratio": verdict.ratio,
        "verdict": verdict.word,
        "note": verdict.note,
    }


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def targets_table(verdicts: Sequence[Verdict]) -> str:
    rows = []
    for verdict in verdicts:
        target = verdict.target
        rows.append(
            [
                target.title,
                target.peer,
                verdict.level,
                f"{target.sense} {verdict.bound:.2f}",
                "" if verdict.ratio is None else f"{verdict.ratio:.2f}",
                verdict.word if verdict.met else f"**{verdict.word}**",
                "" if target.aim is None else f"{target.aim:.2f}",
                verdict.note,
            ]
        )
    measured = [verdict for verdict in verdicts if verdict.ratio is not None]
    met = sum(verdict.met for verdict in measured)
    header = ("case", "against", "level", "bound", "ratio", "", "aim", "note")
    summary = f"{met} of {len(measured)} met; {len(verdicts) - len(measured)} not measured."
    return f"{markdown_table(header, rows)}\n\n{summary}"


def duration(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.2f} us"


def results_table(results: Sequence[Result]) -> str:
    names = dict.fromkeys(name for result in results for name in result.ratios())
    header = ["case", "time", "±", "Ge/s", "share of copy", *names]
    rows = []
    for result in results:
        ours, ratios = result.figures[OURS], result.ratios()
        rows.append(
            [
                result.case.label,
                duration(ours.seconds),
                f"{ours.spread:.0%}",
                f"{result.elems_per_second / 1e9:.2f}",
                f"{result.share_of_copy:.2f}",
                *(f"{ratios[name]:.2f}" if name in ratios else "" for name in names),
            ]
        )
    return markdown_table(header, rows)
