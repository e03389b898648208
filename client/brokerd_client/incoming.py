"""Frames out of the bytes of one connection: ordinary ones read in place, the others judged by wire.envelope. No I/O.

Rules: docs/protocol.md, "The header". Of a run of frames that are all of one size, as a busy sender's are, the fields
of each are taken by one struct, which costs half of what a frame alone does.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Final, Generic, TypeAlias, TypeVar

from brokerd_client.errors import FrameTooBig, MalformedEnvelope
from brokerd_client.message import Message, Owner
from brokerd_client.outgoing import remember
from brokerd_client.wire.envelope import Envelope, Kind, parse
from brokerd_client.wire.framing import frame_span

__all__ = ["MAX_FRAME", "Incoming", "Other"]

M = TypeVar("M", bound=Message)

#: Length and header of a frame, at once.
_PREFIX: Final = struct.Struct("!iBBBBQ")
#: The broker is trusted, and a frame's memory is taken only as its bytes come; more than this is nonsense.
MAX_FRAME: Final = 2**32
#: After so many messages of one size in a row, more are expected; so few are not worth it, nor are large ones.
_RUN: Final = 4
_RUN_MAX_SIZE: Final = 4096

_REPLY_KIND: Final = int(Kind.REPLY)
_EVENT_KIND: Final = int(Kind.EVENT)

#: Called, in order, with each frame that is neither MESSAGE nor REQUEST: a REPLY or EVENT as a message.
Other: TypeAlias = Callable[[M | Envelope], None]


class Incoming(Generic[M]):
    """The bytes of one connection after the other. message: the class of what is received."""

    __slots__ = ("_message", "_partial", "_runs", "_texts")

    def __init__(self, message: type[M]) -> None:
        self._message = message
        #: The beginning of a frame whose end has not come yet.
        self._partial = bytearray()
        self._texts: dict[bytes, str] = {}
        self._runs: dict[tuple[int, int], struct.Struct] = {}

    def reset(self) -> None:
        """Begin a connection."""
        self._partial = bytearray()

    def read(self, data: bytes, owner: Owner, messages: list[M], other: Other[M]) -> int:
        """Take in every whole frame; keep the beginning of the last one for the next time.

        MESSAGE and REQUEST are added to ``messages``, and are there also when a later frame raises RemoteError.
        Return how many bytes of frames that was, about.
        """
        position, end, size_before = 0, len(data), len(self._partial)
        if size_before:
            position = self._complete(data, owner, messages, other)
        unpack, texts, message_class, append = _PREFIX.unpack_from, self._texts, self._message, messages.append
        size_of_last = in_a_row = 0
        while position < end:
            if end - position >= 16:
                size, kind, flags, codec, name_size, id = unpack(data, position)
                body = position + 16 + name_size
                stop = position + 4 + size
                # The ordinary frame; whatever this turns away is judged by wire.envelope, below.
                if flags == 0 and 0 < kind < 4 and body <= stop <= end:
                    raw = data[position + 16 : body]
                    sender = texts.get(raw)
                    if sender is None:
                        sender = self._text(raw, id)
                    message = message_class(kind, id, sender, codec, data[body:stop], owner)
                    position = stop
                    if kind >= _REPLY_KIND:
                        other(message)
                        continue
                    append(message)
                    if size != size_of_last:
                        size_of_last, in_a_row = size, 0
                        continue
                    in_a_row += 1
                    if in_a_row >= _RUN:
                        position = self._run(data, stop - 4 - size, stop, owner, messages)
                        in_a_row = 0
                    continue
                if flags == 0 and kind == _EVENT_KIND and name_size and body < stop <= end:
                    first = body + 1 + data[body]
                    if first <= stop:
                        raw = data[position + 16 : body]
                        topic = data[body + 1 : first]
                        message = message_class(
                            kind,
                            id,
                            texts.get(raw) or self._text(raw, id),
                            codec,
                            data[first:stop],
                            owner,
                            texts.get(topic) or self._text(topic, id),
                        )
                        position = stop
                        other(message)
                        continue
            span = frame_span(data, position, end)
            if span is None:
                break
            first, size = span
            if size > MAX_FRAME:
                raise FrameTooBig(size, MAX_FRAME)
            if first + size > end:
                break
            position = first + size
            self._on_frame(data[first:position], owner, messages, other)
        if position < end:
            self._partial += data[position:] if position else data
        return size_before + position

    def _run(self, data: bytes, last: int, position: int, owner: Owner, messages: list[M]) -> int:
        """Take in the frames from ``position`` on that begin as the one at ``last`` does; return where they end.

        That one is an ordinary MESSAGE or REQUEST; so are those whose length, kind, flags, codec and length of the
        sender's name are the same.
        """
        size, kind, _, codec, name_size, _ = _PREFIX.unpack_from(data, last)
        step = position - last
        count = (len(data) - position) // step
        if count < _RUN or size > _RUN_MAX_SIZE:
            return position
        body_size = step - _PREFIX.size - name_size
        fields = self._runs.get((name_size, body_size))
        if fields is None:
            # The start, the id, the sender, the body.
            fields = struct.Struct(f"!8sQ{name_size}s{body_size}s")
            remember(self._runs, (name_size, body_size), fields)
        start = data[last : last + 8]
        message_class, append, before = self._message, messages.append, len(messages)
        new = message_class.__new__
        raw, sender = None, ""
        for begun, id, name, body in fields.iter_unpack(memoryview(data)[position : position + count * step]):
            if begun != start:
                break
            if name != raw:
                known = self._texts.get(name)
                sender = self._text(name, id) if known is None else known
                raw = name
            # What its __init__ does, without the call.
            message = new(message_class)
            message._kind = kind
            message.id = id
            message.sender = sender
            message.codec = codec
            message.body = body
            message._owner = owner
            message.topic = ""
            message.extension = None
            append(message)
        return position + (len(messages) - before) * step

    def _complete(self, data: bytes, owner: Owner, messages: list[M], other: Other[M]) -> int:
        """Finish the frame that began earlier, as far as ``data`` goes; return how much of ``data`` that took.

        Only what the frame lacks is added to it: joining whole reads would copy every byte twice.
        """
        partial, position = self._partial, 0
        while True:
            span = frame_span(partial, 0, len(partial))
            if span is None:
                missing = (4 if len(partial) < 4 else 12) - len(partial)
            else:
                first, size = span
                if size > MAX_FRAME:
                    raise FrameTooBig(size, MAX_FRAME)
                missing = first + size - len(partial)
                if missing == 0:
                    break
            taken = data[position : position + missing]
            if not taken:
                return position
            partial += taken
            position += len(taken)
        self._partial = bytearray()
        with memoryview(partial) as view:
            body = bytes(view[first:])
        self._on_frame(body, owner, messages, other)
        return position

    def _text(self, raw: bytes, id: int) -> str:
        try:
            text = raw.decode()
        except UnicodeDecodeError as error:
            raise MalformedEnvelope("a name or topic from the broker is not UTF-8", id) from error
        remember(self._texts, raw, text)
        return text

    def _on_frame(self, body: bytes, owner: Owner, messages: list[M], other: Other[M]) -> None:
        """Take in a frame that is out of the ordinary, or came in pieces."""
        envelope = parse(body)
        kind = envelope.kind
        if kind in (Kind.ERROR, Kind.RECEIPT, Kind.ACK):
            other(envelope)
            return
        message = self._message(
            kind,
            envelope.id,
            envelope.name,
            envelope.codec,
            envelope.payload,
            owner,
            envelope.topic,
            envelope.extension,
        )
        if kind in (Kind.REPLY, Kind.EVENT):
            other(message)
        else:
            messages.append(message)
