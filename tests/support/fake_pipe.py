"""Named pipes like those of Windows, as Python objects: messages stay whole, and a full
pipe blocks its writer.
"""

from __future__ import annotations

import errno
import threading
from collections import deque
from collections.abc import Collection
from typing import Any

from support.raw_client import Raw, is_reason, prefixed

TIMEOUT_S = 30.0
#: Bytes that a pipe takes before it blocks its writer.
CAPACITY = 8192


class FakePipe:
    """One end of a pipe; it is a brokerd_client._common.pipe_bridge.Pipe.

    Attributes:
        taken: Bytes read from it so far.
    """

    def __init__(self, changed: threading.Condition) -> None:
        self._changed = changed
        self._peer = self
        self._messages: deque[memoryview] = deque()
        self._stopped: set[str] = set()
        self.closed = False
        self.taken = 0
        self.write_error: OSError | None = None

    def read(self, size: int, timeout_s: float | None = None) -> tuple[bytes, int]:
        with self._changed:
            ready = self._changed.wait_for(
                lambda: self._messages or self._peer.closed or "reading" in self._stopped, timeout_s
            )
            assert ready, "nothing came"
            assert not self.closed, "read after close"
            if "reading" in self._stopped:
                raise OSError(errno.ECANCELED, "stopped")
            if not self._messages:
                raise EOFError
            piece, rest = self._messages[0][:size], self._messages[0][size:]
            self._messages.popleft()
            if rest:
                self._messages.appendleft(rest)
            self.taken += len(piece)
            self._changed.notify_all()
            return bytes(piece), len(rest)

    def write(self, body: bytes) -> None:
        with self._changed:
            if self.write_error is not None:
                raise self.write_error
            self._go_on_writing()
            inbox = self._peer._messages
            message = memoryview(bytes(body))
            inbox.append(message)
            self._changed.notify_all()

            def taken() -> bool:
                return (
                    self._peer.closed
                    or "writing" in self._stopped
                    or sum(map(len, inbox)) <= CAPACITY
                )

            assert self._changed.wait_for(taken, TIMEOUT_S), "the peer did not read"
            if sum(map(len, inbox)) > CAPACITY:
                self._go_on_writing()

    def _go_on_writing(self) -> None:
        assert not self.closed, "written after close"
        if "writing" in self._stopped:
            raise OSError(errno.ECANCELED, "stopped")
        if self._peer.closed:
            raise BrokenPipeError

    def stop(self, *, writing: bool) -> None:
        with self._changed:
            self._stopped |= {"reading", "writing"} if writing else {"reading"}
            self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            assert not self.closed, "closed twice"
            self.closed = True
            self._changed.notify_all()

    # For tests

    def message(self) -> bytes:
        """Return the next whole message. Raises EOFError."""
        piece, left = self.read(1 << 30, TIMEOUT_S)
        assert not left
        return piece

    def wait_until_closed(self) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: self.closed, TIMEOUT_S), "not closed"


def fake_pipes() -> tuple[FakePipe, FakePipe]:
    """Return two ends of one pipe."""
    changed = threading.Condition()
    one, other = FakePipe(changed), FakePipe(changed)
    one._peer, other._peer = other, one
    return one, other


class FakePipeServer:
    """Accepts connections as named_pipes.PipeServer does.

    Attributes:
        failures: Errors that accept() raises before it accepts a peer.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._come: deque[FakePipe] = deque()
        self._woken = False
        self.failures: list[OSError] = []
        self.taken: list[FakePipe] = []
        self.closed = False

    def dial(self) -> FakePipe:
        """Return the client's end of a new connection."""
        ours, theirs = fake_pipes()
        with self._changed:
            assert not self.closed, "no server listens"
            self._come.append(ours)
            self._changed.notify_all()
        return theirs

    def wait(self, channels: Collection[Any], timeout: float | None) -> tuple[bool, set[int]]:
        assert timeout is None
        with self._changed:
            self._changed.wait_for(lambda: self._come or self._woken)
            self._woken = False
            return bool(self._come), set()

    def accept(self) -> tuple[FakeChannel, None]:
        with self._changed:
            if self.failures:
                raise self.failures.pop()
            pipe = self._come.popleft()
            self.taken.append(pipe)
            self._changed.notify_all()
            return FakeChannel(pipe), None

    def wait_until_taken(self, count: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.taken) >= count, TIMEOUT_S)

    def wake(self) -> None:
        with self._changed:
            self._woken = True
            self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self.closed = True
            come, self._come = self._come, deque()
        for each in come:
            each.close()


class FakeChannel:
    """An accepted connection from which nothing has been read."""

    def __init__(self, pipe: FakePipe) -> None:
        self._pipe = pipe

    def into_stream(self) -> FakePipe:
        return self._pipe


class PipeRaw(Raw):
    """The primitive client at a pipe: each frame that it writes is one message."""

    def __init__(self, pipe: FakePipe) -> None:
        self.pipe = pipe

    def close(self) -> None:
        self.pipe.close()

    def write(self, data: bytes) -> None:
        while data:
            end = 4 + int.from_bytes(data[:4], "big")
            self.pipe.write(data[4:end])
            data = data[end:]

    def read_body(self) -> bytes:
        return self.pipe.message()

    def is_closed(self, code: str = "") -> bool:
        data = self.read_to_end()
        return is_reason(prefixed(data), code) if code else data == b""

    def read_to_end(self) -> bytes:
        data = bytearray()
        try:
            while True:
                data += self.pipe.message()
        except EOFError:
            return bytes(data)
