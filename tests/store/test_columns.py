"""Columns: sizes, times and keys of messages, as they lie on disk."""

from __future__ import annotations

import pytest

from brokerd.core.mailboxes.journal import Alike, Stored
from brokerd.store.columns import Columns, count_of, is_plain, pack

PLAIN = Stored(5, 1000.5, None, None, None)


@pytest.mark.parametrize(
    "messages",
    [
        [PLAIN],
        [PLAIN, PLAIN._replace(size=0)],
        [PLAIN, PLAIN._replace(stored_at=1000.75)],
        [PLAIN._replace(expires_at=2000.25), PLAIN],
        [PLAIN, PLAIN._replace(due_at=1001.0)],
        [PLAIN, PLAIN._replace(key=("alice", "schlüssel 1")), PLAIN._replace(key=("x", '"'))],
        [Stored(4_000_000_000, 1.0, 2.0, 3.0, ("alice", "k")), PLAIN._replace(expires_at=9.0)],
    ],
    ids=["one", "sizes", "stored", "expires", "due", "keys", "all"],
)
def test_columns_packed_messages_are_unpacked_alike(messages: list[Stored]) -> None:
    """Everything that is known of a message returns from its columns."""
    packed = pack(messages)

    assert Columns.unpack(packed).messages(range(len(messages))) == messages
    assert count_of(packed) == len(messages)


@pytest.mark.parametrize("expires_at", [None, 2000.25])
def test_columns_of_alike_messages_equal_those_of_single_ones(expires_at: float | None) -> None:
    """Messages that a mailbox collected lie on disk as all others."""
    alike = Alike(b"\x05\0\0\0\0\x01\0\0", 1000.5, expires_at)
    single = [Stored(size, 1000.5, expires_at, None, None) for size in (5, 256)]

    assert list(alike) == single
    assert pack(alike) == pack(single)


@pytest.mark.parametrize("expires_at", [None, 2000.25])
def test_columns_of_alike_messages_have_keys_and_ttls_of_their_own(
    expires_at: float | None,
) -> None:
    """What some of them have lies on disk as of all others."""
    keys = {0: ("alice", "schlüssel"), 2: ("carl", "k")}
    alike = Alike(b"\x05\0\0\0" * 3, 1000.5, expires_at, keys, {1: 1500.0})
    single = [
        Stored(5, 1000.5, 1500.0 if at == 1 else expires_at, None, keys.get(at)) for at in range(3)
    ]

    assert list(alike) == single
    assert pack(alike) == pack(single)
    assert not is_plain(pack(alike))


def test_columns_key_or_delay_makes_them_not_plain() -> None:
    """Only messages with a key or a delay need to be looked at by the store."""
    assert is_plain(pack([PLAIN, PLAIN._replace(expires_at=9.0, stored_at=3.0)]))
    assert not is_plain(pack([PLAIN, PLAIN._replace(due_at=9.0)]))
    assert not is_plain(pack([PLAIN._replace(key=("a", "b")), PLAIN]))


def test_columns_some_positions_return_those_messages() -> None:
    """Columns are asked for the messages that are wanted."""
    messages = [PLAIN._replace(size=size, expires_at=1.0) for size in range(4)]

    assert Columns.unpack(pack(messages)).messages([3, 1]) == [messages[3], messages[1]]
