"""Connections to the monitor that have not sent a request: which of them are closed
first, so that a probe is always answered.
"""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable

import pytest
from support.scraping import connect, get, watched

from brokerd.monitor import http_server
from brokerd.monitor.pending_requests import Pending

REQUEST = b"GET /livez HTTP/1.1\r\n\r\n"


class PendingWithPeers:
    """A Pending, and the peers' ends of its connections."""

    def __init__(self, most: int = 4, most_whole: int = 4, longest_s: float = 100.0) -> None:
        self.whole = 0
        self.pending = Pending(most, most_whole, longest_s, self._on_whole)
        self.ends: list[socket.socket] = []

    def _on_whole(self) -> None:
        self.whole += 1

    def add(self, origin: str, sent: bytes = b"") -> int:
        """Let a peer connect; return its number."""
        ours, theirs = socket.socketpair()
        theirs.sendall(sent)
        ours.setblocking(False)
        theirs.setblocking(False)
        self.ends.append(theirs)
        self.pending.add(ours, origin)
        return len(self.ends) - 1

    def ended(self) -> list[int]:
        """Return the numbers of the peers whose connections were closed."""
        return [number for number, end in enumerate(self.ends) if _is_closed(end)]

    def close(self) -> None:
        """Close every connection."""
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


def test_pending_requests_beyond_limit_drop_oldest_of_busiest_origin() -> None:
    """However many connections one origin opens, another origin keeps its place."""

    def scenario() -> None:
        requests = PendingWithPeers(most=4)
        for origin in "baab":
            requests.add(origin)
        requests.add("a")
        assert requests.ended() == [1]
        for _ in range(3):
            requests.add("a")
        assert requests.ended() == [1, 2, 4, 5]
        requests.add("c")
        # Every other origin has one connection; b has two, and loses its oldest.
        assert requests.ended() == [0, 1, 2, 4, 5]
        assert len(requests.pending) == 4
        requests.close()

    run(scenario)


def test_pending_requests_whole_one_is_kept_before_silent_ones() -> None:
    """The request was sent with the connection, or later in pieces."""

    async def main() -> None:
        requests = PendingWithPeers(most=2)
        requests.add("a", REQUEST)
        late = requests.add("a", REQUEST[:5])
        requests.ends[late].sendall(REQUEST[5:])
        await asyncio.sleep(0.01)
        for _ in range(10):
            requests.add("a")
        assert requests.whole == 2
        taken = []
        while (request := requests.pending.take()) is not None:
            taken.append(request[1])
            request[0].close()
        assert taken == [REQUEST, REQUEST]
        assert len(requests.pending) == 2
        requests.close()

    asyncio.run(main())


def test_pending_requests_are_taken_from_each_origin_in_turn() -> None:
    """Many requests of one origin do not delay that of another. Beyond the limit, the
    oldest of the busy origin are dropped.
    """

    def scenario() -> None:
        requests = PendingWithPeers(most_whole=4)
        numbers = {origin + str(number): origin for number in range(6) for origin in "a"}
        for name, origin in numbers.items():
            requests.add(origin, REQUEST + name.encode())
        requests.add("b", REQUEST + b"b0")
        assert requests.ended() == [0, 1, 2]
        order = []
        while (request := requests.pending.take()) is not None:
            order.append(request[1].removeprefix(REQUEST).decode())
            request[0].close()
        assert order == ["a3", "b0", "a4", "a5"]
        requests.close()

    run(scenario)


@pytest.mark.parametrize(
    "sent",
    [b"\x16\x03\x01\x02\x00", b"x" * 9000, b"GET / HTTP/1.0\n\n", b"\r\n\r\n"],
    ids=["TLS", "long", "line feeds", "empty lines"],
)
def test_pending_requests_invalid_one_counts_as_whole(sent: bytes) -> None:
    """Its answer is then sent at once."""

    def scenario() -> None:
        requests = PendingWithPeers()
        requests.add("a", sent)
        assert requests.whole == 1
        requests.close()

    run(scenario)


def test_pending_requests_end_at_timeout_or_disconnect() -> None:
    """A connection closed by its peer is forgotten, and a silent one is closed."""

    async def main() -> None:
        requests = PendingWithPeers(longest_s=0.05)
        requests.add("a")
        requests.ends[0].close()
        await asyncio.sleep(0.01)
        assert len(requests.pending) == 0
        requests.add("a", b"GET /")
        requests.add("a", REQUEST)
        deadline = time.monotonic() + 10
        while len(requests.pending):
            assert time.monotonic() < deadline
            await asyncio.sleep(0.01)
        assert _is_closed(requests.ends[1])
        assert _is_closed(requests.ends[2])
        requests.close()

    asyncio.run(main())


@pytest.mark.timing
def test_monitor_probe_behind_silent_connections_is_answered_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Silent connections do not count for the number of answers per second, however
    small that is.
    """
    monkeypatch.setattr(http_server, "_A_SECOND", 5)
    with watched() as broker:
        silent = [connect(broker) for _ in range(100)]
        began = time.monotonic()
        assert get(broker, "/livez").status == 200
        took = time.monotonic() - began
        for each in silent:
            each.close()

    # At five per second the silent ones alone would take twenty seconds.
    assert took < 15


def flood(broker: object, stop: threading.Event, a_second: int) -> int:
    """Open silent connections at that rate until ``stop`` is set; return how many."""
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
def test_monitor_probes_during_flood_of_connections_are_answered(a_second: int) -> None:
    """For ten seconds, from the same address as the flood, each probe is answered
    within a second.
    """
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
