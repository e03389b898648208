"""Received messages: the sender that the broker authenticated, and the payload.

The payload is decoded when it is first read. The module does no I/O: the faces define
subclasses that can answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol

from brokerd_client import codec as codecs
from brokerd_client._compat import slotted
from brokerd_client.errors import AlreadyAnswered, UndecodablePayload, WrongUse
from brokerd_client.wire.envelope import (
    MAX_DELAY,
    MAX_KEY_SIZE,
    MAX_TTL,
    CodecId,
    Kind,
    is_delay,
    is_key,
    is_ttl,
    ttl_extension,
)
from brokerd_client.wire.layout import RAW_CODEC, REQUEST_KIND

if TYPE_CHECKING:
    from brokerd_client.json_codec import JsonCodec

__all__ = [
    "VALUE_COST",
    "Delivery",
    "Message",
    "Owner",
    "Receipt",
    "extension_cost",
    "with_options",
    "with_time_limit",
]

#: Approximate memory of each value in an extension, in bytes.
VALUE_COST: Final = 64


class Owner(Protocol):
    """The client that received a message."""

    @property
    def allow_pickle_from(self) -> frozenset[str]:
        """Names whose pickled payloads may be decoded."""
        ...

    @property
    def json_codec(self) -> JsonCodec | None:
        """The JSON of connect(codec=...), or None."""
        ...


@slotted
@dataclass(frozen=True, init=False)
class Receipt:
    """The broker's confirmation that it has taken responsibility for a message.

    Attributes:
        id: The id of the message.
        to: Its recipient, or its topic.
    """

    id: int
    to: str

    def __init__(self, id: int, to: str) -> None:  # noqa: A002 - the name of the attribute
        _set_id(self, id)
        _set_to(self, to)


# The way around the frozen class that takes half of the time of object.__setattr__.
_set_id: Final = vars(Receipt)["id"].__set__
_set_to: Final = vars(Receipt)["to"].__set__


class Delivery:
    """The delivery of a stored message to a connection, which must acknowledge it.

    Attributes:
        seq: The number of the message in the mailbox.
        attempt: Which attempt to process it this is.
        connection: The number of the connection, counted by the client.
        settled: Whether it has been acknowledged.
    """

    __slots__ = ("attempt", "connection", "seq", "settled")

    def __init__(self, seq: int, attempt: int, connection: int) -> None:
        self.seq = seq
        self.attempt = attempt
        self.connection = connection
        self.settled = False


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
        "_delivery",
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
    #: Of a request: whether it has been answered.
    _answered: bool
    #: Of a request: whether its requester does not wait any more.
    _cancelled: bool
    #: Set when a request that has a ttl is received.
    _deadline: float
    #: Set when a message from the mailbox is received.
    _delivery: Delivery

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
        if kind == REQUEST_KIND:
            self._answered = self._cancelled = False

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
        if self.codec == RAW_CODEC:
            return self.body
        try:
            return self._payload
        except AttributeError:
            pass
        allow_pickle = (
            self.codec == CodecId.PICKLE
            and self.sender.partition("/")[0] in self._owner.allow_pickle_from
        )
        payload = self._payload = codecs.decode(
            self.codec, self.body, allow_pickle=allow_pickle, types=self._owner.json_codec
        )
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
        return self._kind == REQUEST_KIND and self._answered

    def mark_answered(self) -> None:
        """Record that the request's only answer was sent."""
        self._answered = True

    @property
    def cancelled(self) -> bool:
        """Whether the requester does not wait for the answer any more.

        It has cancelled the request, or the request's time is over. An answer is not
        sent then.
        """
        return self._kind == REQUEST_KIND and self._cancelled

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

    def is_over(self, now: float) -> bool:
        """Return whether the requester of this request does not wait any more."""
        return self._cancelled or getattr(self, "_deadline", now + 1) <= now

    def set_deadline(self, now: float) -> None:
        """Record that the message was received at ``now``, for its deadline."""
        ttl = None if self.extension is None else self.extension.get("ttl")
        if ttl is not None and (ttl <= MAX_TTL if type(ttl) is float else is_ttl(ttl)):
            self._deadline = now + ttl

    @property
    def seq(self) -> int:
        """The number of the message in the mailbox; 0 if it does not come from there."""
        return self._delivery.seq if hasattr(self, "_delivery") else 0

    @property
    def attempt(self) -> int:
        """Which attempt to process a message from the mailbox this is, from 1; else 0."""
        return self._delivery.attempt if hasattr(self, "_delivery") else 0

    @property
    def settled(self) -> bool:
        """Whether the message needs no acknowledgement, or has been acknowledged."""
        return not hasattr(self, "_delivery") or self._delivery.settled

    def unsettled_delivery(self) -> Delivery:
        """Return the delivery that is to be acknowledged.

        Raises WrongUse if the message is not from the mailbox, and AlreadyAnswered if it
        was acknowledged before.
        """
        if not hasattr(self, "_delivery"):
            raise WrongUse(
                f"a {self.kind.name} of {self.sender} can't be acknowledged: only messages from"
                " the mailbox are (message.seq is not 0)"
            )
        if self._delivery.settled:
            raise AlreadyAnswered(
                f"message {self.seq} of {self.sender} has been acknowledged: done, retry, failed"
                " or dead, once"
            )
        return self._delivery

    def require_unanswered(self) -> None:
        """Raise AlreadyAnswered if the request was answered before.

        Raises WrongUse if the message is not a request.
        """
        if self._kind != REQUEST_KIND:
            raise WrongUse(
                f"a {self.kind.name} of {self.sender} can't be answered: only a request gets an"
                " answer; use send()"
            )
        if self._answered:
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
    if (
        ttl is None
        and timeout is not None
        and (type(timeout) is float or is_ttl(timeout))
        and 0 < timeout <= MAX_TTL
    ):
        if not extension:
            return ttl_extension(timeout), timeout
        if "ttl" not in extension:
            return {**extension, "ttl": timeout}, timeout
    return with_options(extension, ttl), None


def with_options(
    extension: Mapping[str, Any] | None,
    ttl: float | None,
    dedup_key: str | None = None,
    delay: float | None = None,
) -> Mapping[str, Any] | None:
    """Return the extension with the options of a message added to it.

    Args:
        extension: The sender's JSON object, or None.
        ttl: The time to live, in seconds, or None.
        dedup_key: The key by which a mailbox knows the message again, or None.
        delay: Seconds until a mailbox delivers the message, or None.

    Returns:
        The extension; None if all are None.

    Raises:
        ValueError: An option is not within its range.
    """
    if ttl is not None:
        if not is_ttl(ttl) or ttl < 0:
            raise ValueError(f"{ttl!r:.40} is not a valid ttl: give seconds, from 0 to {MAX_TTL}")
        extension = {**(extension or {}), "ttl": ttl}
    if dedup_key is not None:
        if not is_key(dedup_key):
            raise ValueError(
                f"{dedup_key!r:.80} is not a valid dedup_key: give a text of 1 to {MAX_KEY_SIZE}"
                " bytes"
            )
        extension = {**(extension or {}), "key": dedup_key}
    if delay is not None:
        if not is_delay(delay):
            raise ValueError(
                f"{delay!r:.40} is not a valid delay: give seconds, from 0 to {MAX_DELAY}"
            )
        extension = {**(extension or {}), "delay": delay}
    return extension
