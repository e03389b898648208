"""The new process's side of an upgrade: start, then take everything over or end without
a trace.

The new process touches nothing of the old process before the old process has sent
``commit``. Until then the old process also handles all signals.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final, Self

from brokerd import __version__
from brokerd.config.values import ListenConfig
from brokerd.core import snapshot
from brokerd.core.snapshot import Pieces
from brokerd.core.snapshot_check import check_counts
from brokerd.daemon import garbage
from brokerd.net.handover import Ahead, RestoredState
from brokerd.net.listen.listener import Listening, inherited
from brokerd.net.listen.socket_activation import ActivatedSocket, ActivatedSockets
from brokerd.net.server import Server
from brokerd.upgrade import pid_holder as pid_holder
from brokerd.upgrade.channel import (
    FORMAT,
    HANDOVER_FD,
    PID_HOLDER_FD,
    READS,
    SIGNALS,
    UpgradeChannel,
    UpgradeChannelError,
)
from brokerd_client.address import Address

__all__ = ["UpgradeTarget"]

#: Longest wait for one message of the old process, or for sending one to it, in
#: seconds. The old process may be slow because it waits for other things.
_TIMEOUT_S: Final = 60.0
#: The first format whose state contains only what has changed since it was copied.
_SINCE_CHANGES: Final = 4


class UpgradeTarget:
    """This process, the new process, while the old process still serves.

    offered: the configured addresses at which the old process listens.
    activated: the sockets that the old process has from the service manager.
    monitored: the sockets of the old process's monitor.
    reloads: the old process's counters of reloads, once they have been taken over.
    boot_id: of this broker in its cluster; "" from a process of an earlier version.
    has_store: whether the old process has a store of mailboxes.
    store: the facts and the socket of its store process, once they have been taken over.
    pid_holder: the pipe to the PID holder; None where there is no PID holder.
    """

    def __init__(self, channel: UpgradeChannel, pid_holder: int | None) -> None:
        self._channel = channel
        self.pid_holder = pid_holder
        #: Whether this process serves now.
        self.is_over = False
        self.offered: set[Address] = set()
        self.activated = ActivatedSockets()
        self.monitored: list[Listening] = []
        self.reloads: Counter[str] = Counter()
        self.has_store = False
        self.boot_id = ""
        self.store: tuple[dict[str, Any], socket.socket] | None = None

    @classmethod
    def from_environ(cls) -> Self | None:
        """Return the upgrade for which this process was started, or None without an
        upgrade.
        """
        channel_fd, pipe = os.environ.pop(HANDOVER_FD, ""), os.environ.pop(PID_HOLDER_FD, "")
        if not channel_fd:
            return None
        if pipe:
            os.set_inheritable(int(pipe), False)
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        sock = socket.socket(fileno=int(channel_fd))
        sock.set_inheritable(False)
        return cls(UpgradeChannel(sock), int(pipe) if pipe else None)

    def meet(self) -> None:
        """Receive the offer of the old process. Raises UpgradeChannelError."""
        message = self._channel.expect("offer", within_s=_TIMEOUT_S)
        offer = message.facts
        if offer.get("format") not in READS:
            raise UpgradeChannelError(
                f"brokerd {offer.get('version')} hands over its state in the format"
                f" {offer.get('format')}, and {__version__} reads {', '.join(map(str, READS))}"
            )
        sockets = iter([socket.socket(fileno=descriptor) for descriptor in message.descriptors])
        self.activated = ActivatedSockets(
            ActivatedSocket(next(sockets), name, Address(*address))
            for name, address in offer["handed"]
        )
        self.monitored = [
            inherited(Address(*configured), next(sockets), Address(*address))
            for configured, address in offer.get("monitor", ())
        ]
        self.has_store = bool(offer.get("store"))
        self.offered = {Address(*parts) for parts in offer["listening"]}

    def fail(self, reason: str) -> None:
        """Tell the old process why this process does not take over; this process ends
        then.
        """
        try:
            self._channel.send("failed", {"reason": reason}, within_s=_TIMEOUT_S)
        except UpgradeChannelError:
            return

    def take_over(
        self, server: Server, listen: Iterable[ListenConfig], opened: Iterable[Listening]
    ) -> dict[str, object]:
        """Take over everything; return facts about it for log and reply.

        Args:
            server: a new server with a new broker.
            listen: the entries of the configuration.
            opened: the sockets for entries at which the old process did not listen.

        Raises:
            UpgradeChannelError: the upgrade failed, and nothing has been touched.
        """
        # All objects created here stay alive, and garbage collection would only make
        # the pause longer.
        with garbage.undisturbed():
            return self._take_over(server, listen, opened)

    def _take_over(
        self, server: Server, listen: Iterable[ListenConfig], opened: Iterable[Listening]
    ) -> dict[str, object]:
        channel = self._channel
        hello = {"version": __version__, "formats": READS, "keeper": pid_holder.__file__}
        with _signals_ignored():
            channel.send("hello", hello, within_s=_TIMEOUT_S)
            ahead = Ahead(server)
            while (
                state := channel.expect("copy", "copied", "state", within_s=_TIMEOUT_S)
            ).say != "state":
                if state.say == "copy":
                    ahead.add(state.facts, memoryview(state.body), state.descriptors)
                else:
                    channel.send("copied", within_s=_TIMEOUT_S)
            facts = state.facts
            if facts["format"] not in READS:
                raise UpgradeChannelError(
                    f"a state of the format {facts['format']}, and {FORMAT} was offered"
                )
            if facts["format"] < _SINCE_CHANGES:
                snapshot.adapt(facts["core"], ahead.copies)
            descriptors = list(state.descriptors)
            self.boot_id = str(facts.get("boot_id", ""))
            if facts.get("store") is not None:
                self.store = facts["store"], socket.socket(fileno=descriptors.pop())
            restored = RestoredState(
                server, facts, Pieces(state.body), descriptors, listen, opened, ahead
            )
            reloads = facts.get("reloads", {})
            check_counts(reloads, "reloads")
            self.reloads.update(reloads)
            channel.send("ready", within_s=_TIMEOUT_S)
            channel.expect("commit", within_s=_TIMEOUT_S)
        channel.send("serving", within_s=_TIMEOUT_S)
        self.is_over = True
        restored.begin()
        fields: dict[str, object] = {
            "pid": os.getpid(),
            "pause_ms": round((time.monotonic() - facts["frozen_at"]) * 1000, 1),
            "connections": len(server.connections),
            "handshakes": len(facts["knocks"]),
            "waiting_bytes": sum(
                connection.session.outbox.waiting for connection in restored.fresh
            ),
        }
        if facts["asked_by"] is not None:
            position, message_id = facts["asked_by"]
            reply = {"upgraded": True, "problems": [], "version": __version__, **fields}
            server.broker.replies.reply(restored.sessions[position], message_id, reply)
            server.settle()
        return fields

    def when_gone(self, act: Callable[[], None]) -> None:
        """Call ``act`` once the old process has closed its end of the channel."""
        loop = asyncio.get_running_loop()

        def on_end() -> None:
            loop.remove_reader(self._channel.fileno())
            self._channel.close()
            act()

        loop.add_reader(self._channel.fileno(), on_end)


@contextlib.contextmanager
def _signals_ignored() -> Iterator[None]:
    """Ignore signals meanwhile: the old process handles them or passes them on."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
