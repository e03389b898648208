"""The command ``python -m benchmarks``: measures, prints, and after a whole run writes
docs/performance.md.
"""

from __future__ import annotations

import argparse
import compileall
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Sequence
from pathlib import Path

from benchmarks.goals import GOALS
from benchmarks.machinery import HERE, busy_share, raise_descriptor_limit
from benchmarks.page import Run, bound, number, reached, write_page
from benchmarks.systems import SYSTEMS
from benchmarks.workloads import (
    CHAPTERS,
    WORKLOADS,
    Entrant,
    Result,
    Spoilt,
    Stage,
    Timing,
    Workload,
)

FULL = Timing(warm_s=0.25, seconds=0.8)
QUICK = Timing(warm_s=0.1, seconds=0.2)
ROUNDS, QUICK_ROUNDS = 5, 2
#: Seconds before each workload in which the load of other programs is measured.
QUIET_S = 0.5
TOO_BUSY = 0.1
#: What may go wrong with a system; anything else is a mistake in here.
TROUBLE = (Spoilt, OSError, EOFError, RuntimeError, subprocess.SubprocessError)


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    raise_descriptor_limit()
    # An installed broker has its bytecode; a checkout may not, if the environment forbids it.
    for sources in ("brokerd", "client/brokerd_client"):
        compileall.compile_dir(HERE.parent / sources, quiet=1)
    timing = Timing(options.warm, options.seconds, window_mib=options.window)
    versions = {name: system.find() for name, system in SYSTEMS.items()}
    run = Run(timing, options.rounds, versions)
    _print_missing(versions, options.systems)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="bd-") as directory:
        for key in options.only:
            _measure(run, WORKLOADS[key], options.systems, Path(directory))
    run.took_s = time.monotonic() - began
    _print_goals(run, options.only)
    if options.json:
        options.json.write_text(json.dumps(run.values(), indent=1) + "\n")
    if options.page:
        write_page(run, HERE.parent / "docs")
        print("\ndocs/performance.md is written.")
    return 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m benchmarks", description="Measure brokerd against other systems."
    )
    parser.add_argument(
        "--quick", action="store_true", help="few and short rounds, in a minute or two"
    )
    parser.add_argument(
        "--only",
        metavar="WORKLOAD,...",
        help=f"of {', '.join(WORKLOADS)}; or all of {', '.join(CHAPTERS)}",
    )
    parser.add_argument("--systems", metavar="SYSTEM,...", help=f"of {', '.join(SYSTEMS)}")
    parser.add_argument("--rounds", type=int, help="how often each is measured")
    parser.add_argument("--seconds", type=float, help="how long a measurement takes")
    parser.add_argument(
        "--window",
        type=int,
        default=FULL.window_mib,
        metavar="MIB",
        help="what may be under way in a stream (%(default)s)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every value to this file")
    parser.add_argument(
        "--page",
        action=argparse.BooleanOptionalAction,
        help="write docs/performance.md; without this, only a whole run does",
    )
    options = parser.parse_args(arguments)
    if options.page is None:
        options.page = not (
            options.quick
            or options.only
            or options.systems
            or options.rounds
            or options.seconds
            or options.window != FULL.window_mib
        )
    for name, choices in (("only", WORKLOADS), ("systems", SYSTEMS)):
        value = getattr(options, name)
        chosen = value.split(",") if value else list(choices)
        if name == "only":
            chosen = [key for word in chosen for key in _keys(word)]
        if unknown := [choice for choice in chosen if choice not in choices]:
            parser.error(
                f"--{name}: there is no {', '.join(unknown)}; there are {', '.join(choices)}"
            )
        setattr(options, name, chosen)
    timing = QUICK if options.quick else FULL
    options.rounds = options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS)
    options.seconds = options.seconds or timing.seconds
    options.warm = timing.warm_s
    return options


def _keys(word: str) -> list[str]:
    """Return the workloads of a chapter, or the word itself."""
    return [workload.key for workload in CHAPTERS[word]] if word in CHAPTERS else [word]


def _print_missing(versions: dict[str, str | None], systems: Collection[str]) -> None:
    for name, version in versions.items():
        if version is None and name in systems:
            print(
                f"{SYSTEMS[name].title} is not installed and is left out ({SYSTEMS[name].install})"
            )


def _measure(run: Run, workload: Workload, systems: Collection[str], directory: Path) -> None:
    """Measure all entrants in turns, and print the medians."""
    print(
        f"\n{workload.title} ({workload.unit}, {'more' if workload.higher else 'less'} is better)",
        flush=True,
    )
    run.others.append(busy_share(QUIET_S))
    if run.others[-1] > TOO_BUSY:
        print(f"  careful: other programs use {run.others[-1]:.0%} of the processors", flush=True)
    entrants = [
        entrant
        for entrant in workload.entrants
        if entrant.system in systems and run.versions[entrant.system] is not None
    ]
    results: dict[str, list[Result]] = {entrant.name: [] for entrant in entrants}
    run.results[workload.key] = results
    with contextlib.ExitStack() as held:
        stages = Stages(workload, run, directory)
        held.callback(stages.close)
        rounds = (
            1
            if workload.own_stages and run.rounds <= QUICK_ROUNDS
            else min(run.rounds, workload.most_rounds)
        )
        for _ in range(rounds):
            for entrant in entrants:
                try:
                    results[entrant.name].append(stages.measure(entrant))
                except TROUBLE as error:
                    line = (
                        f"{workload.title}, {entrant.title}: {str(error) or type(error).__name__}"
                    )
                    run.spoilt.append(line.splitlines()[0])
                    print(f"  does not count: {line}", flush=True)
                    stages.drop(entrant)
    _print_medians(run, workload, [entrant for entrant in entrants if results[entrant.name]])


def _print_medians(run: Run, workload: Workload, entrants: Sequence[Entrant]) -> None:
    """Print a line for each entrant: its figures, and the ratio of the first to it."""
    first: dict[str, float] = {}
    for entrant in entrants:
        results = run.results[workload.key][entrant.name]
        values = [result.value for result in results]
        seen = {name: run.median(workload.key, entrant.name, name) or 0 for name in results[0].more}
        seen["value"] = statistics.median(values)
        first = first or seen
        spread = f"{number(min(values))} to {number(max(values))}"
        line = f"  {entrant.title:32} {number(seen['value']):>12}  ({spread})"
        line += f"  {first['value'] / seen['value']:7.3g} x  "
        # Programs beside this one change the ratio of processor times the least.
        for cost in ("server_ns", "all_us"):
            if seen.get(cost):
                line += f" at {first[cost] / seen[cost]:.3g} x the processor time;"
        more = "  ".join(f"{name} {value:.3g}" for name, value in seen.items() if name != "value")
        print(f"{line} {more}", flush=True)


class Stages:
    """The stages of one workload, each kept for all rounds unless the workload wants a
    new one every time.
    """

    def __init__(self, workload: Workload, run: Run, directory: Path) -> None:
        self._workload = workload
        self._timing = run.timing
        self._directory = directory
        self._stages: dict[str, Stage] = {}
        self._count = 0

    def measure(self, entrant: Entrant) -> Result:
        """Measure once. Raises what of TROUBLE comes."""
        stage = self._stages.get(entrant.name)
        if stage is None:
            self._count += 1
            directory = self._directory / f"{self._workload.key}-{self._count}"
            stage = Stage(entrant, self._workload.setup(entrant, self._timing, directory))
            self._stages[entrant.name] = stage
            self._workload.prepare(stage, self._timing)
        result = self._workload.measure(stage, self._timing)
        if self._workload.own_stages:
            self.drop(entrant)
        return result

    def drop(self, entrant: Entrant) -> None:
        """End a stage; the next measurement begins with a new one."""
        stage = self._stages.pop(entrant.name, None)
        if stage is not None:
            stage.close()

    def close(self) -> None:
        """End all stages."""
        for stage in self._stages.values():
            stage.close()
        self._stages.clear()


def _print_goals(run: Run, measured: Collection[str]) -> None:
    print("\nGoals")
    for result in run.goal_results():
        goal = result.goal
        if goal.workload in measured:
            against = f"{goal.work}, against {goal.against}"
            word = result.word.replace("*", "")
            print(f"  {against:92} {bound(goal):18} {reached(result):>10}  {word}")
    passed = sum(result.passed for result in run.goal_results() if result.goal.workload in measured)
    print(f"  {passed} of {sum(goal.workload in measured for goal in GOALS)} reached")


if __name__ == "__main__":
    sys.exit(main())
