"""docs/performance.md and its pictures, from the measurements of one run.

The page has no path and no name of the machine on it, and every figure has its spread.
"""

from __future__ import annotations

import datetime as dt
import html
import math
import os
import platform
import statistics
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from string import Template

from benchmarks.goals import GOALS, REMARKS, GoalResult
from benchmarks.machinery import HERE
from benchmarks.systems import SYSTEMS
from benchmarks.workloads import WORKLOADS, Entrant, Result, Timing, Workload

__all__ = ["Run", "number", "write_page"]


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
        values = self.values()
        return [goal.evaluate(values) for goal in GOALS]

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


def number(value: float) -> str:
    """Return a number with three significant digits, for people."""
    if value == 0:
        return "0"
    if abs(value) < 100:
        return f"{value:.3g}"
    digits = len(str(int(abs(value))))
    return f"{round(value, 3 - digits):,.0f}"


def write_page(run: Run, docs: Path) -> Path:
    """Write the page and its pictures into a directory; return the page's path."""
    pictures = docs / "performance"
    pictures.mkdir(exist_ok=True)
    for key in run.results:
        if drawn := _picture(WORKLOADS[key], run.results[key]):
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
        bound = f"{'at least' if goal.at_least else 'at most'} {goal.bound:g} x"
        ratio = "" if result.ratio is None else f"{number(result.ratio)} x"
        yield f"| {goal.work} | {goal.against} | {bound} | {ratio} | {result.word} |"
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
    yield "## Every workload"
    yield ""
    for key, results in run.results.items():
        yield from _workload(run, WORKLOADS[key], results)
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
    yield (
        f"{workload.unit}, {best} is better: the median of {rounds} rounds, the least and the most."
    )
    yield ""
    entrants = [entrant for entrant in workload.entrants if results.get(entrant.name)]
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
        )
        if shown
    )
    yield f"| system | {workload.unit} | spread {against}{extra}|"
    yield "|---|---|---|" + "---|" * ((reference is not None) + busy + per_message + p99)
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
        yield f"| {' | '.join(cells)} |"
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


def _reference(workload: Workload, results: Mapping[str, Sequence[Result]]) -> Entrant | None:
    """Return whom the others are compared with: brokerd over TCP, in the form of the
    goals.
    """
    return next((entrant for entrant in workload.entrants if results.get(entrant.name)), None)


# Pictures: a dot for the median on a logarithmic scale, a line from the least to the
# most.

_SVG = 'xmlns="http://www.w3.org/2000/svg" font-family="sans-serif" font-size="13"'
_WIDTH, _LEFT, _RIGHT, _ROW, _TOP, _BOTTOM = 760, 230, 90, 26, 42, 40


def _picture(workload: Workload, results: Mapping[str, Sequence[Result]]) -> str:
    rows = [
        (entrant, sorted(max(result.value, 1e-3) for result in results[entrant.name]))
        for entrant in workload.entrants
        if results.get(entrant.name)
    ]
    if not rows:
        return ""
    low = math.floor(math.log10(min(values[0] for _, values in rows)))
    high = max(math.ceil(math.log10(max(values[-1] for _, values in rows))), low + 1)
    height = _TOP + _ROW * len(rows) + _BOTTOM

    def x(value: float) -> float:
        return _LEFT + (math.log10(value) - low) / (high - low) * (_WIDTH - _LEFT - _RIGHT)

    def text(at: float, down: float, words: str, anchor: str, more: str = "") -> str:
        return (
            f'<text x="{at:.1f}" y="{down:.1f}"'
            f' text-anchor="{anchor}"{more}>{html.escape(words)}</text>'
        )

    best = "more is better" if workload.higher else "less is better"
    floor = _TOP + _ROW * len(rows)
    parts = [
        f'<svg {_SVG} viewBox="0 0 {_WIDTH} {height}">',
        f'<rect width="{_WIDTH}" height="{height}" fill="#ffffff"/>',
        text(16, 24, workload.title, "start", ' font-size="15" font-weight="bold"'),
    ]
    for power in range(low, high + 1):
        at = x(10.0**power)
        parts.append(
            f'<line x1="{at:.1f}" y1="{_TOP - 6}" x2="{at:.1f}" y2="{floor}" stroke="#d8d8d8"/>'
        )
        parts.append(
            text(at, floor + 16, f"{10.0**power:,.16g}", "middle", ' fill="#606060" font-size="11"')
        )
    parts.append(
        text(
            _WIDTH - _RIGHT,
            floor + 32,
            f"{workload.unit}, {best}",
            "end",
            ' fill="#606060" font-size="11"',
        )
    )
    for index, (entrant, values) in enumerate(rows):
        down = _TOP + _ROW * index + _ROW / 2
        middle = statistics.median(values)
        colour = "#c2410c" if entrant.system.startswith("brokerd") else "#334155"
        parts.append(text(_LEFT - 12, down + 4, entrant.title, "end", f' fill="{colour}"'))
        parts.append(
            f'<line x1="{x(values[0]):.1f}" y1="{down}" x2="{x(values[-1]):.1f}" y2="{down}"'
            f' stroke="{colour}" stroke-width="2"/>'
        )
        parts.append(f'<circle cx="{x(middle):.1f}" cy="{down}" r="5" fill="{colour}"/>')
        parts.append(
            text(_WIDTH - _RIGHT + 10, down + 4, number(middle), "start", f' fill="{colour}"')
        )
    return "\n".join([*parts, "</svg>"]) + "\n"
