"""docs/performance.md and its pictures, from the measurements of one run.

The page has no path and no name of the machine on it, and every figure has its spread.
"""

from __future__ import annotations

import datetime as dt
import os
import platform
import statistics
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from string import Template
from typing import Final

from benchmarks.goals import GOALS, REMARKS, Goal, GoalResult
from benchmarks.machinery import HERE
from benchmarks.pictures import number, picture
from benchmarks.systems import SYSTEMS
from benchmarks.workloads import CHAPTERS, WORKLOADS, Entrant, Result, Timing, Workload

__all__ = ["Run", "bound", "number", "reached", "write_page"]


@dataclass
class Run:
    """All results of one run.

    Attributes:
        results: Workload, then entrant, to its measurements.
        spoilt: What went wrong, a line each.
        others: What share of the processors was in use before each workload, when
            nothing of this ran.
        versions: By system; None where it is not installed.
    """

    timing: Timing
    rounds: int
    versions: Mapping[str, str | None]
    results: dict[str, dict[str, list[Result]]] = field(default_factory=dict)
    spoilt: list[str] = field(default_factory=list)
    others: list[float] = field(default_factory=list)
    took_s: float = 0.0

    def values(self) -> dict[str, dict[str, list[float]]]:
        """Return the values only."""
        return {
            workload: {
                entrant: [result.value for result in results]
                for entrant, results in entrants.items()
            }
            for workload, entrants in self.results.items()
        }

    def goal_results(self) -> list[GoalResult]:
        """Return the result of each goal."""
        return [goal.evaluate(self.median) for goal in GOALS]

    def median(self, workload: str, entrant: str, of: str = "") -> float | None:
        """Return the median of an entrant's values, or of something else that was seen;
        None without any.
        """
        results = self.results.get(workload, {}).get(entrant, [])
        values = (
            [result.more[of] for result in results if of in result.more]
            if of
            else [r.value for r in results]
        )
        return statistics.median(values) if values else None


CHAPTER_TITLES: Final = {
    "applications": "What applications send",
    "bulk": "Bulk",
    "mailboxes": "Messages that are stored on disk",
    "connections": "Connections",
    "growth": "Growth and stalls",
}


def bound(goal: Goal) -> str:
    """Return the bound of a goal, for people."""
    return f"{'at least' if goal.at_least else 'at most'} {number(goal.bound)} {goal.unit}"


def reached(result: GoalResult) -> str:
    """Return the ratio of a goal, for people."""
    return "" if result.ratio is None else f"{number(result.ratio)} {result.goal.unit}"


def write_page(run: Run, docs: Path) -> Path:
    """Write the page and its pictures into a directory; return the page's path."""
    pictures = docs / "performance"
    pictures.mkdir(exist_ok=True)
    for key in run.results:
        if drawn := picture(WORKLOADS[key], run.results[key]):
            (pictures / f"{key}.svg").write_text(drawn)
    page = docs / "performance.md"
    page.write_text("\n".join(_page(run)) + "\n")
    return page


def _page(run: Run) -> Iterator[str]:
    yield "# Performance"
    yield ""
    yield _wrapped(
        "This page is written by `make bench`. It starts every system on one machine and gives"
        " all of them the same work. Machines differ and are noisy: compare the ratios, which are"
        " those of medians from one run."
    )
    yield ""
    yield "## Goals"
    yield ""
    yield "| work | against | goal | measured | |"
    yield "|---|---|---|---|---|"
    for result in run.goal_results():
        goal = result.goal
        cells = (goal.work, goal.against, bound(goal), reached(result), result.word)
        yield f"| {' | '.join(cells)} |"
    yield ""
    remarks = [
        (result.goal, remark)
        for result in run.goal_results()
        if result.ratio is not None
        and not result.passed
        and (remark := REMARKS.get((result.goal.workload, result.goal.theirs)))
    ]
    if remarks:
        yield "Why the missed goals were missed:"
        yield ""
        for goal, remark in remarks:
            yield _wrapped(f"- {goal.work}, against {goal.against}: {remark}")
        yield ""
    yield from _how(run)
    yield from _generator(run)
    for chapter, workloads in CHAPTERS.items():
        yield f"## {CHAPTER_TITLES[chapter]}"
        yield ""
        for workload in workloads:
            if results := run.results.get(workload.key):
                yield from _workload(run, workload, results)
    if run.spoilt:
        yield "## Measurements that did not count"
        yield ""
        yield from (f"- {line}" for line in run.spoilt)
        yield ""


def _how(run: Run) -> Iterator[str]:
    yield "## How it was measured"
    yield ""
    text = Template((HERE / "method.md").read_text()).substitute(
        machine=_machine(),
        date=f"{dt.datetime.now(dt.UTC):%Y-%m-%d}",
        minutes=f"{run.took_s / 60:.0f}",
        rounds=run.rounds,
        seconds=f"{run.timing.seconds:g}",
        warm=f"{run.timing.warm_s:g}",
        window=run.timing.window_mib,
        others=f"{statistics.median(run.others or [0]):.0%}",
        others_most=f"{max(run.others, default=0):.0%}",
    )
    for item in text.rstrip().split("\n- "):
        yield _wrapped(f"- {item.removeprefix('- ')}")
    yield ""
    yield "| system | version |"
    yield "|---|---|"
    for name, system in SYSTEMS.items():
        if not name.startswith(("direct", "relay-", "brokerd-")):
            yield (
                f"| {system.title} |"
                f" {run.versions.get(name) or f'not installed; {system.install}'} |"
            )
    yield ""


def _wrapped(text: str) -> str:
    """Return a paragraph or list item in lines of at most 88 columns."""
    return textwrap.fill(
        " ".join(text.split()),
        88,
        subsequent_indent="  " if text.startswith("- ") else "",
        break_long_words=False,
        break_on_hyphens=False,
    )


def _machine() -> str:
    model = "unknown processor"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    kernel = ".".join(platform.release().split(".")[:2])
    return (
        f"{model}, {len(os.sched_getaffinity(0))} cores, Linux {kernel}, Python"
        f" {platform.python_version()}"
    )


def _generator(run: Run) -> Iterator[str]:
    rows = []
    for key in ("1to1-16", "1to1-1k", "1to1-64k"):
        for ours, direct in (("brokerd", "direct"), ("brokerd-unix", "direct-unix")):
            rate, alone = run.median(key, ours), run.median(key, direct)
            server, load = run.median(key, ours, "server_busy"), run.median(key, ours, "load_busy")
            if rate and alone and server is not None and load is not None:
                title = f"{WORKLOADS[key].title}, {'Unix socket' if 'unix' in ours else 'TCP'}"
                rows.append(f"| {title} | {alone / rate:.1f} x | {server:.0%} | {load:.0%} |")
    if not rows:
        return
    yield "## Where the load generator is part of the limit"
    yield ""
    yield (HERE / "generator.md").read_text()
    yield "| work | generator alone | brokerd | generator, both threads |"
    yield "|---|---|---|---|"
    yield from rows
    yield ""


def _workload(
    run: Run, workload: Workload, results: Mapping[str, Sequence[Result]]
) -> Iterator[str]:
    best = "more" if workload.higher else "less"
    rounds = max(map(len, results.values()), default=0)
    yield f"### {workload.title[0].upper()}{workload.title[1:]}"
    yield ""
    entrants = [entrant for entrant in workload.entrants if results.get(entrant.name)]
    grows = any(entrant.size for entrant in entrants)
    spread = "; the picture shows the least and the most" if grows else ", the least and the most"
    yield f"{workload.unit}, {best} is better: the median of {rounds} rounds{spread}."
    yield ""
    if grows:
        yield from _growth_table(run, workload, entrants)
    else:
        yield from _table(run, workload, results, entrants)
    missing = [
        SYSTEMS[entrant.system].title
        for entrant in workload.entrants
        if run.versions.get(entrant.system) is None
    ]
    if missing:
        yield ""
        yield f"Not installed: {', '.join(dict.fromkeys(missing))}."
    yield ""
    if entrants:
        yield f"![{workload.title}](performance/{workload.key}.svg)"
        yield ""


def _growth_table(run: Run, workload: Workload, entrants: Sequence[Entrant]) -> Iterator[str]:
    """Yield a row for each size, with a column for each system."""
    systems = list(dict.fromkeys(entrant.system for entrant in entrants))
    columns = [("", workload.unit), *workload.also]
    titles = [f"{SYSTEMS[system].title}, {title}" for _, title in columns for system in systems]
    first = entrants[0].variant
    if workload.shows_growth:
        titles += [f"{SYSTEMS[system].title}, to that of {first}" for system in systems]
    ratio = len(systems) > 1
    what = entrants[0].variant.partition(" ")[2]
    yield f"| {' | '.join([what, *titles, *(['ratio'] if ratio else [])])} |"
    yield "|---" * (1 + len(titles) + ratio) + "|"
    for variant in dict.fromkeys(entrant.variant for entrant in entrants):
        of = {
            name: [run.median(workload.key, f"{system}/{variant}", name) for system in systems]
            for name, _ in columns
        }
        cells = ["" if value is None else number(value) for each in of.values() for value in each]
        ours, *peers = of[""]
        if workload.shows_growth:
            least = [run.median(workload.key, f"{system}/{first}", "") for system in systems]
            cells += [
                f"{number(value / start)} x" if value and start else ""
                for value, start in zip(of[""], least, strict=True)
            ]
        if ratio:
            cells.append(f"{number(ours / peers[0])} x" if ours and peers[0] else "")
        yield f"| {' | '.join([variant.partition(' ')[0], *cells])} |"


def _table(
    run: Run,
    workload: Workload,
    results: Mapping[str, Sequence[Result]],
    entrants: Sequence[Entrant],
) -> Iterator[str]:
    """Yield a row for each entrant."""
    reference = _reference(workload, results)
    busy = any(
        "server_busy" in result.more for entrant in entrants for result in results[entrant.name]
    )
    per_message = workload.higher and any(
        "server_ns" in result.more for entrant in entrants for result in results[entrant.name]
    )
    p99 = any("p99" in result.more for entrant in entrants for result in results[entrant.name])
    against = f"| {reference.title} to it " if reference else ""
    extra = "".join(
        title
        for title, shown in (
            ("| server's use of a core ", busy),
            ("| server's ns for each ", per_message),
            ("| p99 ", p99),
            *((f"| {title} ", True) for _, title in workload.also),
        )
        if shown
    )
    yield f"| system | {workload.unit} | spread {against}{extra}|"
    columns = (reference is not None) + busy + per_message + p99 + len(workload.also)
    yield "|---|---|---|" + "---|" * columns
    for entrant in entrants:
        values = [result.value for result in results[entrant.name]]
        middle = statistics.median(values)
        cells = [entrant.title, number(middle), f"{number(min(values))} to {number(max(values))}"]
        if reference:
            ours = statistics.median(result.value for result in results[reference.name])
            cells.append(f"{number(ours / middle)} x" if middle else "")
        if busy:
            use = run.median(workload.key, entrant.name, "server_busy")
            cells.append("" if use is None else f"{use:.0%}")
        if per_message:
            cost = run.median(workload.key, entrant.name, "server_ns")
            cells.append(
                "" if cost is None or entrant.system.startswith("direct") else number(cost)
            )
        if p99:
            late = run.median(workload.key, entrant.name, "p99")
            cells.append("" if late is None else number(late))
        for name, _ in workload.also:
            figure = run.median(workload.key, entrant.name, name)
            cells.append("" if figure is None else number(figure))
        yield f"| {' | '.join(cells)} |"


def _reference(workload: Workload, results: Mapping[str, Sequence[Result]]) -> Entrant | None:
    """Return whom the others are compared with: brokerd over TCP, in the form of the
    goals.
    """
    return next((entrant for entrant in workload.entrants if results.get(entrant.name)), None)
