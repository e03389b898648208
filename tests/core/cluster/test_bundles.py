"""Bundles of short messages for one host."""

from __future__ import annotations

import pytest

from brokerd.core.cluster.bundles import BUNDLE, bundled, unbundled
from brokerd.core.cluster.hub import Outgoing
from brokerd.core.cluster.messages import HEADER_SIZE, Malformed, head_of, pack


def data(to: str, body: bytes, *, kind: str = "data", boot: int = 2) -> Outgoing:
    """Return a message for a host."""
    return Outgoing(to, kind, pack(1, boot, (body,)))


def parts_of(message: Outgoing) -> list[tuple[str, bytes]]:
    """Return the parts of a bundle."""
    assert message.kind == BUNDLE
    head, body = head_of(memoryview(message.payload))
    assert head == (1, 2)
    return [(kind, bytes(part)) for kind, part in unbundled(body)]


def test_short_messages_for_one_host_leave_in_one_bundle_in_their_order() -> None:
    messages = [data("b", b"one"), data("b", b"", kind="outcomes"), data("b", b"three")]
    (bundle,) = bundled(messages, 1 << 20)
    assert bundle.to == "b"
    assert parts_of(bundle) == [("data", b"one"), ("outcomes", b""), ("data", b"three")]


@pytest.mark.parametrize(
    "other",
    [
        data("c", b"two"),
        data("b", b"two", boot=3),
        data("b", b"two", kind="ping"),
        data("b", bytes(8192)),
    ],
)
def test_messages_that_differ_or_are_long_leave_alone(other: Outgoing) -> None:
    first, last = data("b", b"one"), data("b", b"three")
    assert bundled([first, other, last], 1 << 20) == [first, other, last]
    assert bundled([other, first], 1 << 20) == [other, first]


def test_bundles_fit_max_payload() -> None:
    found = bundled([data("b", bytes(100)) for _ in range(10)], 350)
    assert all(len(each.payload) <= 350 for each in found)
    assert len(found) == 5


@pytest.mark.parametrize("body", [b"\0\0", b"\x07\0\0\0\x00", b"\0\0\0\0\x02a"])
def test_bundle_that_is_cut_or_wrong_is_malformed(body: bytes) -> None:
    with pytest.raises(Malformed):
        list(unbundled(memoryview(body)))


def test_header_is_what_pack_writes() -> None:
    assert len(pack(1, 2, ())) == HEADER_SIZE
