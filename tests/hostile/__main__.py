"""``make siege SIEGE_S=60``: run every attack at once, and compare the broker's memory
with its bound.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from support import reliability_page
from support.broker_process import BrokerProcess
from support.siege.attackers import ATTACKS
from support.siege.siege import LIMITS, LOG, besiege, clients, resident, until_listening

from brokerd.config.load import load
from brokerd.config.memory_bound import memory_bound

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 760, 260, 60, 20, 30, 40
_SVG = 'xmlns="http://www.w3.org/2000/svg" font-family="sans-serif" font-size="13"'


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m hostile", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument(
        "--write", action="store_true", help="write docs/reliability.md and its picture"
    )
    arguments = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="bd-") as directory,
        BrokerProcess(Path(directory), clients(), limits=LIMITS, log=LOG) as broker,
    ):
        until_listening(broker)
        bound = memory_bound(load(broker.config)).total / 2**20
        idle = resident(broker.popen.pid) / 2**20
        samples, took = besiege(broker, arguments.seconds)
    curve = [(at, size / 2**20) for at, size in samples]
    most = max(size for _, size in curve)
    text = "\n".join(
        [
            (
                f"{arguments.seconds:g} s, {len(ATTACKS)} attacks, {len(clients())} clients with"
                " small limits."
            ),
            "",
            "| memory | MiB |",
            "|---|---|",
            f"| idle | {idle:.0f} |",
            f"| the most seen | {most:.0f} |",
            f"| the bound | {bound:.0f} |",
            "",
            f"Two normal clients exchanged {len(took):,} messages meanwhile: {_spread(took)}.",
            "",
            "![memory under attack](reliability/siege.svg)",
        ]
    )
    print(text)
    if arguments.write:
        reliability_page.put("siege", text)
        (reliability_page.PAGE.parent / "reliability" / "siege.svg").write_text(
            _picture(curve, bound)
        )
    return 0 if most < bound else 1


def _spread(took: list[float]) -> str:
    """Return the median, 99th percentile and maximum of sorted times in seconds, as
    text.
    """
    median, late = took[len(took) // 2], took[len(took) * 99 // 100]
    return (
        f"median {median * 1e3:.1f} ms, 99 % within {late * 1e3:.0f} ms, the longest"
        f" {took[-1] * 1e3:.0f} ms"
    )


def _picture(curve: list[tuple[float, float]], bound: float) -> str:
    """Return the curve and the bound above it, as SVG.

    Args:
        curve: Pairs of seconds and MiB.
    """
    wide, high = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
    last = curve[-1][0]

    def x(at: float) -> float:
        return _LEFT + at / last * wide

    def y(size: float) -> float:
        return _TOP + high - size / (bound * 1.05) * high

    def text(at: float, height: float, words: str, anchor: str, colour: str = "#606060") -> str:
        return (
            f'<text x="{at:.1f}" y="{height:.1f}" text-anchor="{anchor}"'
            f' fill="{colour}">{words}</text>'
        )

    points = " ".join(f"{x(at):.1f},{y(size):.1f}" for at, size in curve)
    return "\n".join(
        [
            f'<svg {_SVG} viewBox="0 0 {_WIDTH} {_HEIGHT}">',
            f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#ffffff"/>',
            (
                f'<rect x="{_LEFT}" y="{_TOP}" width="{wide}" height="{high}" fill="none"'
                ' stroke="#d8d8d8"/>'
            ),
            (
                f'<line x1="{_LEFT}" y1="{y(bound):.1f}" x2="{_LEFT + wide}" y2="{y(bound):.1f}"'
                ' stroke="#334155"/>'
            ),
            text(_LEFT + 8, y(bound) + 16, "the bound", "start", "#334155"),
            f'<polyline points="{points}" fill="none" stroke="#c2410c"/>',
            text(_LEFT + 8, y(curve[0][1]) - 12, "resident", "start", "#c2410c"),
            text(_LEFT, _TOP - 10, "memory, MiB", "start", "#000000"),
            text(_LEFT - 6, y(0) + 4, "0", "end"),
            text(_LEFT - 6, y(bound) + 4, f"{bound:.0f}", "end"),
            text(_LEFT, _HEIGHT - 18, "0", "middle"),
            text(_LEFT + wide, _HEIGHT - 18, f"{last:.0f} s", "end"),
            "</svg>",
            "",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
