"""Networks of a test's own with a link between them, which can be bad; nothing of it
reaches anybody else.

    with Link.wire() as link:                  # a veth pair each; iptables can cut it
        link.inside(BROKER)                    # for preexec_fn: puts a process there
        link.cut(CLIENTS)
        link.heal(CLIENTS)
    with Link.carried(delay_ms=25, loss=0.02, twice=0.02, seed=1) as link:     # TUN devices,
    and a process between

Needs root, ip and iptables. Each end has an address of its own; all networks go when the
block ends.
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
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Final, Self

import pytest

__all__ = ["BROKER", "CLIENTS", "Link", "needs_networks"]

#: The ends of a link, unless others are named.
BROKER, CLIENTS = "broker", "clients"
_ADDRESS: Final = "10.213.7."
#: The addresses of these two.
ADDRESSES: Final = {BROKER: f"{_ADDRESS}1", CLIENTS: f"{_ADDRESS}2"}
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
    """A network namespace for each end, and the link between them.

    Attributes:
        addresses: The address of each end.
    """

    def __init__(self, ends: Iterable[str]) -> None:
        self.addresses = {end: f"{_ADDRESS}{place}" for place, end in enumerate(ends, 1)}
        self._mark = secrets.token_hex(3)
        self._spaces: dict[str, str] = {}
        self._carrier = 0
        try:
            for end in self.addresses:
                self._add_space(end)
        except BaseException:
            self.close()
            raise

    def _add_space(self, end: str) -> str:
        space = f"bd-{self._mark}-{end}"
        _ip("netns", "add", space)
        self._spaces[end] = space
        return space

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove the networks."""
        if self._carrier:
            os.kill(self._carrier, signal.SIGKILL)
            os.waitpid(self._carrier, 0)
        for space in self._spaces.values():
            _ip("netns", "del", space)

    @classmethod
    def wire(cls, *ends: str) -> Self:
        """Return networks with a veth pair each to a bridge in one more namespace."""
        link = cls(ends or ADDRESSES)
        try:
            link._make_bridge()
            link._up()
        except BaseException:
            link.close()
            raise
        return link

    def _make_bridge(self) -> None:
        ends = list(self.addresses)
        hub = self._add_space("hub")
        _ip("-n", hub, "link", "add", "bridge", "type", "bridge")
        _ip("-n", hub, "link", "set", "bridge", "up")
        for place, end in enumerate(ends):
            port, space = f"port{place}", self._spaces[end]
            pair = ("type", "veth", "peer", "name", "wire", "netns", space)
            _ip("-n", hub, "link", "add", port, *pair)
            _ip("-n", hub, "link", "set", port, "master", "bridge", "up")

    @classmethod
    def carried(
        cls,
        *ends: str,
        delay_ms: float,
        jitter_ms: float = 0.0,
        loss: float = 0.0,
        twice: float = 0.0,
        seed: int = 0,
    ) -> Self:
        """Return networks with a process between them.

        The process delays, loses and repeats packets, alike in all directions.

        Args:
            loss: The share of packets that are lost.
            twice: The share of packets that are repeated.
        """
        link = cls(ends or ADDRESSES)
        tuns: dict[bytes, int] = {}
        try:
            for end, address in link.addresses.items():
                tuns[socket.inet_aton(address)] = link._tun(end)
            link._up()
            link._carrier = os.fork()
            if not link._carrier:
                try:
                    rng = random.Random(seed)
                    _carry(tuns, delay_ms / 1000, jitter_ms / 1000, loss, twice, rng)
                finally:
                    os._exit(1)
        except BaseException:
            link.close()
            raise
        finally:
            for tun in tuns.values():
                os.close(tun)
        return link

    def _up(self) -> None:
        for end, address in self.addresses.items():
            space = self._spaces[end]
            _ip("-n", space, "address", "add", f"{address}/24", "dev", "wire")
            _ip("-n", space, "link", "set", "lo", "up")
            _ip("-n", space, "link", "set", "wire", "up")

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

    def cut(self, end: str, *others: str) -> None:
        """Drop all packets between this end and the others, by default all of them."""
        self._rules(end, "-A", others)

    def heal(self, end: str, *others: str) -> None:
        """Undo a cut."""
        self._rules(end, "-D", others)

    def unplug(self, end: str) -> None:
        """Take this end's device down."""
        _ip("-n", self._spaces[end], "link", "set", "wire", "down")

    def plug(self, end: str) -> None:
        """Undo an unplug."""
        _ip("-n", self._spaces[end], "link", "set", "wire", "up")

    def _rules(self, end: str, what: str, others: Iterable[str]) -> None:
        peers = [self.addresses[other] for other in others] or ["0.0.0.0/0"]
        for peer in peers:
            for chain, way in (("INPUT", ("-i", "wire", "-s")), ("OUTPUT", ("-o", "wire", "-d"))):
                command = ["iptables", "-w", what, chain, *way, peer, "-j", "DROP"]
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
    tuns: Mapping[bytes, int],
    delay_s: float,
    jitter_s: float,
    loss: float,
    twice: float,
    rng: random.Random,
) -> None:
    """Carry packets to the end with their address until killed.

    Packets with jitter overtake each other.

    Args:
        tuns: The device of each address.
    """
    ends = list(tuns.values())
    due: list[tuple[float, int, bytes, int]] = []
    order = 0
    while True:
        wait = None if not due else max(0.0, due[0][0] - time.monotonic())
        for end in select.select(ends, [], [], wait)[0]:
            packet = os.read(end, 65536)
            other = tuns.get(packet[16:20])
            if other is None:
                # Nobody's: multicast, or IPv6.
                continue
            copies = 0 if rng.random() < loss else 2 if rng.random() < twice else 1
            for _ in range(copies):
                order += 1
                at = time.monotonic() + delay_s + rng.random() * jitter_s
                heapq.heappush(due, (at, order, packet, other))
        while due and due[0][0] <= time.monotonic():
            _, _, packet, other = heapq.heappop(due)
            with contextlib.suppress(OSError):
                os.write(other, packet)
