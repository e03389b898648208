"""Connections to the monitor that have not sent a request: which of them give way, and
that a probe is always heard.
"""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable

import pytest
from support.scraping import connect, get, watched

from brokerd.monitor import http_server as site
from brokerd.monitor.pending_requests import Pending

REQUEST = b"GET /livez HTTP/1.1\r\n\r\n"


class Room:
    """A Pending with peers whose other ends are at hand."""

    def __init__(self, most: int = 4, most_whole: int = 4, longest_s: float = 100.0) -> None:
        self.whole = 0
        self.pending = Pending(most, most_whole, longest_s, self._on_whole)
        self.ends: list[socket.socket] = []

    def _on_whole(self) -> None:
        self.whole += 1

    def add(self, origin: str, says: bytes = b"") -> int:
        """Let a peer connect; return its number."""
        ours, theirs = socket.socketpair()
        theirs.sendall(says)
        ours.setblocking(False)
        theirs.setblocking(False)
        self.ends.append(theirs)
        self.pending.add(ours, origin)
        return len(self.ends) - 1

    def ended(self) -> list[int]:
        """Return the numbers of the peers that the room has closed."""
        return [number for number, end in enumerate(self.ends) if _is_closed(end)]

    def close(self) -> None:
        """Close all there is."""
        self.pending.close()
        for end in self.ends:
            end.close()


def _is_closed(end: socket.socket) -> bool:
    try:
        return end.recv(1) == b""
    except BlockingIOError:
        return False
    except ConnectionError:
        return True


def run(scenario: Callable[[], None]) -> None:
    """Run a scenario inside an event loop."""

    async def main() -> None:
        scenario()

    asyncio.run(main())


def test_pending_past_its_bound_drops_the_oldest_of_the_origin_with_most() -> None:
    """However many one origin sends, another keeps its place."""

    def scenario() -> None:
        room = Room(most=4)
        for origin in "baab":
            room.add(origin)
        room.add("a")
        assert room.ended() == [1]
        for _ in range(3):
            room.add("a")
        assert room.ended() == [1, 2, 4, 5]
        room.add("c")
        # One of each: the oldest of all, with two of b the oldest of these.
        assert room.ended() == [0, 1, 2, 4, 5]
        assert len(room.pending) == 4
        room.close()

    run(scenario)


def test_pending_request_that_is_whole_does_not_give_way_to_silence() -> None:
    """It was sent with the connection, or later in pieces."""

    async def main() -> None:
        room = Room(most=2)
        room.add("a", REQUEST)
        late = room.add("a", REQUEST[:5])
        room.ends[late].sendall(REQUEST[5:])
        await asyncio.sleep(0.01)
        for _ in range(10):
            room.add("a")
        assert room.whole == 2
        taken = []
        while (request := room.pending.take()) is not None:
            taken.append(request[1])
            request[0].close()
        assert taken == [REQUEST, REQUEST]
        assert len(room.pending) == 2
        room.close()

    asyncio.run(main())


def test_pending_requests_are_taken_from_each_origin_in_turn() -> None:
    """A crowd of one origin does not hold up the request of another; past the bound the
    crowd's oldest go.
    """

    def scenario() -> None:
        room = Room(most_whole=4)
        numbers = {origin + str(number): origin for number in range(6) for origin in "a"}
        for name, origin in numbers.items():
            room.add(origin, REQUEST + name.encode())
        room.add("b", REQUEST + b"b0")
        assert room.ended() == [0, 1, 2]
        order = []
        while (request := room.pending.take()) is not None:
            order.append(request[1].removeprefix(REQUEST).decode())
            request[0].close()
        assert order == ["a3", "b0", "a4", "a5"]
        room.close()

    run(scenario)


@pytest.mark.parametrize(
    "says",
    [b"\x16\x03\x01\x02\x00", b"x" * 9000, b"GET / HTTP/1.0\n\n", b"\r\n\r\n"],
    ids=["TLS", "long", "line feeds", "empty lines"],
)
def test_pending_nonsense_counts_as_whole(says: bytes) -> None:
    """So that its answer comes at once."""

    def scenario() -> None:
        room = Room()
        room.add("a", says)
        assert room.whole == 1
        room.close()

    run(scenario)


def test_pending_connection_ends_after_its_time_and_with_its_peer() -> None:
    """A peer that hangs up is forgotten, and a silent one is closed."""

    async def main() -> None:
        room = Room(longest_s=0.05)
        room.add("a")
        room.ends[0].close()
        await asyncio.sleep(0.01)
        assert len(room.pending) == 0
        room.add("a", b"GET /")
        room.add("a", REQUEST)
        deadline = time.monotonic() + 10
        while len(room.pending):
            assert time.monotonic() < deadline
            await asyncio.sleep(0.01)
        assert _is_closed(room.ends[1])
        assert _is_closed(room.ends[2])
        room.close()

    asyncio.run(main())


@pytest.mark.timing
def test_probe_behind_silent_connections_is_answered_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Silent connections do not count as answered, however few may be answered in a
    second.
    """
    monkeypatch.setattr(site, "_A_SECOND", 5)
    with watched() as broker:
        silent = [connect(broker) for _ in range(100)]
        began = time.monotonic()
        assert get(broker, "/livez").status == 200
        took = time.monotonic() - began
        for each in silent:
            each.close()

    # At five a second the silent ones alone would take twenty seconds.
    assert took < 5


def flood(broker: object, stop: threading.Event, a_second: int) -> int:
    """Open silent connections at that rate until told to stop; return how many."""
    opened: list[socket.socket] = []
    began = time.monotonic()
    count = 0
    while not stop.is_set():
        if count >= (time.monotonic() - began) * a_second:
            time.sleep(0.001)
            continue
        try:
            opened.append(connect(broker))  # type: ignore[arg-type]
        except OSError:
            break
        count += 1
        if len(opened) > 100:
            opened.pop(0).close()
    for each in opened:
        each.close()
    return count


@pytest.mark.slow
@pytest.mark.parametrize("a_second", [250, 1500])
def test_probes_are_answered_during_a_flood_of_silent_connections(a_second: int) -> None:
    """For ten seconds, from the same address as the flood: each probe within a second."""
    with watched() as broker:
        stop = threading.Event()
        flooding = threading.Thread(target=flood, args=(broker, stop, a_second))
        flooding.start()
        try:
            times = []
            for _ in range(50):
                began = time.monotonic()
                assert get(broker, "/livez").status == 200
                times.append(time.monotonic() - began)
                time.sleep(0.2)
        finally:
            stop.set()
            flooding.join()

    assert max(times) < 1.0
