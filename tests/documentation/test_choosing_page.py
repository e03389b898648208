"""docs/choosing.md: what it says of measurements agrees with docs/performance.md."""

from __future__ import annotations

import re
from typing import Final

import pytest
from support.pages import ROOT

PAGE: Final = " ".join((ROOT / "docs" / "choosing.md").read_text(encoding="utf-8").split())
#: For each claim: the work and the other system in the table of goals, and the least and
#: the most ratio with which the claim is true.
CLAIMS: Final = {
    "moves small messages several times as fast": ("1 to 1, 16 B", "nats-server", 4, 1e9),
    "It needs about a tenth of the memory for an idle connection": (
        "idle authenticated connection, memory",
        "nats-server",
        0.06,
        0.14,
    ),
    "A round trip takes about as long, or less": ("round trip, p50, TCP", "nats-server", 0, 1.2),
}


@pytest.mark.parametrize("claim", CLAIMS)
def test_choosing_page_claim_agrees_with_measurement(claim: str) -> None:
    """A new measurement may make a sentence wrong: then change the sentence."""
    work, other, least, most = CLAIMS[claim]
    table = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    row = re.search(
        rf"^\| {re.escape(work)} \| {other} \| [^|]* \| ([\d.]+) x", table, re.MULTILINE
    )
    assert claim in PAGE
    assert row is not None
    assert least <= float(row[1]) <= most
