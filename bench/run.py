"""masked_softmax on the CPU beside what users would otherwise call.

    python bench/run.py                 the default list and the table of targets: within 10 minutes
    python bench/run.py --quick         within 2 minutes
    python bench/run.py --targets       the targets alone, met or not, on each instruction set here
    python bench/run.py --all           the full cross product: hours
    python bench/run.py --filter "4096x512 uniform"     cases whose label has these words

All candidates of a case take turns in one process; each result is compared with float64 first.
JSON and a Markdown table go to bench/results/, named by processor and date, after every case:
Ctrl-C keeps what is done. Plots follow at the end. Peers that are not installed are named and
skipped. bench/README.md says how the times are taken and how each peer is called.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

# `python bench/run.py` puts bench/ there, and not the folder that has it.
sys.path.append(str(Path(__file__).resolve().parent.parent))

import torch

from bench import machine, plot
from bench.baselines import OURS, Ours, Peer, copies
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
from bench.optional_baselines import all_peers
from bench.progress import Progress
from bench.report import Report, Result, duration, results_table, targets_table
from bench.targets import Target, all_targets, evaluate
from bench.timing import Turns, measure
from masked_softmax_ext import _C, cpu_capability

ROOT = machine.ROOT
MXNET_PYTHON = ROOT / "build/mxnet-venv/bin/python"
INTERRUPTED = 130


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--quick", action="store_true", help="few cases, few rounds")
    which.add_argument("--targets", action="store_true", help="the table of targets alone")
    which.add_argument("--all", action="store_true", help="the full cross product")
    parser.add_argument("--filter", metavar="WORDS", help="only cases whose label has all of these")
    parser.add_argument("--list", action="store_true", help="print the cases' labels, measure none")
    parser.add_argument(
        "--level",
        choices=("best", "avx2", "avx512", "every"),
        help="instruction set to hold us and torch to; every: one after the other "
        "(default: every for --targets, else best)",
    )
    parser.add_argument(
        "--seconds", type=float, help="of rounds for each case (default: 2, with --quick 0.5)"
    )
    parser.add_argument(
        "--seed", type=int, default=SEED, help="of lengths and values (%(default)s)"
    )
    parser.add_argument(
        "--results", type=Path, default=ROOT / "bench/results", help="where to write (%(default)s)"
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
    of_targets = (target.case for target in chosen_targets(options))
    if options.quick:
        cases = without_repeats(quick_cases())
    elif options.all:
        cases = without_repeats(all_cases())
    elif options.targets:
        cases = without_repeats(of_targets)
    else:
        cases = without_repeats(chain(of_targets, default_cases()))
    words = (options.filter or "").split()
    return [case for case in cases if all(word in case.label for word in words)]


def levels(choice: str) -> list[str]:
    """The instruction sets to measure, the best last."""
    here = [name for name in _C.cpu_capabilities() if name != "scalar"] or ["scalar"]
    if choice == "best":
        # A level that the environment asks for is the best that we may use.
        return [cpu_capability()]
    if choice == "every":
        return here
    if choice not in here:
        raise SystemExit(f"--level {choice}: this processor or build has {', '.join(here)}")
    return [choice]


def held_to(level: str) -> dict[str, str]:
    """The environment that holds us and torch to an instruction set."""
    held = {"MASKED_SOFTMAX_EXT_CPU_CAPABILITY": level}
    if level in ("avx2", "avx512"):
        held["ATEN_CPU_CAPABILITY"] = level
    return held


def is_held_to(level: str) -> bool:
    in_torch = torch.backends.cpu.get_cpu_capability().lower()
    return cpu_capability() == level and (level not in ("avx2", "avx512") or in_torch == level)


def measure_case(
    case: Case, peers: Mapping[str, Peer], missing: Mapping[str, str], seconds: float, seed: int
) -> Result:
    """Checks every candidate, then lets all take turns.

    Raises:
        WrongResultError: our own result is wrong. A peer whose result is wrong is skipped.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(case.threads)
    data = make_data(case, machine.last_level_cache_bytes(), seed)
    truths: dict[bool, Truth] = {}
    wanted: list[Peer] = [Ours()]
    skipped: dict[str, str] = {}
    for name in case.peers:
        reason = missing.get(name) or peers[name].why_not(case)
        if reason is None:
            wanted.append(peers[name])
        else:
            skipped[name] = reason
    turns: dict[str, Turns] = {}
    try:
        for number, peer in enumerate(wanted):
            try:
                turns[peer.name] = prepared_turns(peer, data, number, truths)
            except Exception as error:
                if peer.name == OURS:
                    raise
                torch.set_num_threads(case.threads)
                skipped[peer.name] = f"failed: {type(error).__name__}: {error}"[:300]
        for name, copy in copies(data, len(wanted)).items():
            turns[name] = Turns(copy.run, copy.threads, keeps=data)
        figures = measure(turns, seconds)
    finally:
        for peer in wanted:
            peer.finish()
        torch.set_num_threads(threads)
    buffers = len(data.inputs)
    return Result(
        case=case,
        valid_elems=data.valid_elems,
        bytes_that_must_move=data.bytes_that_must_move,
        buffers=buffers,
        in_cache=buffers == 1,
        figures=figures,
        skipped=skipped,
    )


def prepared_turns(peer: Peer, data: Data, turn: int, truths: dict[bool, Truth]) -> Turns:
    prepared = peer.prepare(data, turn)
    # Or a candidate that writes nothing would pass with what the one before it wrote.
    data.outputs[0].fill_(torch.nan)
    if peer.masked not in truths:
        truths[peer.masked] = truth_of(data, peer.masked)
    is_ours = isinstance(peer, Ours)
    check(peer.name, prepared.result(), truths[peer.masked], data.case, is_peer=not is_ours)
    return Turns(prepared.run, prepared.threads, keeps=data)


def missing_peers(cases: list[Case], peers: Mapping[str, Peer]) -> dict[str, str]:
    """Why those that the cases name cannot be used here."""
    names = dict.fromkeys(name for case in cases for name in case.peers)
    reasons = {name: peers[name].why_missing() for name in names}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def stem_of(options: argparse.Namespace, described: Mapping[str, Any]) -> Path:
    """Of the files' names. Only the default list has no word behind the date."""
    words = [described["processor"], described["date"]]
    words += [word for word in ("quick", "targets", "all") if getattr(options, word)]
    if options.filter:
        words.append("part")
    folder: Path = options.results
    return folder / "-".join(words)


def run_here(options: argparse.Namespace) -> int:
    """One instruction set: the one in use."""
    cases, targets = chosen_cases(options), chosen_targets(options)
    if not cases:
        print("no case has such a label; --list shows them all")
        return 2
    peers = all_peers(options.mxnet_python)
    described = machine.describe()
    missing = missing_peers(cases, peers)
    described["versions"] |= {
        name: peer.version for name, peer in peers.items() if peer.version is not None
    }
    settings = {
        "seed": options.seed,
        "seconds_a_case": options.seconds,
        "list": next((w for w in ("quick", "targets", "all") if getattr(options, w)), "default"),
        "filter": options.filter,
    }
    report = Report(described, settings, missing)
    stem = stem_of(options, described)
    print(
        f"{described['processor']}: {described['capability']}, torch "
        f"{described['versions']['torch']} ({described['torch_capability']}), {len(cases)} cases"
    )
    for name, reason in report.missing.items():
        print(f"skipped: {name}: {reason}")
    runnable = [case for case in cases if case.threads <= described["processors"]]
    if len(runnable) < len(cases):
        print(
            f"skipped: {len(cases) - len(runnable)} cases with more threads than processors "
            f"that this process may use ({described['processors']})"
        )
    interrupted = False
    progress = Progress(len(runnable))
    try:
        for case in runnable:
            progress.show(case.label)
            try:
                result = measure_case(case, peers, report.missing, options.seconds, options.seed)
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
    show(report, stem, options)
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
    ours = result.figures[OURS]
    ratios = ", ".join(f"{name} {ratio:.2f}" for name, ratio in result.ratios().items())
    failed = [f"{n}: {why}" for n, why in result.skipped.items() if why.startswith("failed")]
    return (
        f"{result.case.label}: {duration(ours.seconds)} (±{ours.spread:.0%}), "
        f"{result.elems_per_second / 1e9:.2f} Ge/s, {result.share_of_copy:.2f} of copy; {ratios}"
        + "".join(f"; skipped: {text}" for text in failed)
    )


def show(report: Report, stem: Path, options: argparse.Namespace) -> None:
    if report.verdicts:
        print(f"\n{targets_table(report.verdicts)}")
    elif report.results:
        print(f"\n{results_table(report.results)}")
    for failure in report.failures:
        print(f"FAILED: {failure}")
    if report.disturbed():
        print(f"\n{report.disturbance()}")
    written = [f"{stem}.json", f"{stem}.md"]
    if not options.no_plots:
        try:
            written += map(str, plot.write_plots(report.to_json(), stem))
        except ImportError as error:
            print(f"skipped: plots: {error}; type: pip install matplotlib")
    print("\nwritten: " + "\n         ".join(written))


def run_held(level: str, arguments: list[str]) -> int:
    """The same in a process of its own, where we and torch are held to the instruction set."""
    print(f"== {level}", flush=True)
    command = [sys.executable, str(Path(__file__).resolve()), *arguments, "--level", "best"]
    child = subprocess.Popen(command, env={**os.environ, **held_to(level)})
    while True:
        try:
            return child.wait()
        except KeyboardInterrupt:
            continue  # the terminal tells the child too; it ends by itself, with its results


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.list:
        print("\n".join(case.label for case in chosen_cases(options)))
        return 0
    given = sys.argv[1:] if arguments is None else arguments
    worst = 0
    for level in levels(options.level):
        status = run_here(options) if is_held_to(level) else run_held(level, given)
        worst = max(worst, status)
        if status == INTERRUPTED:
            break
    return worst


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:  # before the first case, or while pictures are drawn
        print("\ninterrupted")
        sys.exit(INTERRUPTED)
