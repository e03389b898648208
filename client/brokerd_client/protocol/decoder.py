"""Decoding of frames from the bytes of one connection. No I/O.

Rules: docs/protocol.md, "The header". Ordinary frames, receipts, and requests with the
usual ttl are read in place; wire.envelope checks the others. A busy sender's frames,
replies to it and receipts often come in a run of one size. One struct then reads the
fields of each frame, at half of the cost of a single frame.

A frame that is unreadable, or longer than this client accepts, is skipped and reported.
The connection can continue as long as the lengths of the frames are valid.
"""

from __future__ import annotations

import contextlib
import io
import struct
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, Final, Generic, NamedTuple, TypeVar, Union

from brokerd_client.errors import BrokerdError, FrameTooBig, MalformedEnvelope
from brokerd_client.message import VALUE_COST, Delivery, Message, Owner
from brokerd_client.protocol.effects import Effects
from brokerd_client.protocol.encoder import remember
from brokerd_client.wire.envelope import (
    BROKER,
    Envelope,
    head,
    is_address,
    lone_key,
    lone_ttl,
    split,
)
from brokerd_client.wire.framing import LENGTH, frame_span
from brokerd_client.wire.layout import (
    ACK_FLAG,
    EVENT_KIND,
    EXTENSION_FLAG,
    EXTENSION_LENGTH,
    FRAME_HEAD,
    FRAME_START,
    HEADER,
    MAX_HEAD_SIZE,
    MESSAGE_KIND,
    RAW_CODEC,
    RECEIPT_KIND,
    REPLY_KIND,
    REQUEST_KIND,
    SEQ,
    Kind,
)

__all__ = [
    "MAX_FRAME",
    "FrameDecoder",
    "FrameHandler",
    "ReceiptHandler",
    "ReplyHandler",
    "Unreadable",
]

M = TypeVar("M", bound=Message)

#: Longest frame that is skipped, in bytes. A longer length is an error that ends the
#: connection.
MAX_FRAME: Final = 2**32
#: Bytes. The payload of a longer frame that comes in pieces gets a buffer of its own,
#: and is not copied when it is complete.
_LARGE_FROM: Final = 2 * MAX_HEAD_SIZE
#: Messages of one size in a row after which a run is tried, and the fewest further
#: messages in it. Larger messages than the second limit, in bytes, are never read as a
#: run.
_MIN_RUN: Final = 4
_RUN_MAX_SIZE: Final = 4096

#: The kinds of frames that name a sender.
_FROM_SENDERS: Final = (Kind.MESSAGE, Kind.REQUEST, Kind.REPLY, Kind.EVENT, Kind.OPEN)

_FRAME_HEAD_SIZE: Final = FRAME_HEAD.size
_BROKER: Final = BROKER.encode()
#: A RECEIPT as brokers write it: the start of its frame, the id, the name; the start.
_RECEIPT: Final = struct.Struct(f"!8sQ{len(_BROKER)}s")
_RECEIPT_START: Final = FRAME_START.pack(
    _RECEIPT.size - LENGTH.size, RECEIPT_KIND, 0, RAW_CODEC, len(_BROKER)
)


class Unreadable(NamedTuple):
    """A skipped frame: the error, and the readable fields of its header.

    An unreadable kind is 0, an unreadable name is "".
    """

    error: BrokerdError
    kind: int
    id: int
    name: str


#: Called with a run of REPLYs, and the effects.
ReplyHandler = Callable[[Iterable[M], Effects[M]], None]
#: Called with the ids of a run of RECEIPTs, and the effects.
ReceiptHandler = Callable[[Iterable[int], Effects[M]], None]
#: Called with any other frame but MESSAGE and REQUEST, and the effects. An EVENT is
#: passed as a message.
FrameHandler = Callable[[Union[M, Envelope, Unreadable], Effects[M]], None]


class _LargeFrame:
    """A large frame that comes in pieces.

    Attributes:
        payload: None if the frame is skipped.
        size: Bytes of the frame.
        missing: Bytes still to come.
    """

    __slots__ = ("envelope", "missing", "payload", "size")

    def __init__(self, envelope: Envelope | None, size: int, missing: int) -> None:
        self.envelope = envelope
        self.payload = None if envelope is None else io.BytesIO()
        self.size = size
        self.missing = missing


class FrameDecoder(Generic[M]):
    """The decoder for a client's successive connections.

    The handlers are called in the order of the frames.

    Args:
        message: The class of received messages.
        largest: Longest accepted payload, in bytes.
        on_replies: Handles a run of REPLYs.
        on_receipts: Handles a run of RECEIPTs.
        on_frame: Handles every other frame but MESSAGE and REQUEST.
    """

    __slots__ = (
        "_extra",
        "_large",
        "_largest_body",
        "_last_ttl",
        "_message",
        "_on_other_frame",
        "_on_receipts",
        "_on_replies",
        "_partial",
        "_runs",
        "_senders",
        "_topics",
        "connection",
        "requests",
    )

    def __init__(
        self,
        message: type[M],
        largest: int,
        *,
        on_replies: ReplyHandler[M],
        on_receipts: ReceiptHandler[M],
        on_frame: FrameHandler[M],
    ) -> None:
        self._message = message
        self._on_replies = on_replies
        self._on_receipts = on_receipts
        self._on_other_frame = on_frame
        self.accept(largest)
        #: The first bytes of a frame that is not complete yet.
        self._partial = bytearray()
        self._large: _LargeFrame | None = None
        #: Memory that the extensions of the last frames cost beyond their length, in
        #: bytes.
        self._extra = 0
        #: Checked names and topics, by their bytes on the wire.
        self._senders: dict[bytes, str] = {}
        self._topics: dict[bytes, str] = {}
        self._runs: dict[tuple[int, int], struct.Struct] = {}
        #: The bytes of the last ttl that was an extension alone, and the ttl.
        self._last_ttl: tuple[bytes, float] = (b'{"ttl":0}', 0)
        #: The number of the connection, for deliveries.
        self.connection = 0
        #: The requests among the messages of the last call of ``read``.
        self.requests: list[M] = []

    def accept(self, largest: int) -> None:
        """Skip all later frames whose payload is longer than ``largest`` bytes.

        The header and extension of a frame may add up to MAX_HEAD_SIZE bytes.
        """
        self._largest_body = largest + MAX_HEAD_SIZE

    def reset(self) -> None:
        """Forget the incomplete frame, for a new connection."""
        self._partial = bytearray()
        self._large = None

    def take_begun(self) -> bytes:
        """Forget and return the bytes of a frame that has begun, unless it is long."""
        if not 0 < len(self._partial) <= _RUN_MAX_SIZE:
            return b""
        begun, self._partial = bytes(self._partial), bytearray()
        return begun

    @property
    def incomplete(self) -> bool:
        """Whether a frame is not complete yet."""
        return bool(self._partial) or self._large is not None

    @property
    def begun(self) -> int:
        """The bytes of a frame that has begun, unless it is long; else 0."""
        return len(self._partial) if len(self._partial) <= _RUN_MAX_SIZE else 0

    def read(self, data: bytes, owner: Owner, effects: Effects[M]) -> int:
        """Decode every complete frame; keep an incomplete one for the next call.

        MESSAGE and REQUEST are added to ``effects.messages``, and what comes from the
        mailbox to ``effects.stored``. They stay there if a later frame raises
        RemoteError. Return the approximate number of bytes of the frames.
        """
        self._extra = 0
        self.requests = []
        position, end, size_before = 0, len(data), 0
        if self._partial or self._large is not None:
            size_before = (
                len(self._partial)
                if self._large is None
                else self._large.size - self._large.missing
            )
            position = self._complete(data, owner, effects)
        unpack, senders, message_class, append, on_replies = (
            FRAME_HEAD.unpack_from,
            self._senders,
            self._message,
            effects.messages.append,
            self._on_replies,
        )
        size_of_last = in_a_row = 0
        while position < end:
            if end - position >= _FRAME_HEAD_SIZE:
                size, kind, flags, codec, name_size, message_id = unpack(data, position)
                body = position + _FRAME_HEAD_SIZE + name_size
                stop = position + 4 + size
                # The ordinary frame; wire.envelope checks all other frames, below.
                if flags == 0 and 0 < kind < 4 and body <= stop <= end:
                    raw = data[position + _FRAME_HEAD_SIZE : body]
                    sender = senders.get(raw)
                    if sender is None:
                        sender = self._sender(raw)
                    if sender:
                        message = message_class(
                            kind, message_id, sender, codec, data[body:stop], owner
                        )
                        if kind == REPLY_KIND:
                            on_replies((message,), effects)
                        else:
                            if kind != MESSAGE_KIND:
                                self.requests.append(message)
                            append(message)
                        if size != size_of_last:
                            size_of_last, in_a_row = size, 0
                        else:
                            in_a_row += 1
                            if in_a_row >= _MIN_RUN:
                                stop = self._run(data, position, body, stop, owner, effects)
                                in_a_row = 0
                        position = stop
                        continue
                elif flags == EXTENSION_FLAG and kind == REQUEST_KIND and body + 2 <= stop <= end:
                    raw = data[position + _FRAME_HEAD_SIZE : body]
                    payload_start = body + 2 + EXTENSION_LENGTH.unpack_from(data, body)[0]
                    extension = self._ttl(data[body + 2 : payload_start])
                    sender = senders.get(raw) or self._sender(raw)
                    if extension is not None and payload_start <= stop and sender:
                        message = message_class(
                            kind,
                            message_id,
                            sender,
                            codec,
                            data[payload_start:stop],
                            owner,
                            "",
                            extension,
                        )
                        self._extra += VALUE_COST * 2
                        self.requests.append(message)
                        append(message)
                        if size != size_of_last:
                            size_of_last, in_a_row = size, 0
                        else:
                            in_a_row += 1
                            if in_a_row >= _MIN_RUN:
                                stop = self._run(
                                    data, position, payload_start, stop, owner, effects
                                )
                                in_a_row = 0
                        position = stop
                        continue
                elif (
                    kind == RECEIPT_KIND
                    and stop <= end
                    and data.startswith(_RECEIPT_START, position)
                    and data.startswith(_BROKER, position + _FRAME_HEAD_SIZE)
                ):
                    position = self._read_receipts(data, position, effects)
                    continue
                elif flags == 0 and kind == EVENT_KIND and name_size and body < stop <= end:
                    payload_start = body + 1 + data[body]
                    raw, topic = (
                        data[position + _FRAME_HEAD_SIZE : body],
                        data[body + 1 : payload_start],
                    )
                    sender = senders.get(raw) or self._sender(raw)
                    about = self._topics.get(topic) or self._topic(topic)
                    if payload_start <= stop and sender and about:
                        message = message_class(
                            kind, message_id, sender, codec, data[payload_start:stop], owner, about
                        )
                        position = stop
                        self._on_other_frame(message, effects)
                        continue
                elif (
                    flags & ~EXTENSION_FLAG == ACK_FLAG
                    and kind == MESSAGE_KIND
                    and body + SEQ.size <= stop <= end
                ):
                    raw = data[position + _FRAME_HEAD_SIZE : body]
                    sender = senders.get(raw) or self._sender(raw)
                    payload_start, key = self._key(data, flags, body + SEQ.size, stop)
                    if sender and payload_start:
                        message = message_class(
                            kind,
                            message_id,
                            sender,
                            codec,
                            data[payload_start:stop],
                            owner,
                            "",
                            key,
                        )
                        seq, attempt = SEQ.unpack_from(data, body)
                        message._delivery = Delivery(seq, attempt, self.connection)
                        effects.stored.append(message)
                        position = stop
                        continue
            span = frame_span(data, position, end)
            if span is None:
                break
            body_start, size = span
            if size > MAX_FRAME:
                raise FrameTooBig(size, MAX_FRAME)
            if body_start + size > end or size > self._largest_body:
                if end - body_start < min(MAX_HEAD_SIZE, size):
                    break
                if size > _LARGE_FROM or size > self._largest_body:
                    self._large = self._begin(data, body_start, size, end, effects)
                    position = min(body_start + size, end)
                    continue
                break
            position = body_start + size
            self._on_frame(data[body_start:position], owner, effects)
        if position < end:
            self._partial += data[position:] if position else data
        return size_before + position + self._extra

    def lone_message(self, data: bytes, owner: Owner) -> M | None:
        """Return the MESSAGE, REQUEST or REPLY that the bytes are, if they are no more.

        The usual input of a client that works on one request at a time costs a third this
        way. None for any other bytes, and while a frame is not complete.
        """
        end = len(data)
        if end < _FRAME_HEAD_SIZE or self._partial or self._large is not None:
            return None
        size, kind, flags, codec, name_size, message_id = FRAME_HEAD.unpack_from(data)
        start = _FRAME_HEAD_SIZE + name_size
        if not start <= 4 + size == end:
            return None
        raw = data[_FRAME_HEAD_SIZE:start]
        sender = self._senders.get(raw) or self._sender(raw)
        if not sender:
            return None
        extension = None
        if flags == EXTENSION_FLAG and kind == REQUEST_KIND and start + 2 <= end:
            body = start + 2 + EXTENSION_LENGTH.unpack_from(data, start)[0]
            part = data[start + 2 : body]
            last_part, ttl = self._last_ttl
            extension = {"ttl": ttl} if part == last_part else self._ttl(part)
            if extension is None or body > end:
                return None
            start = body
        elif flags or not 0 < kind < 4:
            return None
        return self._message(kind, message_id, sender, codec, data[start:], owner, "", extension)

    def _key(
        self, data: bytes, flags: int, start: int, stop: int
    ) -> tuple[int, dict[str, Any] | None]:
        """Return (where the payload of a delivery begins, its extension).

        The extension is read if it is a key alone; else the payload is said to begin at 0.
        """
        if not flags & EXTENSION_FLAG:
            return start, None
        if start + 2 > stop:
            return 0, None
        payload_start = start + 2 + EXTENSION_LENGTH.unpack_from(data, start)[0]
        key = lone_key(data[start + 2 : payload_start]) if payload_start <= stop else None
        self._extra += VALUE_COST * 2
        return (0, None) if key is None else (payload_start, key)

    def _ttl(self, raw: bytes) -> dict[str, Any] | None:
        """Return the extension if it is a ttl alone, else None."""
        last_raw, ttl = self._last_ttl
        if raw == last_raw:
            # A new dict for each message: its recipient may change it.
            return {"ttl": ttl}
        extension = lone_ttl(raw)
        if extension is not None:
            self._last_ttl = raw, extension["ttl"]
        return extension

    def _read_receipts(self, data: bytes, position: int, effects: Effects[M]) -> int:
        """Pass on the run of ordinary RECEIPTs from ``position`` on; return where it ends."""
        step = _RECEIPT.size
        stop = position + (len(data) - position) // step * step
        ids = []
        with memoryview(data) as view, view[position:stop] as run:
            for start, message_id, name in _RECEIPT.iter_unpack(run):
                if start != _RECEIPT_START or name != _BROKER:
                    break
                ids.append(message_id)
        self._on_receipts(ids, effects)
        return position + len(ids) * step

    def _run(
        self,
        data: bytes,
        start: int,
        payload_start: int,
        stop: int,
        owner: Owner,
        effects: Effects[M],
    ) -> int:
        """Decode the run of frames behind the frame at ``start``; return where it ends.

        That frame is an ordinary MESSAGE, REQUEST or REPLY, or a REQUEST with a ttl. Its
        payload is from ``payload_start`` to ``stop``. The frames of the run are like it:
        length, kind, flags, codec, name length and extension are the same.
        """
        size, kind, _, codec, name_size, _ = FRAME_HEAD.unpack_from(data, start)
        step = stop - start
        count = (len(data) - stop) // step
        if count < _MIN_RUN or size > _RUN_MAX_SIZE:
            return stop
        head_size = payload_start - start - _FRAME_HEAD_SIZE
        fields = self._runs.get((head_size, stop - payload_start))
        if fields is None:
            # The start, the id, the sender and the extension, the body.
            fields = struct.Struct(f"!8sQ{head_size}s{stop - payload_start}s")
            remember(self._runs, (head_size, stop - payload_start), fields)
        run_start = data[start : start + 8]
        extension = data[start + _FRAME_HEAD_SIZE + name_size : payload_start]
        messages: list[M] = []
        message_class, append = self._message, messages.append
        new_message = message_class.__new__
        last_head, sender = None, ""
        for frame_start, message_id, head_fields, body in fields.iter_unpack(
            memoryview(data)[stop : stop + count * step]
        ):
            if frame_start != run_start:
                break
            if head_fields != last_head:
                name = head_fields[:name_size]
                sender = self._senders.get(name) or self._sender(name)
                if not sender or head_fields[name_size:] != extension:
                    break
                last_head = head_fields
            # The same as Message.__init__, without the cost of the call.
            message = new_message(message_class)
            message._kind = kind
            message.id = message_id
            message.sender = sender
            message.codec = codec
            message.body = body
            message._owner = owner
            message.topic = ""
            message.extension = None
            append(message)
        if kind == REPLY_KIND:
            self._on_replies(messages, effects)
        else:
            if kind == REQUEST_KIND:
                for request in messages:
                    request._answered = request._cancelled = False
                self.requests += messages
            if extension:
                for request in messages:
                    # A new dict for each, as above.
                    request.extension = self._ttl(extension[EXTENSION_LENGTH.size :])
                self._extra += VALUE_COST * 2 * len(messages)
            effects.messages += messages
        return stop + len(messages) * step

    def _complete(self, data: bytes, owner: Owner, effects: Effects[M]) -> int:
        """Continue an incomplete frame with ``data``; return how many bytes of ``data``
        it took.

        Only the frame's missing bytes are added: joining whole reads would copy every
        byte twice.
        """
        if self._large is not None:
            return self._collect(self._large, data, owner, effects)
        partial, position = self._partial, 0
        while True:
            span = frame_span(partial, 0, len(partial))
            if span is None:
                missing = (4 if len(partial) < 4 else 12) - len(partial)
            else:
                body_start, size = span
                if size > MAX_FRAME:
                    raise FrameTooBig(size, MAX_FRAME)
                large = size > _LARGE_FROM or size > self._largest_body
                missing = body_start + (min(MAX_HEAD_SIZE, size) if large else size) - len(partial)
                if missing <= 0:
                    break
            piece = data[position : position + missing]
            if not piece:
                return position
            partial += piece
            position += len(piece)
        self._partial = bytearray()
        if large:
            large_frame = self._large = self._begin(
                partial, body_start, size, len(partial), effects
            )
            if large_frame is not None:
                position += self._collect(large_frame, memoryview(data)[position:], owner, effects)
            return position
        with memoryview(partial) as view, view[body_start:] as body:
            self._on_frame(body, owner, effects)
        return position

    def _begin(
        self,
        data: bytes | bytearray,
        body_start: int,
        size: int,
        end: int,
        effects: Effects[M],
    ) -> _LargeFrame | None:
        """Begin a large frame whose body starts at ``body_start``; its header has to be
        complete.

        Return the frame, or None if it is complete. Only a skipped frame can be
        complete here.
        """
        stop = min(body_start + size, end)
        with memoryview(data) as view, view[body_start:stop] as body:
            if size > self._largest_body:
                self._skip_long(body, size, effects)
                large = _LargeFrame(None, size, size - len(body))
            else:
                envelope, start = self._split(body, effects)
                large = _LargeFrame(envelope, size, size - len(body))
                if large.payload is not None:
                    large.payload.write(body[start:])
        return large if large.missing else None

    def _skip_long(self, body: memoryview, size: int, effects: Effects[M]) -> None:
        """Report a frame that is longer than the limit.

        Raises FrameTooBig if its header is not valid.
        """
        error = FrameTooBig(size, self._largest_body)
        try:
            envelope = head(body)
        except MalformedEnvelope:
            raise error from None
        if not is_address(envelope.name):
            raise error
        self._on_other_frame(Unreadable(error, envelope.kind, envelope.id, envelope.name), effects)

    def _collect(
        self,
        large: _LargeFrame,
        data: bytes | memoryview,
        owner: Owner,
        effects: Effects[M],
    ) -> int:
        """Add bytes of ``data`` to the large frame; return how many bytes it took."""
        count = min(large.missing, len(data))
        large.missing -= count
        if large.payload is not None:
            with memoryview(data) as view, view[:count] as piece:
                large.payload.write(piece)
        if not large.missing:
            self._large = None
            if large.payload is not None:
                assert large.envelope is not None
                # getvalue() returns the buffer's own bytes, without a copy.
                self._pass_on(large.envelope, large.payload.getvalue(), owner, effects)
        return count

    def _sender(self, raw: bytes) -> str:
        """Return the sender's name, or "" if it is not valid."""
        text = str(raw, "utf-8", "replace")
        if not is_address(text):
            return ""
        remember(self._senders, raw, text)
        return text

    def _topic(self, raw: bytes) -> str:
        """Return the topic, or "" if it is not UTF-8."""
        try:
            text = raw.decode()
        except UnicodeDecodeError:
            return ""
        remember(self._topics, raw, text)
        return text

    def _on_frame(
        self,
        body: bytes | memoryview,
        owner: Owner,
        effects: Effects[M],
    ) -> None:
        """Decode a frame that is not ordinary, or came in pieces."""
        envelope, start = self._split(body, effects)
        if envelope is not None:
            self._pass_on(envelope, bytes(body[start:]), owner, effects)

    def _split(self, body: bytes | memoryview, effects: Effects[M]) -> tuple[Envelope | None, int]:
        """Return (the envelope, where the payload begins).

        An invalid frame is skipped and reported; the envelope is then None.
        """
        try:
            envelope, start = split(body)
            if envelope.kind in _FROM_SENDERS:
                if not is_address(envelope.name):
                    raise MalformedEnvelope("the sender's name is not valid", envelope.id)
                if envelope.kind is Kind.EVENT and not envelope.topic:
                    raise MalformedEnvelope("the topic is empty", envelope.id)
            elif envelope.kind in (Kind.ACK, Kind.JOIN):
                raise MalformedEnvelope(f"the broker sends no {envelope.kind.name}", envelope.id)
        except MalformedEnvelope as error:
            self._skip(body, error, effects)
            return None, 0
        if envelope.extension is not None:
            with memoryview(body) as view:
                raw = bytes(view[HEADER.size : start])
            self._extra += VALUE_COST * sum(map(raw.count, (b",", b":", b"[", b"{")))
        return envelope, start

    def _skip(self, body: bytes | memoryview, error: BrokerdError, effects: Effects[M]) -> None:
        """Report a frame that is skipped."""
        kind = message_id = 0
        name = ""
        if len(body) >= HEADER.size:
            kind, _, _, _, message_id = HEADER.unpack_from(body)
            with contextlib.suppress(MalformedEnvelope):
                name = head(body).name
        self._on_other_frame(Unreadable(error, kind, message_id, name), effects)

    def _pass_on(
        self,
        envelope: Envelope,
        payload: bytes,
        owner: Owner,
        effects: Effects[M],
    ) -> None:
        kind = envelope.kind
        if kind in (Kind.ERROR, Kind.RECEIPT, Kind.OPEN):
            self._on_other_frame(
                replace(envelope, payload=payload) if payload else envelope, effects
            )
            return
        message = self._message(
            kind,
            envelope.id,
            envelope.name,
            envelope.codec,
            payload,
            owner,
            envelope.topic,
            envelope.extension,
        )
        if kind is Kind.REPLY:
            self._on_replies((message,), effects)
        elif envelope.flags & ACK_FLAG and kind is not Kind.REQUEST:
            message._delivery = Delivery(envelope.seq, envelope.attempt, self.connection)
            effects.stored.append(message)
        elif kind is Kind.EVENT:
            self._on_other_frame(message, effects)
        else:
            effects.messages.append(message)
            if kind is Kind.REQUEST:
                self.requests.append(message)
