"""Two networks of a test's own with a link between them, which can be bad; nothing of
it reaches anybody else.

    with Link.wire() as link:                  # a veth pair; iptables can cut it
        link.inside(BROKER)                    # for preexec_fn: puts a process there
        link.cut(CLIENTS)
        link.heal(CLIENTS)
    with Link.carried(delay_ms=25, loss=0.02, twice=0.02, seed=1) as link:     # two TUN
    devices, and a process between

Needs root, ip and iptables. Both ends have an address of their own; both networks go
when the block ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import heapq
import os
import random
import secrets
import select
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Final, Self

import pytest

__all__ = ["BROKER", "CLIENTS", "Link", "needs_networks"]

#: The two ends, and their addresses.
BROKER, CLIENTS = "broker", "clients"
ADDRESSES: Final = {BROKER: "10.213.7.1", CLIENTS: "10.213.7.2"}
_CLONE_NEWNET: Final = 0x40000000
_TUNSETIFF: Final = 0x400454CA
_IFF_TUN_NO_PI: Final = 0x1001


def needs_networks() -> pytest.MarkDecorator:
    """Return the mark for tests that need root, ip and iptables."""
    missing = [tool for tool in ("ip", "iptables") if shutil.which(tool) is None]
    why = "" if not missing else f"needs {' and '.join(missing)}"
    if sys.platform != "linux" or os.geteuid() != 0:
        why = "needs root on Linux"
    return pytest.mark.skipif(bool(why), reason=why)


class Link:
    """Two network namespaces and the link between them."""

    def __init__(self) -> None:
        mark = secrets.token_hex(3)
        self._spaces = {end: f"bd-{mark}-{end}" for end in ADDRESSES}
        self._carrier = 0
        for space in self._spaces.values():
            _ip("netns", "add", space)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._carrier:
            os.kill(self._carrier, signal.SIGKILL)
            os.waitpid(self._carrier, 0)
        for space in self._spaces.values():
            _ip("netns", "del", space)

    @classmethod
    def wire(cls) -> Self:
        """Return two networks with a veth pair between them."""
        link = cls()
        broker, clients = link._spaces[BROKER], link._spaces[CLIENTS]
        _ip(
            "link",
            "add",
            "wire",
            "netns",
            broker,
            "type",
            "veth",
            "peer",
            "name",
            "wire",
            "netns",
            clients,
        )
        link._up("wire", "/24")
        return link

    @classmethod
    def carried(
        cls, *, delay_ms: float, jitter_ms: float, loss: float, twice: float, seed: int
    ) -> Self:
        """Return two networks with a process between them.

        The process delays, loses and repeats packets, alike in both directions.

        Args:
            loss: The share of packets that are lost.
            twice: The share of packets that are repeated.
        """
        link = cls()
        ends = [link._tun(end) for end in ADDRESSES]
        link._up("wire", " peer")
        link._carrier = os.fork()
        if not link._carrier:
            try:
                _carry(ends, delay_ms / 1000, jitter_ms / 1000, loss, twice, random.Random(seed))
            finally:
                os._exit(1)
        for end in ends:
            os.close(end)
        return link

    def _up(self, device: str, form: str) -> None:
        for end, space in self._spaces.items():
            other = next(address for each, address in ADDRESSES.items() if each != end)
            at = [ADDRESSES[end] + "/24"] if form == "/24" else [ADDRESSES[end], "peer", other]
            _ip("-n", space, "address", "add", *at, "dev", device)
            _ip("-n", space, "link", "set", "lo", "up")
            _ip("-n", space, "link", "set", device, "up")

    def _tun(self, end: str) -> int:
        """Return the descriptor of a TUN device in this network, which reads and writes
        packets.
        """
        own_network = os.open("/proc/self/ns/net", os.O_RDONLY)
        try:
            self.inside(end)()
            tun = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
            fcntl.ioctl(tun, _TUNSETIFF, struct.pack("16sH22x", b"wire", _IFF_TUN_NO_PI))
        finally:
            _enter(own_network)
            os.close(own_network)
        return tun

    def inside(self, end: str) -> Callable[[], None]:
        """Return a function for preexec_fn that moves the calling process into this
        network.
        """
        path = f"/run/netns/{self._spaces[end]}"

        def enter() -> None:
            space = os.open(path, os.O_RDONLY)
            _enter(space)
            os.close(space)

        return enter

    @contextlib.contextmanager
    def visit(self, end: str) -> Iterator[None]:
        """Let this thread open its sockets in this network."""
        own_network = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        try:
            self.inside(end)()
            yield
        finally:
            _enter(own_network)
            os.close(own_network)

    def cut(self, end: str) -> None:
        """Drop all packets in and out at this end."""
        self._rules(end, "-A")

    def heal(self, end: str) -> None:
        """Undo a cut."""
        self._rules(end, "-D")

    def _rules(self, end: str, what: str) -> None:
        for chain, way in (("INPUT", "-i"), ("OUTPUT", "-o")):
            command = ["iptables", "-w", what, chain, way, "wire", "-j", "DROP"]
            subprocess.run(
                ["ip", "netns", "exec", self._spaces[end], *command], check=True, timeout=30
            )


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, timeout=30)


def _enter(space: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(space, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "can't enter a network namespace")


def _carry(
    ends: list[int],
    delay_s: float,
    jitter_s: float,
    loss: float,
    twice: float,
    rng: random.Random,
) -> None:
    """Carry packets from each end to the other until killed.

    Packets with jitter overtake each other.
    """
    due: list[tuple[float, int, bytes, int]] = []
    order = 0
    while True:
        wait = None if not due else max(0.0, due[0][0] - time.monotonic())
        for end in select.select(ends, [], [], wait)[0]:
            packet = os.read(end, 65536)
            other = ends[1] if end == ends[0] else ends[0]
            copies = 0 if rng.random() < loss else 2 if rng.random() < twice else 1
            for _ in range(copies):
                order += 1
                at = time.monotonic() + delay_s + rng.random() * jitter_s
                heapq.heappush(due, (at, order, packet, other))
        while due and due[0][0] <= time.monotonic():
            _, _, packet, other = heapq.heappop(due)
            with contextlib.suppress(OSError):
                os.write(other, packet)
