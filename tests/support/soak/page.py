"""The results of a soak for docs/reliability.md: a table, and a plot of the samples."""

from __future__ import annotations

import html
import math
from collections.abc import Iterator

from support.soak.run import SERIES, Soak

__all__ = ["picture", "table"]


def table(seen: Soak) -> str:
    """Return the verdicts and the account, in Markdown."""
    return "\n".join(_lines(seen))


def _lines(seen: Soak) -> Iterator[str]:
    verdicts = seen.verdicts()
    yield f"{seen.seconds / 60:g} minutes, {len(seen.samples['at'])} samples, seed {seen.seed}."
    yield ""
    yield "| sampled | median | least to most | rise in the last three quarters | allowed | |"
    yield "|---|---|---|---|---|---|"
    for each in SERIES:
        found = verdicts[each.key]
        unit = f" {each.unit}" if each.unit else ""
        yield (
            f"| {each.title} | {found.median:.3g}{unit} | {found.least:.3g} to {found.most:.3g} |"
            f" {found.rise:+.2g} | {found.allowed:.2g} | {'flat' if found.flat else 'NOT FLAT'} |"
        )
    yield ""
    yield "| work | count |"
    yield "|---|---|"
    for what, count in seen.account.items():
        yield f"| {what} | {count:,} |"
    yield ""
    yield "![what was sampled](reliability/soak.svg)"


# The plot: one panel below the other, the time in minutes along the bottom.

_SVG = 'xmlns="http://www.w3.org/2000/svg" font-family="sans-serif" font-size="13"'
_WIDTH, _LEFT, _RIGHT, _PANEL, _GAP, _TOP, _BOTTOM = 760, 70, 20, 110, 34, 30, 40
#: Panels: the title, and what is drawn in it with its colour. Some have a logarithmic
#: scale.
_PANELS = (
    ("memory, MiB", (("rss", "#c2410c", "resident"), ("anonymous", "#334155", "anonymous")), False),
    ("descriptors", (("fds", "#c2410c", ""),), False),
    (
        "round trip through the broker, µs",
        (
            ("p99", "#f59e0b", "99th percentile"),
            ("median", "#c2410c", "median"),
            ("control_median", "#334155", "control, without the broker"),
        ),
        True,
    ),
)


def picture(seen: Soak) -> str:
    """Return the plot, as SVG."""
    height = _TOP + len(_PANELS) * (_PANEL + _GAP) + _BOTTOM
    parts = [
        f'<svg {_SVG} viewBox="0 0 {_WIDTH} {height}">',
        f'<rect width="{_WIDTH}" height="{height}" fill="#ffffff"/>',
    ]
    for index, (title, lines, logarithmic) in enumerate(_PANELS):
        parts += _panel(seen, _TOP + index * (_PANEL + _GAP), title, lines, logarithmic=logarithmic)
    floor = height - _BOTTOM - _GAP
    minutes = seen.seconds / 60
    for tick in range(6):
        at = _LEFT + tick / 5 * (_WIDTH - _LEFT - _RIGHT)
        parts.append(_text(at, floor + 18, f"{minutes * tick / 5:g}", "middle"))
    parts.append(_text(_WIDTH - _RIGHT, floor + 34, "minutes", "end"))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _text(x: float, y: float, words: str, anchor: str, colour: str = "#606060") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
        f' fill="{colour}">{html.escape(words)}</text>'
    )


def _panel(
    seen: Soak,
    top: float,
    title: str,
    lines: tuple[tuple[str, str, str], ...],
    *,
    logarithmic: bool,
) -> Iterator[str]:
    values = [value for key, _, _ in lines for value in seen.samples[key]]
    scale = (lambda value: math.log10(max(value, 1e-3))) if logarithmic else float
    low = scale(min(values)) if logarithmic else 0.0
    high = max(scale(max(values)) * (1 if logarithmic else 1.1), low + 1e-6)

    def y(value: float) -> float:
        return top + _PANEL - (scale(value) - low) / (high - low) * _PANEL

    def x(at: float) -> float:
        return _LEFT + at / seen.seconds * (_WIDTH - _LEFT - _RIGHT)

    yield _text(_LEFT, top - 8, title, "start", "#000000")
    wide = _WIDTH - _LEFT - _RIGHT
    yield (
        f'<rect x="{_LEFT}" y="{top}" width="{wide}" height="{_PANEL}" fill="none"'
        ' stroke="#d8d8d8"/>'
    )
    for value in (10**low, 10**high) if logarithmic else (low, high):
        yield _text(_LEFT - 6, y(value) + 4, f"{value:.3g}", "end")
    if seen.upgraded_at is not None:
        at = x(seen.upgraded_at)
        dashed = 'stroke="#a0a0a0" stroke-dasharray="4 3"'
        yield f'<line x1="{at:.1f}" y1="{top}" x2="{at:.1f}" y2="{top + _PANEL}" {dashed}/>'
    legend = _WIDTH - _RIGHT
    for key, colour, name in lines:
        step = len(seen.samples[key]) // 1200 + 1
        points = " ".join(
            f"{x(at):.1f},{y(value):.1f}"
            for at, value in zip(seen.samples["at"][::step], seen.samples[key][::step], strict=True)
        )
        yield f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1"/>'
        if name:
            yield _text(legend, top - 8, name, "end", colour)
            legend -= 8 * len(name) + 16
