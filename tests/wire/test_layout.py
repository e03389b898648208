"""The layout's structs and numbers, compared with each other."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from brokerd_client.wire import layout
from brokerd_client.wire.framing import LENGTH
from brokerd_client.wire.layout import FRAME_HEAD, FRAME_START, HEADER, ID, NAME_SIZE_OFFSET

ROOT: Final = Path(__file__).resolve().parents[2]


def test_layout_parts_agree_with_whole() -> None:
    """The parts of a frame's head have the same bytes as the whole head."""
    fields = (7, 1, 2, 3, 4)
    assert FRAME_HEAD.pack(*fields, 5) == FRAME_START.pack(*fields) + ID.pack(5)
    assert FRAME_HEAD.pack(*fields, 5) == LENGTH.pack(7) + HEADER.pack(1, 2, 3, 4, 5)
    assert HEADER.pack(1, 2, 3, 4, 5)[NAME_SIZE_OFFSET] == 4


def test_layout_plain_numbers_equal_enums() -> None:
    """Each plain number is named after its member."""
    numbers = [name for name in layout.__all__ if name.endswith(("_KIND", "_FLAG", "_CODEC"))]
    assert len(numbers) == 12
    for name in numbers:
        member, _, kind = name.rpartition("_")
        enum = {"KIND": layout.Kind, "FLAG": layout.Flag, "CODEC": layout.CodecId}[kind]
        value = getattr(layout, name)
        assert type(value) is int
        assert value == enum[member]


def test_layout_is_repeated_in_no_other_module() -> None:
    """Only wire.layout packs a header or makes plain numbers of the enums.

    The demo prints a program for a Python without the library, which packs its own.
    """
    copies = [
        path.name
        for folder in ("brokerd", "client/brokerd_client")
        for path in (ROOT / folder).rglob("*.py")
        if path.name not in ("layout.py", "demo.py")
        and re.search(r"BBBBQ|int\((Kind|CodecId)\.|codec=\d", path.read_text(encoding="utf-8"))
    ]
    assert copies == []
