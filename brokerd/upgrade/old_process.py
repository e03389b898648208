"""The old process's side of an upgrade: start the new process, hand everything over,
end.

The old process gives nothing up until the new process has sent ``serving``. If anything
fails before, the daemon continues as if no upgrade had been requested. While the new
process starts, all clients are served as usual. The pause begins with ``state``. It is
one call that does not return to the event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any, Final, NoReturn

from structlog.typing import FilteringBoundLogger

from brokerd import __version__
from brokerd.core.broker import AdminCommand
from brokerd.daemon.daemon import Daemon
from brokerd.daemon.threads import run_in_thread
from brokerd.log.logger import in_words
from brokerd.net import handover
from brokerd.upgrade.channel import (
    FORMAT,
    HANDOVER_FD,
    PID_HOLDER_FD,
    SIGNALS,
    UpgradeChannel,
    UpgradeChannelError,
)
from brokerd.upgrade.notify import announce_new_process

__all__ = ["UpgradeSource"]

#: Longest wait per upgrade, in seconds, for the new process to start.
_HELLO_S: Final = 30.0
#: Longest time per upgrade, in seconds, for the handover, while all clients wait. It
#: gets more time where many bytes are queued.
_HANDOVER_S: Final = 10.0
#: Bytes of queued frames, and bytes of facts, for which the handover gets one more
#: second.
_BYTES_A_SECOND: Final = 200e6
_FACTS_A_SECOND: Final = 1e6
#: Most rounds of copying per call of _copy. A round with fewer blocks than _FEW_BLOCKS
#: is the last one.
_ROUNDS: Final = 5
_FEW_BLOCKS: Final = 4
#: Longest wait for steps that take almost no time, in seconds: the last messages, and
#: the end of a process that was told to end.
_MOMENT_S: Final = 2.0
#: Seconds that a new process has to end by itself when this one has stopped; then it is
#: killed.
_GRACE_S: Final = 0.3
#: Environment variables that apply to this process only and are not passed on.
_OWN: Final = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "WATCHDOG_PID")
#: Signals that end the broker.
_ENDING: Final = {signal.SIGINT, signal.SIGTERM}


class _Failed(Exception):
    """The upgrade does not take place; the text says why."""


class _NewProcess:
    """The new process, with its channel and pipe.

    pid_holder: the pipe that a new PID holder would read; None where no new one is
    needed.
    """

    def __init__(self, pid_holder: int | None) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self.channel = UpgradeChannel(ours)
        self.pid_holder: int | None = None
        self.address = os.environ.get("NOTIFY_SOCKET", "")
        self._popen: subprocess.Popen[bytes] | None = None
        with contextlib.ExitStack() as stack:
            stack.callback(theirs.close)
            if pid_holder is None and not self.address:
                self.pid_holder, pid_holder = os.pipe()
                stack.callback(os.close, pid_holder)
            environment = {name: value for name, value in os.environ.items() if name not in _OWN}
            environment[HANDOVER_FD] = str(theirs.fileno())
            passed = [theirs.fileno()]
            if pid_holder is not None:
                environment[PID_HOLDER_FD] = str(pid_holder)
                passed.append(pid_holder)
            try:
                self._popen = subprocess.Popen(  # noqa: S603 - the command that started this very process
                    [sys.executable, *sys.orig_argv[1:]],
                    env=environment,
                    pass_fds=passed,
                    # Signals such as Ctrl-C reach the new process once: passed on by
                    # this process or the PID holder.
                    start_new_session=True,
                )
            except BaseException:
                self.end()
                raise

    @property
    def pid(self) -> int:
        assert self._popen is not None
        return self._popen.pid

    def kill(self) -> None:
        """Kill the process and wait until it has ended: afterwards it can do nothing
        more.
        """
        assert self._popen is not None
        self._popen.kill()
        self._popen.wait()

    def abandon(self) -> None:
        """Kill the process without waiting for its end, because this process ends too."""
        assert self._popen is not None
        self.channel.wake()
        self.channel.close()
        self._popen.kill()

    def end(self) -> str:
        """End the process and close its channel and pipe.

        Returns how the process ended, or "" if it was never started.
        """
        self.channel.close()
        if self.pid_holder is not None:
            os.close(self.pid_holder)
        if self._popen is None:
            return ""
        try:
            # The new process ends by itself once the channel is closed.
            status = self._popen.wait(_MOMENT_S)
        except subprocess.TimeoutExpired:
            self.kill()
            return "killed because it did not end"
        return f"ended with status {status}" if status >= 0 else f"ended by signal {-status}"


class UpgradeSource:
    """The replacement of this process by a new process, on request.

    Args:
        daemon: The daemon of this process.
        pid_holder: The pipe to an existing PID holder, or None.
    """

    def __init__(self, daemon: Daemon, pid_holder: int | None = None) -> None:
        self._daemon = daemon
        self._pid_holder = pid_holder
        self._new_process: _NewProcess | None = None
        self._task: asyncio.Task[None] | None = None

    def soon(self, reason: str, order: AdminCommand | None = None) -> None:
        """Begin an upgrade.

        order: the admin command that requested it, to be answered with the outcome; or
        None.
        """
        problem = ""
        if self._task is not None:
            problem = "an upgrade is in progress already"
        elif self._daemon.stopping:
            problem = "the broker is stopping"
        elif not sys.platform.startswith("linux"):
            problem = "a process can hand over its sockets on Linux only"
        log = self._daemon.log.bind(reason=reason)
        if problem:
            self._report_failure(log, problem, order)
            return
        self._task = asyncio.get_running_loop().create_task(self._run(log, order))
        self._task.add_done_callback(self._is_done)

    def _is_done(self, task: asyncio.Task[None]) -> None:
        self._task = None

    async def close(self) -> None:
        """Give up an upgrade in progress, whatever it waits for: the daemon has
        stopped.
        """
        task = self._task
        if task is None:
            return
        if self._new_process is not None:
            self._new_process.channel.wake()
            await asyncio.wait((task,), timeout=_GRACE_S)
        task.cancel()
        await asyncio.wait((task,))

    def kill(self) -> None:
        """Cancel an upgrade at once and kill the new process."""
        if self._task is not None:
            self._task.cancel()

    def abandon(self) -> None:
        """Kill the new process, if any, because this process ends.

        Callable from any thread.
        """
        self._abandon()

    def _report_failure(
        self, log: FilteringBoundLogger, problem: str, order: AdminCommand | None
    ) -> None:
        daemon = self._daemon
        log.warning("daemon.upgrade_failed", problem=problem)
        if order is not None:
            daemon.broker.replies.reply(
                order.source,
                order.id,
                {"upgraded": False, "problems": problem.splitlines()},
            )
            daemon.server.settle()

    async def _run(self, log: FilteringBoundLogger, order: AdminCommand | None) -> None:
        try:
            async with self._daemon.reloading.undisturbed(
                "an upgrade is in progress, which reads the configuration again"
            ):
                await self._attempt(log, order)
        except (_Failed, UpgradeChannelError) as error:
            problem = f"the new process can't take over: {error}"
        except OSError as error:
            problem = f"the new process can't be started: {error.strerror or error}"
        except asyncio.CancelledError:
            self._abandon()
            raise
        except Exception as error:  # noqa: BLE001 - whatever it is, the daemon goes on
            problem = f"a bug: {in_words(error)}"
            trace = traceback.format_exception(error)
            self._daemon.log.error("daemon.bug", error=in_words(error), trace=trace)
        gc.unfreeze()
        if self._daemon.serves:
            self._daemon.store.resume()
            self._daemon.in_background(self._daemon.cluster_host.join_again())
            self._daemon.server.accept_bound()
        if self._new_process is not None:
            try:
                # The new process may take a moment to end. Clients are served
                # meanwhile.
                ending = await run_in_thread(self._new_process.end)
            except asyncio.CancelledError:
                self._abandon()
                raise
            self._new_process = None
            problem += f" ({ending})"
        self._report_failure(log, problem, order)

    def _abandon(self) -> None:
        if self._new_process is not None:
            self._new_process.abandon()
            self._new_process = None

    async def _attempt(self, log: FilteringBoundLogger, order: AdminCommand | None) -> NoReturn:
        """Hand over and end this process; on any exception, the process continues to
        serve.
        """
        daemon = self._daemon
        if daemon.stopping:
            # The upgrade was requested during the start, and then the broker was told
            # to stop.
            raise _Failed("the broker is stopping")
        # Clients have to be able to reach the sockets that are handed over.
        await daemon.listen_again()
        new_process = self._new_process = _NewProcess(self._pid_holder)
        log = log.bind(pid=new_process.pid)
        log.info("daemon.upgrading")
        activated, monitored = daemon.activated.sockets, daemon.monitor_listening
        offer = {
            "format": FORMAT,
            "version": __version__,
            "listening": [
                handover.describe(listening.config.address) for listening in daemon.server.listening
            ],
            "handed": [[entry.name, handover.describe(entry.address)] for entry in activated],
            "store": daemon.store.is_open,
            "monitor": [
                [handover.describe(listening.config.address), handover.describe(listening.address)]
                for listening in monitored
            ],
        }
        descriptors = [
            *(entry.sock.fileno() for entry in activated),
            *(listening.sock.fileno() for listening in monitored),
        ]
        new_process.channel.send("offer", offer, (), descriptors, within_s=_HANDOVER_S)
        # In a thread, so that clients are served while the new process starts.
        hello = (
            await run_in_thread(lambda: new_process.channel.expect("hello", within_s=_HELLO_S))
        ).facts
        if FORMAT not in hello["formats"]:
            raise _Failed(
                f"brokerd {hello['version']} reads the state formats {hello['formats']},"
                f" {__version__} writes {FORMAT}"
            )
        passing = handover.Passing(daemon.server)
        try:
            await self._copy_and_hand_over(new_process, hello, passing, log, order)
        finally:
            passing.end()

    async def _copy_and_hand_over(
        self,
        new_process: _NewProcess,
        hello: dict[str, Any],
        passing: handover.Passing,
        log: FilteringBoundLogger,
        order: AdminCommand | None,
    ) -> NoReturn:
        """Copy what is idle, then hand over and end this process."""
        daemon = self._daemon
        # Copying creates objects, which would trigger garbage collection. Searching
        # millions of frames for garbage takes a good part of a second.
        gc.freeze()
        await self._copy(new_process, passing)
        reason = (
            f"the broker is replaced by {hello['version']}, and an encrypted connection can't be"
            " handed over"
        )
        await handover.let_go_of_bound(daemon.server, reason)
        await self._copy(new_process, passing)
        await daemon.wait_until_settled()
        # The other hosts wait for the new process from here on.
        await daemon.cluster_host.hold()
        # Last: senders to mailboxes wait from here on.
        await daemon.store.quiet()
        if daemon.stopping:
            raise _Failed("the broker is stopping")
        # The last log line of this process comes before the first of the new process.
        # Two processes writing at once would garble the log.
        log.info("daemon.handing_over", version=hello["version"])
        daemon.flush_log()
        # From here on this process does nothing else.
        with _signals_noted() as noted:
            self._hand_over(new_process, order, noted, passing)
            # From here on the upgrade cannot be undone.
            try:
                self._leave(new_process, str(hello["keeper"]), noted)
            finally:
                os._exit(0)

    async def _copy(self, new_process: _NewProcess, passing: handover.Passing) -> None:
        """Copy state while clients are served; return when the new process has
        processed it.
        """
        channel, loop = new_process.channel, asyncio.get_running_loop()

        def send(
            facts: dict[str, Any], pieces: Sequence[bytes | bytearray | memoryview]
        ) -> Callable[[], None]:
            return lambda: channel.send("copy", facts, pieces, within_s=_HANDOVER_S)

        def hand(facts: dict[str, Any], descriptors: list[int]) -> Callable[[], None]:
            def send() -> None:
                try:
                    channel.send("copy", facts, (), descriptors, within_s=_HANDOVER_S)
                finally:
                    for descriptor in descriptors:
                        os.close(descriptor)

            return send

        def wait() -> None:
            channel.send("copied", within_s=_HANDOVER_S)
            channel.expect("copied", within_s=_HELLO_S)

        for _ in range(_ROUNDS):
            count = 0
            for block in passing.copier.blocks(loop.time()):
                await run_in_thread(send(*block))
                count += 1
            for some in passing.blocks():
                await run_in_thread(hand(*some))
                count += 1
            await run_in_thread(wait)
            if count < _FEW_BLOCKS:
                return

    def _hand_over(
        self,
        new_process: _NewProcess,
        order: AdminCommand | None,
        noted: _Noted,
        passing: handover.Passing,
    ) -> None:
        """Hand everything over to the new process.

        Raises UpgradeChannelError or _Failed. Then the new process has touched nothing,
        and will not touch anything.
        """
        server, channel = self._daemon.server, new_process.channel
        frozen_at = time.monotonic()
        self._daemon.cluster_host.settle_ends()
        asker = order.source if order is not None and order.source.open else None
        captured, descriptors = handover.capture(server, passing, asker)
        asked_by = None if order is None or asker is None else [captured.position, order.id]
        facts = {"format": FORMAT, "frozen_at": frozen_at, "asked_by": asked_by, **captured.facts}
        facts["reloads"] = dict(self._daemon.reloads.results)
        facts["boot_id"] = self._daemon.cluster_host.boot_id
        facts["store"] = None
        store = self._daemon.store.for_new_process()
        if store is not None:
            facts["store"], sock = store
            descriptors.append(sock.fileno())
        deadline = frozen_at + _HANDOVER_S + sum(map(len, captured.pieces)) / _BYTES_A_SECOND
        with noted.ending_fails():
            channel.send(
                "state",
                facts,
                captured.pieces,
                descriptors,
                within_s=_HANDOVER_S + deadline - time.monotonic(),
            )
            # A large state takes longer to set up, and this must not make the upgrade
            # fail.
            deadline += channel.json_size / _FACTS_A_SECOND
            channel.expect("ready", within_s=max(deadline - time.monotonic(), 0))
        channel.send("commit", within_s=_MOMENT_S)
        try:
            channel.expect("serving", within_s=_MOMENT_S)
        except UpgradeChannelError:
            new_process.kill()
            # The killed process can do nothing more. The handover has succeeded if it
            # had sent ``serving`` before.
            with contextlib.suppress(UpgradeChannelError):
                channel.expect("serving", within_s=_MOMENT_S)
                return
            raise

    def _leave(self, new_process: _NewProcess, pid_holder: str, noted: _Noted) -> None:
        """Announce the new process as the daemon, pass on the noted signals, and end."""
        if self._pid_holder is not None:
            os.write(self._pid_holder, b"%d\n" % new_process.pid)
        elif new_process.pid_holder is None:
            announce_new_process(new_process.address, new_process.pid)
        if new_process.pid_holder is not None:
            # Signals from now on stay pending for the PID holder, which has the same
            # process id.
            signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        self._daemon.close_log()
        sys.stdout.flush()
        sys.stderr.flush()
        # This comes last: the other threads do not block signals, and a signal that
        # they received is noted too.
        while noted:
            os.kill(new_process.pid, noted.pop(0))
        if new_process.pid_holder is not None:
            os.set_inheritable(new_process.pid_holder, True)
            os.execv(  # noqa: S606 - a program of our own, named by the new process
                sys.executable,
                [
                    sys.executable,
                    "-I",
                    "-S",
                    "-E",
                    pid_holder,
                    str(new_process.pid_holder),
                    str(new_process.pid),
                ],
            )


class _Noted(list[int]):
    """The signals that were received during the handover."""

    _fails = False

    def note(self, number: int, frame: FrameType | None) -> None:
        """Note a signal. In ``ending_fails``, raise _Failed if it ends the broker."""
        self.append(number)
        if self._fails:
            self._fail()

    @contextlib.contextmanager
    def ending_fails(self) -> Iterator[None]:
        """Raise _Failed on a signal that ends the broker, whatever the block is waiting
        for.
        """
        self._fails = True
        try:
            self._fail()
            yield
        finally:
            self._fails = False

    def _fail(self) -> None:
        if not _ENDING.isdisjoint(self):
            self._fails = False
            raise _Failed("the broker is stopping")


@contextlib.contextmanager
def _signals_noted() -> Iterator[_Noted]:
    """Note the signals that are received meanwhile; the event loop, if resumed, handles
    them.
    """
    noted = _Noted()
    before = {number: signal.signal(number, noted.note) for number in SIGNALS}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
