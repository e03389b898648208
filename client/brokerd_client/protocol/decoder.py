"""Decoding of frames from the bytes of one connection. No I/O.

Rules: docs/protocol.md, "The header". Ordinary frames are read in place; wire.envelope
checks the others. A busy sender's frames often come in a run of one size. One struct
then reads the fields of each frame, at half of the cost of a single frame.

A frame that is unreadable, or longer than this client accepts, is skipped and reported.
The connection can continue as long as the lengths of the frames are valid.
"""

from __future__ import annotations

import contextlib
import io
import struct
from collections.abc import Callable
from dataclasses import replace
from typing import Final, Generic, NamedTuple, TypeVar, Union

from brokerd_client.errors import BrokerdError, FrameTooBig, MalformedEnvelope
from brokerd_client.message import VALUE_COST, Message, Owner
from brokerd_client.protocol.encoder import remember
from brokerd_client.wire.envelope import Envelope, head, is_address, split
from brokerd_client.wire.framing import frame_span
from brokerd_client.wire.layout import (
    EVENT_KIND,
    FRAME_HEAD,
    HEADER,
    MAX_HEAD_SIZE,
    MESSAGE_KIND,
    REPLY_KIND,
    REQUEST_KIND,
    Kind,
)

__all__ = ["MAX_FRAME", "FrameDecoder", "FrameHandler", "Unreadable"]

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

_FRAME_HEAD_SIZE: Final = FRAME_HEAD.size


class Unreadable(NamedTuple):
    """A skipped frame: the error, and the readable fields of its header.

    An unreadable kind is 0, an unreadable name is "".
    """

    error: BrokerdError
    kind: int
    id: int
    name: str


#: Called, in order, with each frame that is neither MESSAGE nor REQUEST. A REPLY or
#: EVENT is passed as a message.
FrameHandler = Callable[[Union[M, Envelope, Unreadable]], None]


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

    Args:
        message: The class of received messages.
        largest: Longest accepted payload, in bytes.
    """

    __slots__ = (
        "_extra",
        "_large",
        "_largest_body",
        "_message",
        "_partial",
        "_runs",
        "_senders",
        "_topics",
        "requests",
    )

    def __init__(self, message: type[M], largest: int) -> None:
        self._message = message
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

    def read(
        self, data: bytes, owner: Owner, messages: list[M], handle_frame: FrameHandler[M]
    ) -> int:
        """Decode every complete frame; keep an incomplete one for the next call.

        MESSAGE and REQUEST are added to ``messages``. They stay there if a later frame
        raises RemoteError. Return the approximate number of bytes of the frames.
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
            position = self._complete(data, owner, messages, handle_frame)
        unpack, senders, message_class, append = (
            FRAME_HEAD.unpack_from,
            self._senders,
            self._message,
            messages.append,
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
                        position = stop
                        if kind != MESSAGE_KIND:
                            if kind == REPLY_KIND:
                                handle_frame(message)
                                continue
                            self.requests.append(message)
                        append(message)
                        if size != size_of_last:
                            size_of_last, in_a_row = size, 0
                            continue
                        in_a_row += 1
                        if in_a_row >= _MIN_RUN:
                            position = self._run(data, stop - 4 - size, stop, owner, messages)
                            in_a_row = 0
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
                        handle_frame(message)
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
                    self._large = self._begin(data, body_start, size, end, handle_frame)
                    position = min(body_start + size, end)
                    continue
                break
            position = body_start + size
            self._on_frame(data[body_start:position], owner, messages, handle_frame)
        if position < end:
            self._partial += data[position:] if position else data
        return size_before + position + self._extra

    def _run(
        self, data: bytes, last_start: int, position: int, owner: Owner, messages: list[M]
    ) -> int:
        """Decode the run of frames from ``position`` on; return where the run ends.

        The frame at ``last_start`` is an ordinary MESSAGE or REQUEST. The frames of the
        run have the same length, kind, flags, codec and name length, so they are
        ordinary too.
        """
        size, kind, _, codec, name_size, _ = FRAME_HEAD.unpack_from(data, last_start)
        step = position - last_start
        count = (len(data) - position) // step
        if count < _MIN_RUN or size > _RUN_MAX_SIZE:
            return position
        body_size = step - _FRAME_HEAD_SIZE - name_size
        fields = self._runs.get((name_size, body_size))
        if fields is None:
            # The start, the id, the sender, the body.
            fields = struct.Struct(f"!8sQ{name_size}s{body_size}s")
            remember(self._runs, (name_size, body_size), fields)
        run_start = data[last_start : last_start + 8]
        message_class, append, count_before = self._message, messages.append, len(messages)
        new_message = message_class.__new__
        raw, sender = None, ""
        for frame_start, message_id, name, body in fields.iter_unpack(
            memoryview(data)[position : position + count * step]
        ):
            if frame_start != run_start:
                break
            if name != raw:
                sender = self._senders.get(name) or self._sender(name)
                if not sender:
                    break
                raw = name
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
        if kind == REQUEST_KIND:
            self.requests += messages[count_before:]
        return position + (len(messages) - count_before) * step

    def _complete(
        self, data: bytes, owner: Owner, messages: list[M], handle_frame: FrameHandler[M]
    ) -> int:
        """Continue an incomplete frame with ``data``; return how many bytes of ``data``
        it took.

        Only the frame's missing bytes are added: joining whole reads would copy every
        byte twice.
        """
        if self._large is not None:
            return self._collect(self._large, data, owner, messages, handle_frame)
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
                partial, body_start, size, len(partial), handle_frame
            )
            if large_frame is not None:
                position += self._collect(
                    large_frame, memoryview(data)[position:], owner, messages, handle_frame
                )
            return position
        with memoryview(partial) as view, view[body_start:] as body:
            self._on_frame(body, owner, messages, handle_frame)
        return position

    def _begin(
        self,
        data: bytes | bytearray,
        body_start: int,
        size: int,
        end: int,
        handle_frame: FrameHandler[M],
    ) -> _LargeFrame | None:
        """Begin a large frame whose body starts at ``body_start``; its header has to be
        complete.

        Return the frame, or None if it is complete. Only a skipped frame can be
        complete here.
        """
        stop = min(body_start + size, end)
        with memoryview(data) as view, view[body_start:stop] as body:
            if size > self._largest_body:
                self._skip_long(body, size, handle_frame)
                large = _LargeFrame(None, size, size - len(body))
            else:
                envelope, start = self._split(body, handle_frame)
                large = _LargeFrame(envelope, size, size - len(body))
                if large.payload is not None:
                    large.payload.write(body[start:])
        return large if large.missing else None

    def _skip_long(self, body: memoryview, size: int, handle_frame: FrameHandler[M]) -> None:
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
        handle_frame(Unreadable(error, envelope.kind, envelope.id, envelope.name))

    def _collect(
        self,
        large: _LargeFrame,
        data: bytes | memoryview,
        owner: Owner,
        messages: list[M],
        handle_frame: FrameHandler[M],
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
                self._pass_on(
                    large.envelope, large.payload.getvalue(), owner, messages, handle_frame
                )
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
        messages: list[M],
        handle_frame: FrameHandler[M],
    ) -> None:
        """Decode a frame that is not ordinary, or came in pieces."""
        envelope, start = self._split(body, handle_frame)
        if envelope is not None:
            self._pass_on(envelope, bytes(body[start:]), owner, messages, handle_frame)

    def _split(
        self, body: bytes | memoryview, handle_frame: FrameHandler[M]
    ) -> tuple[Envelope | None, int]:
        """Return (the envelope, where the payload begins).

        An invalid frame is skipped and reported; the envelope is then None.
        """
        try:
            envelope, start = split(body)
            if envelope.kind in (Kind.MESSAGE, Kind.REQUEST, Kind.REPLY, Kind.EVENT):
                if not is_address(envelope.name):
                    raise MalformedEnvelope("the sender's name is not valid", envelope.id)
                if envelope.kind is Kind.EVENT and not envelope.topic:
                    raise MalformedEnvelope("the topic is empty", envelope.id)
            elif envelope.kind is Kind.ACK:
                raise MalformedEnvelope("the broker sends no ACK", envelope.id)
        except MalformedEnvelope as error:
            self._skip(body, error, handle_frame)
            return None, 0
        if envelope.extension is not None:
            with memoryview(body) as view:
                raw = bytes(view[HEADER.size : start])
            self._extra += VALUE_COST * sum(map(raw.count, (b",", b":", b"[", b"{")))
        return envelope, start

    def _skip(
        self, body: bytes | memoryview, error: BrokerdError, handle_frame: FrameHandler[M]
    ) -> None:
        """Report a frame that is skipped."""
        kind = message_id = 0
        name = ""
        if len(body) >= HEADER.size:
            kind, _, _, _, message_id = HEADER.unpack_from(body)
            with contextlib.suppress(MalformedEnvelope):
                name = head(body).name
        handle_frame(Unreadable(error, kind, message_id, name))

    def _pass_on(
        self,
        envelope: Envelope,
        payload: bytes,
        owner: Owner,
        messages: list[M],
        handle_frame: FrameHandler[M],
    ) -> None:
        kind = envelope.kind
        if kind in (Kind.ERROR, Kind.RECEIPT):
            handle_frame(replace(envelope, payload=payload) if payload else envelope)
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
        if kind in (Kind.REPLY, Kind.EVENT):
            handle_frame(message)
        else:
            messages.append(message)
            if kind is Kind.REQUEST:
                self.requests.append(message)
