"""Times masked_softmax on the CPU beside what users would otherwise call.

    python bench/run.py                 the default cases and the targets; 10 minutes
    python bench/run.py --quick         2 minutes
    python bench/run.py --targets       the targets alone, met or not, on each instruction set here
    python bench/run.py --all           the full cross product; hours
    python bench/run.py --filter "4096x512 uniform"     cases whose label has these words

All candidates of a case take turns in one process, and each result is first compared with float64.
JSON and a Markdown table go to build/bench/, named by processor and date, after every case: Ctrl-C
keeps what is done. Plots follow at the end. --record writes them to bench/results/, beside the
published ones. Baselines that are not installed are named and
skipped. bench/README.md describes how the times are taken and how each baseline is called.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Mapping
from itertools import chain
from pathlib import Path

# `python bench/run.py` puts bench/ on the path; its imports need the parent.
sys.path.append(str(Path(__file__).resolve().parent.parent))

import torch

from bench import machine, names, plot
from bench.baselines import Baseline, Ours, copies
from bench.cases import (
    SEED,
    Case,
    Data,
    all_cases,
    default_cases,
    make_data,
    quick_cases,
    without_repeats,
)
from bench.check import Truth, WrongResultError, check, truth_of
from bench.optional_baselines import all_baselines
from bench.progress import Progress
from bench.report import (
    Json,
    Report,
    Result,
    disturbance,
    duration,
    results_table,
    targets_table,
)
from bench.targets import Target, all_targets, evaluate
from bench.timing import Candidate, measure
from masked_softmax_ext import _C, cpu_capability

ROOT = machine.ROOT
PUBLISHED = ROOT / "bench/results"
MXNET_PYTHON = ROOT / "build/mxnet-venv/bin/python"
INTERRUPTED = 130
INSTRUCTION_SETS = [name for name in _C.cpu_capabilities() if name != "scalar"] or ["scalar"]
"""Those of this build and processor, the best last."""
TORCH_LEVELS = ("avx2", "avx512")
"""Values of ATEN_CPU_CAPABILITY that are instruction sets of ours too."""


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--quick", action="store_true", help="few cases, few rounds")
    which.add_argument("--targets", action="store_true", help="the targets alone")
    which.add_argument("--all", action="store_true", help="the full cross product")
    parser.add_argument("--filter", metavar="WORDS", help="only cases whose label has all of these")
    parser.add_argument("--list", action="store_true", help="print the cases' labels, measure none")
    parser.add_argument(
        "--level",
        choices=("best", *INSTRUCTION_SETS, "every"),
        help="instruction set to limit masked_softmax and torch to; every: one after the other "
        "(default: every for --targets, else best)",
    )
    parser.add_argument(
        "--seconds",
        type=float,
        help="rounds of a case take this long (default: 2, with --quick 0.5)",
    )
    parser.add_argument(
        "--seed", type=int, default=SEED, help="for lengths and values (%(default)s)"
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--results", type=Path, default=ROOT / "build/bench", help="where to write (%(default)s)"
    )
    where.add_argument(
        "--record",
        dest="results",
        action="store_const",
        const=PUBLISHED,
        help="write beside the published results, in bench/results",
    )
    parser.add_argument("--no-plots", action="store_true", help="JSON and table only")
    parser.add_argument(
        "--mxnet-python",
        default=os.environ.get("MXNET_PYTHON")
        or (str(MXNET_PYTHON) if MXNET_PYTHON.exists() else None),
        help="an interpreter that has mxnet 1.9.1 (default: $MXNET_PYTHON, then build/mxnet-venv)",
    )
    options = parser.parse_args(arguments)
    if options.seconds is None:
        options.seconds = 0.5 if options.quick else 2.0
    if options.level is None:
        options.level = "every" if options.targets else "best"
    return options


def chosen_targets(options: argparse.Namespace) -> list[Target]:
    return [] if options.quick or options.all else all_targets()


def chosen_cases(options: argparse.Namespace) -> list[Case]:
    target_cases = (target.case for target in chosen_targets(options))
    if options.quick:
        cases = without_repeats(quick_cases())
    elif options.all:
        cases = without_repeats(all_cases())
    elif options.targets:
        cases = without_repeats(target_cases)
    else:
        cases = without_repeats(chain(target_cases, default_cases()))
    words = (options.filter or "").split()
    return [case for case in cases if all(word in case.label for word in words)]


def levels(choice: str) -> list[str]:
    """The instruction sets to measure."""
    if choice == "best":
        return [cpu_capability()]  # the environment may have limited it
    return INSTRUCTION_SETS if choice == "every" else [choice]


def limits(level: str) -> dict[str, str]:
    """The environment that limits this package and torch to an instruction set."""
    limited = {"MASKED_SOFTMAX_EXT_CPU_CAPABILITY": level}
    if level in TORCH_LEVELS:
        limited["ATEN_CPU_CAPABILITY"] = level
    return limited


def is_limited_to(level: str) -> bool:
    in_torch = torch.backends.cpu.get_cpu_capability().lower()
    return cpu_capability() == level and (level not in TORCH_LEVELS or in_torch == level)


def measure_case(
    case: Case,
    baselines: Mapping[str, Baseline],
    missing: Mapping[str, str],
    seconds: float,
    seed: int,
) -> Result:
    """Checks every candidate, then times them in turns.

    Raises:
        WrongResultError: Our own result is wrong. A baseline whose result is wrong is skipped.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(case.threads)
    data = make_data(case, machine.llc_bytes(), seed)
    truths: dict[bool, Truth] = {}
    chosen: list[Baseline] = [Ours()]
    skipped: dict[str, str] = {}
    for name in case.baselines:
        reason = missing.get(name) or baselines[name].skip_reason(case)
        if reason is None:
            chosen.append(baselines[name])
        else:
            skipped[name] = reason
    candidates: dict[str, Candidate] = {}
    try:
        for number, baseline in enumerate(chosen):
            try:
                candidates[baseline.name] = checked_candidate(baseline, data, number, truths)
            except Exception as error:
                if baseline.name == names.OURS:
                    raise
                torch.set_num_threads(case.threads)
                skipped[baseline.name] = f"failed: {type(error).__name__}: {error}"[:300]
        for name, copy in copies(data, len(chosen)).items():
            candidates[name] = Candidate(copy.run, copy.threads, keeps=data)
        figures = measure(candidates, seconds)
    finally:
        for baseline in chosen:
            baseline.finish()
        torch.set_num_threads(threads)
    buffers = len(data.inputs)
    return Result(
        case=case,
        valid_elems=data.valid_elems,
        bytes_moved=data.bytes_moved,
        buffers=buffers,
        in_cache=buffers == 1,
        figures=figures,
        skipped=skipped,
    )


def checked_candidate(
    baseline: Baseline, data: Data, first: int, truths: dict[bool, Truth]
) -> Candidate:
    prepared = baseline.prepare(data, first)
    # Otherwise a candidate that writes nothing would pass with the previous one's result.
    data.outputs[0].fill_(torch.nan)
    uses_lengths = baseline.uses_lengths
    if uses_lengths not in truths:
        truths[uses_lengths] = truth_of(data, uses_lengths)
    is_baseline = not isinstance(baseline, Ours)
    check(baseline.name, prepared.result(), truths[uses_lengths], data.case, is_baseline)
    return Candidate(prepared.run, prepared.threads, keeps=data)


def missing_baselines(cases: list[Case], baselines: Mapping[str, Baseline]) -> dict[str, str]:
    """Reasons why baselines of these cases cannot run here."""
    wanted = dict.fromkeys(name for case in cases for name in case.baselines)
    reasons = {name: baselines[name].missing_reason() for name in wanted}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def list_name(options: argparse.Namespace) -> str:
    """Which list of cases the options choose."""
    return next((word for word in ("quick", "targets", "all") if getattr(options, word)), "default")


def stem_of(options: argparse.Namespace, described: Json) -> Path:
    """The results' path without suffix. Only the default list has no word after the date."""
    words = [described["processor"], described["date"]]
    if list_name(options) != "default":
        words.append(list_name(options))
    if options.filter:
        words.append("part")
    folder: Path = options.results
    return folder / "-".join(words)


def run_here(options: argparse.Namespace) -> int:
    """Measures with the instruction set in use."""
    cases, targets = chosen_cases(options), chosen_targets(options)
    if not cases:
        print("no case has such a label; --list shows them all")
        return 2
    baselines = all_baselines(options.mxnet_python)
    described = machine.describe()
    missing = missing_baselines(cases, baselines)
    for baseline in baselines.values():
        described["versions"] |= baseline.versions()
    settings = {
        "seed": options.seed,
        "seconds_a_case": options.seconds,
        "list": list_name(options),
        "filter": options.filter,
    }
    report = Report(described, settings, missing)
    stem = stem_of(options, described)
    print(
        f"{described['processor']}: {described['capability']}, torch "
        f"{described['versions']['torch']} ({described['torch_capability']}), {len(cases)} cases"
    )
    for name, reason in missing.items():
        print(f"skipped: {name}: {reason}")
    runnable = [case for case in cases if case.threads <= described["processors"]]
    if len(runnable) < len(cases):
        print(
            f"skipped: {len(cases) - len(runnable)} cases with more threads than processors "
            f"available to this process ({described['processors']})"
        )
    interrupted = False
    progress = Progress(len(runnable))
    try:
        for case in runnable:
            progress.show(case.label)
            try:
                result = measure_case(case, baselines, missing, options.seconds, options.seed)
            except WrongResultError as error:
                report.failures.append(str(error))
                progress.finish(f"FAILED: {error}")
            else:
                report.results.append(result)
                progress.finish(line_of(result))
            judge(report, targets, described["capability"], options)
            report.write(stem)
    except KeyboardInterrupt:
        interrupted = True
        progress.clear()
        print("interrupted: what was measured is kept")
    report.finished = not interrupted
    report.write(stem)
    show(report.to_json(), stem, options)
    if interrupted:
        return INTERRUPTED
    missed = any(v.ratio is not None and not v.met for v in report.verdicts)
    return 1 if report.failures or (options.targets and missed) else 0


def judge(report: Report, targets: list[Target], level: str, options: argparse.Namespace) -> None:
    by_label = {result.case.label: result for result in report.results}
    report.verdicts = []
    for target in targets:
        result = by_label.get(target.case.label)
        if result is None:
            if options.filter:
                continue
            report.verdicts.append(evaluate(target, None, level, in_cache=False))
            continue
        reasons = {**result.skipped, **report.missing}
        report.verdicts.append(evaluate(target, result.figures, level, result.in_cache, reasons))


def line_of(result: Result) -> str:
    ours = result.figures[names.OURS]
    ratios = ", ".join(f"{name} {ratio:.2f}" for name, ratio in result.ratios().items())
    failed = [
        f"{name}: {reason}"
        for name, reason in result.skipped.items()
        if reason.startswith("failed")
    ]
    return (
        f"{result.case.label}: {duration(ours.seconds)} (±{ours.spread:.0%}), "
        f"{result.elems_per_second / 1e9:.2f} Ge/s, {result.share_of_copy:.2f} of copy; {ratios}"
        + "".join(f"; skipped: {text}" for text in failed)
    )


def show(report: Json, stem: Path, options: argparse.Namespace) -> None:
    if report["targets"]:
        print(f"\n{targets_table(report['targets'])}")
    elif report["results"]:
        print(f"\n{results_table(report['results'])}")
    for failure in report["failures"]:
        print(f"FAILED: {failure}")
    if report["disturbed"]:
        print(f"\n{disturbance(report)}")
    written = [f"{stem}.json", f"{stem}.md"]
    if not options.no_plots:
        try:
            written += map(str, plot.write_plots(report, stem))
        except ImportError as error:
            print(f"skipped: plots: {error}; type: pip install matplotlib")
    print("\nwritten: " + "\n         ".join(written))


def run_limited(level: str, arguments: list[str]) -> int:
    """Measures in a child process, limited to the instruction set."""
    print(f"== {level}", flush=True)
    command = [sys.executable, str(Path(__file__).resolve()), *arguments, "--level", "best"]
    child = subprocess.Popen(command, env={**os.environ, **limits(level)})
    while True:
        try:
            return child.wait()
        except KeyboardInterrupt:
            continue  # the terminal signals the child too; it writes its results and exits


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.list:
        print("\n".join(case.label for case in chosen_cases(options)))
        return 0
    given = sys.argv[1:] if arguments is None else arguments
    worst = 0
    for level in levels(options.level):
        status = run_here(options) if is_limited_to(level) else run_limited(level, given)
        worst = max(worst, status)
        if status == INTERRUPTED:
            break
    return worst


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:  # before the first case or while plots are drawn
        print("\ninterrupted")
        sys.exit(INTERRUPTED)
