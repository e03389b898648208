"""The layout's structs and numbers, compared with each other."""

from __future__ import annotations

from brokerd_client.wire import layout
from brokerd_client.wire.framing import LENGTH
from brokerd_client.wire.layout import FRAME_HEAD, FRAME_START, HEADER, ID, NAME_SIZE_OFFSET


def test_layout_parts_agree_with_the_whole() -> None:
    """The parts of a frame's head, and the plain numbers, are those of the whole."""
    fields = (7, 1, 2, 3, 4)
    assert FRAME_HEAD.pack(*fields, 5) == FRAME_START.pack(*fields) + ID.pack(5)
    assert FRAME_HEAD.pack(*fields, 5) == LENGTH.pack(7) + HEADER.pack(1, 2, 3, 4, 5)
    assert HEADER.pack(1, 2, 3, 4, 5)[NAME_SIZE_OFFSET] == 4


def test_layout_plain_numbers_are_those_of_the_enums() -> None:
    """Each plain number is named after its member."""
    numbers = [name for name in layout.__all__ if name.endswith(("_KIND", "_FLAG"))]
    assert len(numbers) == 6
    for name in numbers:
        member, _, enum = name.rpartition("_")
        value = getattr(layout, name)
        assert type(value) is int
        assert value == getattr(layout, enum.title())[member]
