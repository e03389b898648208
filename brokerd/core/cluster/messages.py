"""The messages between two hosts, as bytes. Numbers are in network byte order.

Each begins with the version of this format, the sender's boot id and the recipient's boot
id. The latter is 0 in a message to all. The last token of the subject is its kind:

    join, hello  to all: JSON, the facts of the host; ``join`` before it takes part
    changes      to all: JSON, numbered changes of names and interests
    bye          to all: the host stops
    ask, state   a request for all names and interests; JSON, a part of the answer
    ping, pong   liveness, and the numbers that the other half should know
    data         a batch: its number, the last outcomes received, runs
    outcomes     a number, ranges of batches that are done, of batches never seen, runs
    inquiry      the last outcomes received, and batches without an answer
    answer       the first outcomes that are still known, and batches that still wait
    tell         JSON, from one broker to the other
    hold, held   the sender is being replaced: send nothing until its next ping; agreed
    bundle       several of the kinds data and outcomes (:mod:`.bundles`)

The generation of a link counts how often its sender has begun it. Batches and outcomes
are numbered from 1 within it.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final, NamedTuple, TypeAlias

from brokerd.core.cluster.seam import Run
from brokerd_client.errors import BadLength
from brokerd_client.wire.envelope import HEADER
from brokerd_client.wire.framing import frame_span
from brokerd_client.wire.layout import ACK_FLAG, EVENT_KIND

__all__ = [
    "HEADER_SIZE",
    "HEAD_SIZE",
    "RUN_OVERHEAD",
    "VERSION",
    "Answer",
    "Data",
    "Head",
    "Inquiry",
    "Malformed",
    "Outcomes",
    "Ping",
    "Pong",
    "bytes_of",
    "decode_json",
    "encode_json",
    "frames_of",
    "head_of",
    "key_of",
    "pack",
    "size_of",
]

#: The version of this format. Brokers with different versions do not talk.
VERSION: Final = 3

_HEAD: Final = struct.Struct("!BQQ")
_RUN: Final = struct.Struct("!HII")
_DATA: Final = struct.Struct("!QQQ")
_OUTCOMES: Final = struct.Struct("!QQII")
_INQUIRY: Final = struct.Struct("!QQQI")
_ANSWER: Final = struct.Struct("!QQQQI")
_PING: Final = struct.Struct("!QQQ")
_PONG: Final = struct.Struct("!QQQQ?")
_NUMBER: Final = struct.Struct("!Q")
_RANGE: Final = struct.Struct("!QQ")

#: Bytes of what all messages begin with.
HEADER_SIZE: Final = _HEAD.size
#: Bytes of a message before its runs, with room for some ranges.
HEAD_SIZE: Final = _HEAD.size + _OUTCOMES.size
#: Bytes of a run beside its target and its frames.
RUN_OVERHEAD: Final = _RUN.size
_MOST_RANGES: Final = 1_000_000

#: Inclusive ranges of numbers.
Ranges: TypeAlias = Sequence[tuple[int, int]]
Bytes: TypeAlias = bytes | memoryview


class Malformed(ValueError):
    """Bytes that are not a message of this version."""


class Head(NamedTuple):
    """The beginning of each message: the boot ids of its sender and its recipient."""

    origin_boot: int
    target_boot: int


class Data(NamedTuple):
    """A batch of frames. confirms: the last outcomes that its sender has received."""

    generation: int
    number: int
    confirms: int
    runs: Sequence[Run]

    def encode(self) -> list[Bytes | bytearray]:
        """Return its pieces."""
        pieces: list[Bytes | bytearray] = [_DATA.pack(self.generation, self.number, self.confirms)]
        _add_runs(pieces, self.runs)
        return pieces

    @classmethod
    def decode(cls, body: memoryview) -> Data:
        """Return the batch in the bytes behind a head. Raises Malformed."""
        generation, number, confirms = _unpack(_DATA, body)
        return cls(generation, number, confirms, _decode_runs(body, _DATA.size))


class Outcomes(NamedTuple):
    """Answers to the frames of batches.

    Attributes:
        done: Batches whose frames have all been answered or accepted.
        never: Batches that were not received and are not accepted any more.
    """

    generation: int
    number: int
    done: Ranges
    never: Ranges
    runs: Sequence[Run]

    def encode(self) -> list[Bytes | bytearray]:
        """Return its pieces."""
        head = _OUTCOMES.pack(self.generation, self.number, len(self.done), len(self.never))
        pieces: list[Bytes | bytearray] = [head]
        for ranges in (self.done, self.never):
            for first, last in ranges:
                pieces.append(_RANGE.pack(first, last))
        _add_runs(pieces, self.runs)
        return pieces

    @classmethod
    def decode(cls, body: memoryview) -> Outcomes:
        """Return the outcomes in the bytes behind a head. Raises Malformed."""
        generation, number, done_count, never_count = _unpack(_OUTCOMES, body)
        end = _OUTCOMES.size + _RANGE.size * (done_count + never_count)
        if end > len(body):
            raise Malformed("the ranges are longer than the message")
        ranges = []
        for first, last in _RANGE.iter_unpack(body[_OUTCOMES.size : end]):
            if not first <= last <= first + _MOST_RANGES:
                raise Malformed("a range is not in order, or too long")
            ranges.append((first, last))
        done, never = ranges[:done_count], ranges[done_count:]
        return cls(generation, number, done, never, _decode_runs(body, end))


class Inquiry(NamedTuple):
    """A question for the outcome of batches.

    Attributes:
        number: Counts the inquiries of a link.
        last_outcomes: The last outcomes that were received.
        batches: In ascending order.
    """

    generation: int
    number: int
    last_outcomes: int
    batches: Sequence[int]

    def encode(self) -> list[Bytes | bytearray]:
        """Return its pieces."""
        return [
            _INQUIRY.pack(self.generation, self.number, self.last_outcomes, len(self.batches)),
            *map(_NUMBER.pack, self.batches),
        ]

    @classmethod
    def decode(cls, body: memoryview) -> Inquiry:
        """Return the inquiry in the bytes behind a head. Raises Malformed."""
        generation, number, last_outcomes, count = _unpack(_INQUIRY, body)
        return cls(generation, number, last_outcomes, _numbers(body[_INQUIRY.size :], count))


class Answer(NamedTuple):
    """The answer to an inquiry; the outcomes themselves come before it.

    Attributes:
        number: That of the inquiry.
        first_outcomes, last_outcomes: The outcomes that are still known. The first is
            that of the next ones, if there are none.
        pending: Batches of the inquiry with frames that still wait.
    """

    generation: int
    number: int
    first_outcomes: int
    last_outcomes: int
    pending: Sequence[int]

    def encode(self) -> list[Bytes | bytearray]:
        """Return its pieces."""
        *numbers, pending = self
        return [_ANSWER.pack(*numbers, len(pending)), *map(_NUMBER.pack, pending)]

    @classmethod
    def decode(cls, body: memoryview) -> Answer:
        """Return the answer in the bytes behind a head. Raises Malformed."""
        generation, number, first, last, count = _unpack(_ANSWER, body)
        return cls(generation, number, first, last, _numbers(body[_ANSWER.size :], count))


class Ping(NamedTuple):
    """A question for a pong.

    Attributes:
        generation: Of its sender's batches.
        confirms: The last outcomes that its sender has received.
        stamp: What the pong repeats.
    """

    generation: int
    confirms: int
    stamp: int

    def encode(self) -> list[Bytes | bytearray]:
        """Return its pieces."""
        return [_PING.pack(*self)]

    @classmethod
    def decode(cls, body: memoryview) -> Ping:
        """Return the ping in the bytes behind a head. Raises Malformed."""
        return cls(*_unpack(_PING, body))


class Pong(NamedTuple):
    """The answer to a ping.

    Attributes:
        generation: That of the ping; 0 if its sender has forgotten that generation.
        own_generation: That of its sender's batches.
        last_outcomes: The last outcomes that were sent in the generation of the ping.
        stamp: That of the ping.
        is_ready: Whether its sender knows the names of the other host.
    """

    generation: int
    own_generation: int
    last_outcomes: int
    stamp: int
    is_ready: bool

    def encode(self) -> list[Bytes | bytearray]:
        """Return its pieces."""
        return [_PONG.pack(*self)]

    @classmethod
    def decode(cls, body: memoryview) -> Pong:
        """Return the pong in the bytes behind a head. Raises Malformed."""
        return cls(*_unpack(_PONG, body))


def pack(origin_boot: int, target_boot: int, pieces: Iterable[Bytes | bytearray]) -> bytes:
    """Return a whole message."""
    return b"".join((_HEAD.pack(VERSION, origin_boot, target_boot), *pieces))


def head_of(payload: memoryview) -> tuple[Head, memoryview]:
    """Return the head of a message, and the bytes behind it. Raises Malformed."""
    version, origin_boot, target_boot = _unpack(_HEAD, payload)
    if version != VERSION:
        raise Malformed(f"it has version {version} of the format between hosts, not {VERSION}")
    return Head(origin_boot, target_boot), payload[_HEAD.size :]


def encode_json(body: dict[str, Any]) -> list[Bytes | bytearray]:
    """Return the pieces of a message whose body is JSON."""
    return [json.dumps(body, separators=(",", ":")).encode()]


def decode_json(body: memoryview) -> dict[str, Any]:
    """Return the JSON object of a message. Raises Malformed."""
    try:
        decoded = json.loads(bytes(body))
    except (ValueError, RecursionError) as error:
        raise Malformed(f"it is not JSON: {error}") from error
    if not isinstance(decoded, dict):
        raise Malformed("it is not a JSON object")
    return decoded


def size_of(run: Run) -> int:
    """Return the bytes that a run takes in a message."""
    return RUN_OVERHEAD + len(run.target.encode()) + len(run.frames)


def bytes_of(runs: Iterable[Run]) -> int:
    """Return the bytes of the frames of runs."""
    size = 0
    for run in runs:
        size += len(run.frames)
    return size


def frames_of(run: Run) -> Iterator[memoryview]:
    """Yield each frame of a run, with its length. Raises Malformed."""
    frames = memoryview(run.frames)
    start = 0
    while start < len(frames):
        try:
            span = frame_span(frames, start, len(frames))
        except BadLength as error:
            raise Malformed(str(error)) from error
        if span is None or sum(span) > len(frames) or span[1] < HEADER.size:
            raise Malformed("a run ends inside a frame")
        end = sum(span)
        yield frames[start:end]
        start = end


def key_of(frame: memoryview, sender: bytes | None = None) -> tuple[bytes, int, bool]:
    """Return what a frame and its outcome have alike: sender, id, and whether it is an event.

    sender: the target of an outcome; None for a frame, which has its sender.
    """
    span = frame_span(frame, 0, len(frame))
    assert span is not None, "a run holds whole frames"
    kind, flags, _, name_size, message_id = HEADER.unpack_from(frame, span[0])
    if sender is not None:
        return sender, message_id, bool(flags & ACK_FLAG)
    start = span[0] + HEADER.size
    return bytes(frame[start : start + name_size]), message_id, kind == EVENT_KIND


def _add_runs(pieces: list[Bytes | bytearray], runs: Iterable[Run]) -> None:
    """Add the pieces of runs to those of a message."""
    for target, frames, ttl_ms in runs:
        encoded = target.encode()
        pieces += (_RUN.pack(len(encoded), ttl_ms, len(frames)), encoded, frames)


def _decode_runs(body: memoryview, start: int) -> list[Run]:
    """Return the runs in the rest of a message, which begins at a place."""
    runs = []
    size = len(body)
    while start < size:
        name = start + _RUN.size
        if name > size:
            raise Malformed("it is too short")
        target_size, ttl_ms, frames_size = _RUN.unpack_from(body, start)
        middle = name + target_size
        end = middle + frames_size
        if end > size:
            raise Malformed("a run is longer than the message")
        try:
            target = str(body[name:middle], "utf-8")
        except UnicodeDecodeError as error:
            raise Malformed("a target is not UTF-8") from error
        runs.append(Run(target, body[middle:end], ttl_ms))
        start = end
    return runs


def _numbers(body: memoryview, count: int) -> list[int]:
    if len(body) != count * _NUMBER.size:
        raise Malformed("the numbers do not fill the message")
    return [number for (number,) in _NUMBER.iter_unpack(body)]


def _unpack(layout: struct.Struct, body: memoryview) -> tuple[Any, ...]:
    if len(body) < layout.size:
        raise Malformed("it is too short")
    return layout.unpack_from(body)
