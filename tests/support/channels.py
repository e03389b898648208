"""Channels made by clients that know docs/protocol.md alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from support.keys import key_of
from support.raw_client import RECEIPT, REPLY, Frame, Raw, packed

if TYPE_CHECKING:
    from typing import Protocol

    from brokerd_client.address import Address

    class Broker(Protocol):
        """A broker to connect to."""

        @property
        def address(self) -> Address: ...

        def login(self, name: str) -> Raw: ...


OPEN, JOIN = 8, 9


def listening(broker: Broker, name: str) -> Raw:
    """Return an ordinary connection that has asked for channels."""
    raw = broker.login(name)
    answer = raw.ask("listen")
    assert (answer.kind, answer.json) == (REPLY, {})
    return raw


def dialed(broker: Broker, name: str, first: bytes = b"") -> Raw:
    """Return a connection that announced a channel, and has sent its first bytes."""
    raw = Raw(broker.address)
    raw.log_in(key_of(name), name.encode() + b" channel", behind=first)
    return raw


def asked(
    broker: Broker,
    name: str,
    to: str,
    payload: bytes = b"",
    *,
    message_id: int = 1,
    **how: Any,
) -> Raw:
    """Return a connection that has sent an OPEN."""
    return dialed(broker, name, packed(OPEN, to, payload, message_id=message_id, **how))


def joining(broker: Broker, name: str, token: int) -> Raw:
    """Return a connection that has sent a JOIN."""
    return dialed(broker, name, packed(JOIN, "", message_id=token))


def is_open(raw: Raw, peer: str, message_id: int) -> bool:
    """Wait for the answer to the first frame; return whether it is the right RECEIPT."""
    return raw.recv() == Frame(RECEIPT, 0, 0, peer, message_id, b"")


def is_refused(raw: Raw, code: str, message_id: int = 1) -> bool:
    """Wait for the answer and the end; return whether it is an ERROR of the broker."""
    frame = raw.recv()
    return (frame.name, frame.id, frame.code, raw.read_to_end()) == (
        "$broker",
        message_id,
        code,
        b"",
    )


@contextmanager
def channel(
    broker: Broker, caller: str, recipient: str, listener: Raw | None = None
) -> Iterator[tuple[Raw, Raw]]:
    """Open a channel; yield its ends."""
    with ExitStack() as stack:
        if listener is None:
            listener = stack.enter_context(listening(broker, recipient))
        calling = stack.enter_context(asked(broker, caller, recipient))
        request = listener.recv()
        assert (request.kind, request.name) == (OPEN, caller)
        answering = stack.enter_context(joining(broker, recipient, request.id))
        assert is_open(calling, recipient, 1)
        assert is_open(answering, caller, request.id)
        yield calling, answering
