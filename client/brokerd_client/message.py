"""Received messages: the sender that the broker authenticated, and the payload.

The payload is decoded when it is first read. The module does no I/O: the faces define
subclasses that can answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol

from brokerd_client import codec as codecs
from brokerd_client._compat import slotted
from brokerd_client.errors import AlreadyAnswered, UndecodablePayload, WrongUse
from brokerd_client.wire.envelope import MAX_TTL, CodecId, Kind, is_ttl
from brokerd_client.wire.layout import REQUEST_KIND

__all__ = [
    "VALUE_COST",
    "Message",
    "Owner",
    "Receipt",
    "extension_cost",
    "with_time_limit",
    "with_ttl",
]

#: Approximate memory of each value in an extension, in bytes.
VALUE_COST: Final = 64


class Owner(Protocol):
    """The client that received a message."""

    @property
    def allow_pickle_from(self) -> frozenset[str]:
        """Names whose pickled payloads may be decoded."""
        ...


@slotted
@dataclass(frozen=True)
class Receipt:
    """The broker's confirmation that it has taken responsibility for a message.

    Attributes:
        id: The id of the message.
        to: Its recipient, or its topic.
    """

    id: int
    to: str


class Message:
    """A received MESSAGE, REQUEST, REPLY or EVENT.

    Attributes:
        sender: The address that the broker authenticated, ``name`` or
            ``name/instance``.
        id: The id that the sender gave the message.
        body: The payload's bytes, as sent.
        codec: The number of their encoding.
        topic: The topic of an EVENT, "" for other kinds.
        extension: The sender's JSON object, or None.
    """

    __slots__ = (
        "__weakref__",
        "_answered",
        "_cancelled",
        "_deadline",
        "_kind",
        "_owner",
        "_payload",
        "body",
        "codec",
        "extension",
        "id",
        "sender",
        "topic",
    )

    _payload: Any
    #: Set when the message has been answered.
    _answered: bool
    #: Set when its requester does not wait any more.
    _cancelled: bool
    #: Set when a request that has a ttl is received.
    _deadline: float

    def __init__(
        self,
        kind: int,
        message_id: int,
        sender: str,
        codec: int,
        body: bytes,
        owner: Owner,
        topic: str = "",
        extension: Mapping[str, Any] | None = None,
    ) -> None:
        self._kind = kind
        self.id = message_id
        self.sender = sender
        self.codec = codec
        self.body = body
        self._owner = owner
        self.topic = topic
        self.extension = extension

    @property
    def kind(self) -> Kind:
        """The kind of the frame."""
        return Kind(self._kind)

    @property
    def payload(self) -> Any:
        """The payload; it is decoded at the first access.

        Raises:
            UndecodablePayload: The payload does not fit its codec. Or it is a pickle,
                and ``allow_pickle_from`` does not name its sender. ``body`` can always
                be read.
        """
        try:
            return self._payload
        except AttributeError:
            pass
        allow_pickle = (
            self.codec == CodecId.PICKLE
            and self.sender.partition("/")[0] in self._owner.allow_pickle_from
        )
        payload = self._payload = codecs.decode(self.codec, self.body, allow_pickle=allow_pickle)
        return payload

    def text(self) -> str:
        """Return the payload as text.

        Returns:
            The content of a JSON string. For other payloads, the body read as UTF-8.

        Raises:
            UndecodablePayload: The body is not UTF-8.
        """
        if self.codec == CodecId.JSON:
            payload = self.payload
            if isinstance(payload, str):
                return payload
        try:
            return self.body.decode()
        except UnicodeDecodeError as error:
            raise UndecodablePayload("the payload is not UTF-8 text") from error

    @property
    def answered(self) -> bool:
        """Whether this client has answered the request."""
        return hasattr(self, "_answered")

    def mark_answered(self) -> None:
        """Record that the request's only answer was sent."""
        self._answered = True

    @property
    def cancelled(self) -> bool:
        """Whether the requester does not wait for the answer any more.

        It has cancelled the request, or the request's time is over. An answer is not
        sent then.
        """
        return hasattr(self, "_cancelled")

    def mark_cancelled(self) -> None:
        """Record that the requester does not wait any more."""
        self._cancelled = True

    @property
    def deadline(self) -> float | None:
        """When the requester stops waiting, at the latest; None if that is not known.

        It is a time of ``time.monotonic()``; of the event loop's clock for an asyncio
        client. The requester's own clock ends earlier by the time that the request
        travelled.
        """
        return getattr(self, "_deadline", None)

    def set_deadline(self, now: float) -> None:
        """Record that the message was received at ``now``, for its deadline."""
        ttl = None if self.extension is None else self.extension.get("ttl")
        if ttl is not None and is_ttl(ttl):
            self._deadline = now + ttl

    def require_unanswered(self) -> None:
        """Raise AlreadyAnswered if the request was answered before.

        Raises WrongUse if the message is not a request.
        """
        if self._kind != REQUEST_KIND:
            raise WrongUse(
                f"a {self.kind.name} of {self.sender} can't be answered: only a request gets an"
                " answer; use send()"
            )
        if self.answered:
            raise AlreadyAnswered(
                f"request {self.id} of {self.sender} has been answered: a request gets one answer"
            )

    def __len__(self) -> int:
        return len(self.body)

    def __bool__(self) -> bool:
        # A message with an empty body is still a message.
        return True

    def __repr__(self) -> str:
        about = f" topic={self.topic!r}" if self.topic else ""
        return f"<{self.kind.name} {self.id} from {self.sender!r}{about} {len(self.body)} bytes>"


def extension_cost(extension: Mapping[str, Any]) -> int:
    """Return the approximate memory of an extension in this process, in bytes."""
    cost = 0
    values: list[object] = [extension]
    while values:
        value = values.pop()
        cost += VALUE_COST
        if isinstance(value, Mapping):
            values += value.values()
            cost += sum(map(len, value))
        elif isinstance(value, list):
            values += value
        elif isinstance(value, str):
            cost += len(value)
    return cost


def with_time_limit(
    extension: Mapping[str, Any] | None, ttl: float | None, timeout: float | None
) -> tuple[Mapping[str, Any] | None, float | None]:
    """Return the extension of a request whose requester waits for ``timeout`` seconds.

    Without a time to live of its own, the request gets the timeout as one.

    Args:
        extension: The sender's JSON object, or None.
        ttl: The time to live, in seconds, or None.
        timeout: How long the requester waits, in seconds; None for no limit.

    Returns:
        The extension, None if it is empty; and the timeout, if it is the time to live.

    Raises:
        ValueError: The ttl is not a number from 0 to MAX_TTL.
    """
    if ttl is None and "ttl" not in (extension or {}) and is_ttl(timeout) and timeout:
        return {**(extension or {}), "ttl": timeout}, timeout
    return with_ttl(extension, ttl), None


def with_ttl(extension: Mapping[str, Any] | None, ttl: float | None) -> Mapping[str, Any] | None:
    """Return the extension with a time to live added to it.

    Args:
        extension: The sender's JSON object, or None.
        ttl: The time to live, in seconds, or None.

    Returns:
        The extension; None if both are None.

    Raises:
        ValueError: The ttl is not a number from 0 to MAX_TTL.
    """
    if ttl is None:
        return extension
    if not is_ttl(ttl) or ttl < 0:
        raise ValueError(f"{ttl!r:.40} is not a valid ttl: give seconds, from 0 to {MAX_TTL}")
    return {**(extension or {}), "ttl": ttl}
