"""Taps: copies of what passes, for administrators that watch.

A tap looks at frames after they have been routed, in the buffer that they were read
into. Without a tap, that costs one look at ``active`` for each read. With taps, a
limited number of frames is looked at per second; the rest passes unseen, and is
counted. A copy for which the watching connection has no room is dropped, and counted.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from brokerd.config.values import TapScope
from brokerd_client.errors import BadLength
from brokerd_client.topics import matches
from brokerd_client.wire.envelope import Kind, head
from brokerd_client.wire.framing import frame_span
from brokerd_client.wire.layout import EXTENSION_FLAG, HEADER

if TYPE_CHECKING:
    from brokerd.core.exchange import Exchange
    from brokerd.core.session import Session

__all__ = ["MOST", "ROOM", "TOPIC", "Tap", "Taps"]

#: The topic of the events that carry copies. Only the connection that taps gets them.
TOPIC: Final = "$broker.tap"
#: Most taps at once.
MOST: Final = 8
#: Most frames looked at per second, in all: some five percent of one processor.
_LOOKED_AT: Final = 4000
#: Most copies kept per tap until they are sent.
_KEPT: Final = 256
#: Most bytes of a payload that a copy has.
_PAYLOAD: Final = 1024
#: Bytes that may wait for a connection that taps before its copies are dropped.
ROOM: Final = 256 * 1024
#: Most remembered answers to whether a tap's pattern matches.
_REMEMBERED: Final = 1024
#: Bytes of a frame that are looked at: the longest name, topic and extension that are
#: likely, and a payload.
_HEAD: Final = 4096
#: Bytes of the length before a frame.
_PREFIX: Final = 4
#: An id, and a recipient's name or a topic.
_Key: TypeAlias = tuple[int, str]
_KINDS: Final = {kind.value: kind.name.lower() for kind in Kind}


@dataclass(slots=True)
class _Seen:
    """A frame that was looked at. payload: its first bytes; size: all of them."""

    kind: str
    id: int
    recipient: str
    topic: str
    size: int
    codec: int
    payload: bytes
    outcome: str = ""

    @property
    def key(self) -> _Key:
        """Return what a refusal of the frame is noted under."""
        return self.id, self.topic or self.recipient.partition("/")[0]


@dataclass(slots=True)
class Tap:
    """One connection that watches.

    Attributes:
        pattern: A topic pattern, or a shell-style pattern of names.
        payload: Whether payloads are wanted.
        copies: Those that have not been sent yet.
        copied: The number of copies made.
        dropped: Copies that did not fit.
        unseen: Frames that passed too fast to be looked at.
    """

    pattern: str
    payload: bool
    copies: list[dict[str, Any]] = field(default_factory=list)
    copied: int = 0
    dropped: int = 0
    unseen: int = 0
    _known: dict[tuple[str, str, str], bool] = field(default_factory=dict)

    def wants(self, sender: str, recipient: str, topic: str) -> bool:
        """Return whether the pattern matches a client at either end, or the topic."""
        key = (sender, recipient, topic)
        known = self._known.get(key)
        if known is None:
            if len(self._known) >= _REMEMBERED:
                self._known.clear()
            names = (sender, sender.partition("/")[0], recipient, recipient.partition("/")[0])
            known = any(fnmatchcase(name, self.pattern) for name in names if name) or (
                bool(topic) and (matches(self.pattern, topic) or topic == self.pattern)
            )
            self._known[key] = known
        return known

    def add(self, copy: dict[str, Any]) -> None:
        """Keep a copy until it is sent, if there is room."""
        self.copied += 1
        if len(self.copies) < _KEPT:
            self.copies.append(copy)
        else:
            self.dropped += 1

    def counts(self) -> dict[str, Any]:
        """Return the pattern and the counts, as the operation ``tap`` shows them."""
        return {
            "pattern": self.pattern,
            "copied": self.copied,
            "dropped": self.dropped,
            "unseen": self.unseen,
        }

    def take(self) -> bytes:
        """Return the kept copies and the counts as JSON, and forget the copies."""
        copies, self.copies = self.copies, []
        return json.dumps({"copies": copies, **self.counts()}).encode()


class Taps:
    """All taps.

    Attributes:
        active: Whether there is any.
        all: The taps by the connection that watches.
    """

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self.active = False
        self.all: dict[Session, Tap] = {}
        #: The sender whose frames are being routed, and where they begin: see ``begin``.
        self._source: Session | None = None
        self._position = self._count = 0
        self._head = b""
        #: The codes of what was refused to it meanwhile.
        self._refused: dict[_Key, list[str]] = {}
        #: When the current second began, and the frames still to be looked at in it.
        self._second = 0.0
        self._left = _LOOKED_AT

    def start(self, session: Session, pattern: str, *, payload: bool) -> Tap:
        """Begin a tap, or change the one that a connection has."""
        tap = self.all.get(session)
        if tap is None or (tap.pattern, tap.payload) != (pattern, payload):
            tap = self.all[session] = Tap(pattern, payload)
        self.active = True
        return tap

    def stop(self, session: Session) -> Tap | None:
        """End a connection's tap, and return it."""
        tap = self.all.pop(session, None)
        self.active = bool(self.all)
        return tap

    # Upgrades

    def capture(self) -> Iterator[tuple[Session, list[Any]]]:
        """Yield each connection that watches, with its tap as plain values.

        Copies that were not sent are counted as dropped.
        """
        for session, tap in self.all.items():
            dropped = tap.dropped + len(tap.copies)
            yield session, [tap.pattern, tap.payload, tap.copied, dropped, tap.unseen]

    def restore(self, session: Session, values: Sequence[Any]) -> None:
        """Continue a tap of another process."""
        pattern, payload, copied, dropped, unseen = values
        self.all[session] = Tap(pattern, payload, [], copied, dropped, unseen)
        self.active = True

    # Frames

    def begin(self, source: Session, view: memoryview, start: int, now: float) -> None:
        """Note where the frames of a sender begin that are about to be routed."""
        if now - self._second >= 1:
            self._second, self._left = now, _LOOKED_AT
        self._source = source
        self._position = start + source.bytes_to_skip
        self._count = source.messages_in
        self._refused.clear()
        # The head of a large frame is overwritten when that is passed on.
        self._head = bytes(view[self._position : self._position + _HEAD])

    def end(self, view: memoryview, position: int) -> None:
        """Copy the frames up to ``position``, which have been routed or refused."""
        source, self._source = self._source, None
        if source is None:
            return
        seen: list[_Seen] = []
        for body, size in self._frames(view, position):
            if not self._left:
                break
            self._left -= 1
            seen.append(_read(body, size))
        # Of equal frames, the last ones were refused: a queue became full meanwhile.
        for frame in reversed(seen):
            codes = self._refused.get(frame.key)
            frame.outcome = codes.pop() if codes else "accepted"
        for frame in seen:
            self._copy(source, frame)
        for (message_id, name), codes in self._refused.items():
            for code in codes:
                self._report(source.address, name, message_id, code)
        # A held frame counts when it is tried first, and is seen when it has passed.
        unseen = source.messages_in - self._count - len(seen)
        for tap in self.all.values():
            tap.unseen = max(0, tap.unseen + unseen)

    def note_refusal(self, source: Session, message_id: int, name: str, code: str) -> None:
        """Note that a message was refused. name: its recipient or its topic."""
        if source is self._source:
            key = message_id, name.partition("/")[0]
            self._refused.setdefault(key, []).append(code)
        else:
            self._report(source.address, name, message_id, code)

    def note_drop(self, sender: str, recipient: str, message_id: int | None, code: str) -> None:
        """Note that a message was dropped without an error to its sender."""
        self._report(sender, recipient, message_id, code)

    def note_stored(self, frame: bytes, recipient: str, outcome: str, reason: str = "") -> None:
        """Note what became of a stored message. frame: that of its delivery."""
        if not self._left:
            for tap in self.all.values():
                tap.unseen += 1
            return
        self._left -= 1
        envelope = head(memoryview(frame)[_PREFIX:])
        more = {"seq": envelope.seq, **({"reason": reason} if reason else {})}
        self._report(
            envelope.name, recipient, envelope.id, outcome, topic=envelope.topic, more=more
        )

    def _frames(self, view: memoryview, position: int) -> Iterator[tuple[memoryview, int]]:
        """Yield the first bytes of each frame's body, and the body's size."""
        at = self._position
        # Behind ``position`` there may be bytes of another connection.
        head = memoryview(self._head)[: max(0, position - at)]
        while at < position:
            try:
                span = frame_span(head, 0, len(head))
            except BadLength:
                return
            if span is None or span[1] < HEADER.size or span[0] + HEADER.size > len(head):
                return
            first, size = span
            yield head[first : first + size], size
            at += first + size
            head = view[at : min(at + _HEAD, position)]

    def _copy(self, source: Session, frame: _Seen) -> None:
        """Give a copy of a frame to each tap whose pattern matches."""
        for tap in self.all.values():
            if tap.wants(source.address, frame.recipient, frame.topic):
                copy = {
                    "sender": source.address,
                    "recipient": frame.recipient or None,
                    "topic": frame.topic or None,
                    "kind": frame.kind,
                    "id": frame.id,
                    "size": frame.size,
                    "outcome": frame.outcome,
                }
                if tap.payload and self._may_show(source, frame.recipient):
                    copy |= _shown(frame)
                tap.add(copy)

    def _may_show(self, source: Session, recipient: str) -> bool:
        """Return whether the sender or the recipient lets payloads be shown."""
        if source.client.config.tap is TapScope.PAYLOAD:
            return True
        other = self._exchange.resolve(recipient.partition("/")[0])
        return other is not None and other.config.tap is TapScope.PAYLOAD

    def _report(
        self,
        sender: str,
        name: str,
        message_id: int | None,
        code: str,
        *,
        topic: str = "",
        more: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        """Tell of a message that was accepted earlier, and what becomes of it now."""
        for tap in self.all.values():
            if tap.wants(sender, name, topic or name):
                tap.add(
                    {
                        "sender": sender,
                        "recipient": name or None,
                        "topic": topic or None,
                        "kind": "outcome",
                        "id": message_id,
                        "size": 0,
                        "outcome": code,
                        **more,
                    }
                )


def _read(body: memoryview, size: int) -> _Seen:
    """Return a frame as far as its first bytes tell. size: of its whole body."""
    kind, flags, codec, name_size, message_id = HEADER.unpack_from(body)
    at = HEADER.size + name_size
    recipient = bytes(body[HEADER.size : at]).decode("ascii", "replace")
    topic = ""
    if kind == Kind.EVENT and at < len(body):
        topic_end = at + 1 + body[at]
        topic = bytes(body[at + 1 : topic_end]).decode("utf-8", "replace")
        at = topic_end
    if flags & EXTENSION_FLAG and at + 2 <= len(body):
        at += 2 + int.from_bytes(body[at : at + 2], "big")
    return _Seen(
        _KINDS.get(kind, str(kind)),
        message_id,
        recipient,
        topic,
        max(0, size - at),
        codec,
        bytes(body[at : at + _PAYLOAD]),
    )


def _shown(frame: _Seen) -> dict[str, Any]:
    """Return the payload as text, or in base64 if it is not text."""
    codec = {"codec": frame.codec}
    try:
        return {**codec, "payload": frame.payload.decode()}
    except UnicodeDecodeError as error:
        if frame.size > len(frame.payload) and error.end >= len(frame.payload):
            # The first bytes of a character were kept, and the others were not.
            return {**codec, "payload": frame.payload[: error.start].decode()}
        return {**codec, "base64": base64.b64encode(frame.payload).decode()}
