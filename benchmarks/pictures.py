"""The pictures of docs/performance.md: a dot for the median on a logarithmic scale, a
line from the least to the most. Where a workload has sizes, a curve for each system.
"""

from __future__ import annotations

import html
import math
import statistics
from collections.abc import Mapping, Sequence

from benchmarks.systems import SYSTEMS
from benchmarks.workloads import Entrant, Result, Workload

__all__ = ["number", "picture"]

#: Entrants and their sorted values.
Rows = Sequence[tuple[Entrant, Sequence[float]]]

_SVG = 'xmlns="http://www.w3.org/2000/svg" font-family="sans-serif" font-size="13"'
_WIDTH, _LEFT, _RIGHT, _ROW, _TOP, _BOTTOM = 760, 230, 90, 26, 42, 40
#: Of curves: height of the plot, its margins, and the height of a line of text.
_PLOT, _PLOT_LEFT, _PLOT_RIGHT, _LINE = 220, 80, 150, 16
_GREY = ' fill="#606060" font-size="11"'


def number(value: float) -> str:
    """Return a number with three significant digits, for people."""
    if value == 0:
        return "0"
    if abs(value) < 100:
        return f"{value:.3g}"
    digits = len(str(int(abs(value))))
    return f"{round(value, 3 - digits):,.0f}"


def picture(workload: Workload, results: Mapping[str, Sequence[Result]]) -> str:
    """Return the picture of a workload as SVG; empty without any result."""
    rows = [
        (entrant, sorted(max(result.value, 1e-3) for result in results[entrant.name]))
        for entrant in workload.entrants
        if results.get(entrant.name)
    ]
    if not rows:
        return ""
    low = math.floor(math.log10(min(values[0] for _, values in rows)))
    high = max(math.ceil(math.log10(max(values[-1] for _, values in rows))), low + 1)
    draw = _curves if any(entrant.size for entrant, _ in rows) else _dots
    return "\n".join([*draw(workload, rows, low, high), "</svg>"]) + "\n"


def _begin(workload: Workload, height: int) -> list[str]:
    return [
        f'<svg {_SVG} viewBox="0 0 {_WIDTH} {height}">',
        f'<rect width="{_WIDTH}" height="{height}" fill="#ffffff"/>',
        _text(16, 24, workload.title, "start", ' font-size="15" font-weight="bold"'),
    ]


def _text(at: float, down: float, words: str, anchor: str, more: str = "") -> str:
    return (
        f'<text x="{at:.1f}" y="{down:.1f}"'
        f' text-anchor="{anchor}"{more}>{html.escape(words)}</text>'
    )


def _unit(workload: Workload) -> str:
    return f"{workload.unit}, {'more' if workload.higher else 'less'} is better"


def _colour(entrant: Entrant) -> str:
    return "#c2410c" if entrant.system.startswith("brokerd") else "#334155"


def _curves(workload: Workload, rows: Rows, low: int, high: int) -> list[str]:
    """Draw a curve for each system; the sizes stand side by side."""
    floor = _TOP + _PLOT
    sizes = sorted({entrant.size for entrant, _ in rows})
    step = (_WIDTH - _PLOT_LEFT - _PLOT_RIGHT) / max(len(sizes) - 1, 1)

    def y(value: float) -> float:
        return floor - (math.log10(value) - low) / (high - low) * _PLOT

    parts = _begin(workload, floor + _BOTTOM)
    for power in range(low, high + 1):
        down = y(10.0**power)
        parts.append(
            f'<line x1="{_PLOT_LEFT}" y1="{down:.1f}" x2="{_WIDTH - _PLOT_RIGHT}" y2="{down:.1f}"'
            ' stroke="#d8d8d8"/>'
        )
        parts.append(_text(_PLOT_LEFT - 8, down + 4, f"{10.0**power:,.16g}", "end", _GREY))
    for place, size in enumerate(sizes):
        parts.append(_text(_PLOT_LEFT + step * place, floor + 16, f"{size:,}", "middle", _GREY))
    what = rows[0][0].variant.partition(" ")[2]
    parts.append(_text(_PLOT_LEFT, floor + 32, what, "start", _GREY))
    parts.append(_text(_WIDTH - _PLOT_RIGHT, floor + 32, _unit(workload), "end", _GREY))
    labels: list[float] = []
    for system in dict.fromkeys(entrant.system for entrant, _ in rows):
        points = []
        for entrant, values in rows:
            if entrant.system == system:
                at = _PLOT_LEFT + step * sizes.index(entrant.size)
                down = y(statistics.median(values))
                points.append(f"{at:.1f},{down:.1f}")
                parts.append(
                    f'<line x1="{at:.1f}" y1="{y(values[0]):.1f}" x2="{at:.1f}"'
                    f' y2="{y(values[-1]):.1f}" stroke="{_colour(entrant)}" stroke-width="2"/>'
                )
                parts.append(
                    f'<circle cx="{at:.1f}" cy="{down:.1f}" r="4" fill="{_colour(entrant)}"/>'
                )
                colour, end = _colour(entrant), (at, down)
        parts.append(
            f'<polyline points="{" ".join(points)}" fill="none" stroke="{colour}"'
            ' stroke-width="1.5"/>'
        )
        title = SYSTEMS[system].title
        at, down = end
        while any(abs(down - other) < _LINE for other in labels):
            down += _LINE
        labels.append(down)
        parts.append(_text(at + 10, down + 4, title, "start", f' fill="{colour}"'))
    return parts


def _dots(workload: Workload, rows: Rows, low: int, high: int) -> list[str]:
    """Draw a row for each entrant."""

    def x(value: float) -> float:
        return _LEFT + (math.log10(value) - low) / (high - low) * (_WIDTH - _LEFT - _RIGHT)

    floor = _TOP + _ROW * len(rows)
    parts = _begin(workload, floor + _BOTTOM)
    for power in range(low, high + 1):
        at = x(10.0**power)
        parts.append(
            f'<line x1="{at:.1f}" y1="{_TOP - 6}" x2="{at:.1f}" y2="{floor}" stroke="#d8d8d8"/>'
        )
        parts.append(_text(at, floor + 16, f"{10.0**power:,.16g}", "middle", _GREY))
    parts.append(_text(_WIDTH - _RIGHT, floor + 32, _unit(workload), "end", _GREY))
    for index, (entrant, values) in enumerate(rows):
        down = _TOP + _ROW * index + _ROW / 2
        middle = statistics.median(values)
        colour = _colour(entrant)
        parts.append(_text(_LEFT - 12, down + 4, entrant.title, "end", f' fill="{colour}"'))
        parts.append(
            f'<line x1="{x(values[0]):.1f}" y1="{down}" x2="{x(values[-1]):.1f}" y2="{down}"'
            f' stroke="{colour}" stroke-width="2"/>'
        )
        parts.append(f'<circle cx="{x(middle):.1f}" cy="{down}" r="5" fill="{colour}"/>')
        parts.append(
            _text(_WIDTH - _RIGHT + 10, down + 4, number(middle), "start", f' fill="{colour}"')
        )
    return parts
