"""Frames of stored messages."""

from __future__ import annotations

import pytest

from brokerd.core.stored_message import split_frames


def test_split_frames_returns_each_frame_of_what_was_joined() -> None:
    assert split_frames(b"--abcde\0f", 2, (2, 0, 3, 2)) == [b"ab", b"", b"cde", b"\0f"]
    assert split_frames(b"abc", 3, ()) == []


def test_split_frames_refuses_sizes_that_lead_behind_the_end() -> None:
    with pytest.raises(ValueError, match="longer than what contains them"):
        split_frames(b"--abcde", 2, (2, 4))
