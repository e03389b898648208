"""docs/reliability.md: its tables are written by what was seen, each between two marks;
the text around by hand.
"""

from __future__ import annotations

from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reliability.md"


def put(name: str, text: str, page: Path = PAGE) -> None:
    """Replace a section of the page; the first word of its name is make's target."""
    begin, end = f"<!-- {name}: written by make {name.split()[0]} -->\n", f"<!-- end of {name} -->"
    before, mark, rest = page.read_text().partition(begin)
    assert mark, f"{page} has no section {name}"
    _, mark, after = rest.partition(end)
    assert mark, f"{page} has no end of {name}"
    page.write_text(f"{before}{begin}{text.rstrip()}\n{end}{after}")
