"""The process around the daemon: event loop, signals, limits and exit status."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Final

from brokerd._held_signals import release_signals
from brokerd.config.load import ConfigError, load
from brokerd.config.model import Config
from brokerd.config.problems import EX_CONFIG
from brokerd.daemon import garbage
from brokerd.daemon.daemon import Daemon, Stopped
from brokerd.daemon.mailbox_store import StoreError
from brokerd.daemon.memory import keep_freed
from brokerd.daemon.systemd import Supervisor
from brokerd.log.logger import AuditError, in_words
from brokerd.net.cluster.errors import MembershipError
from brokerd.net.listen.listener import ListenError
from brokerd.net.listen.socket_activation import ActivatedSockets, SocketActivationError
from brokerd.upgrade.channel import UpgradeChannelError
from brokerd.upgrade.new_process import UpgradeTarget
from brokerd.upgrade.old_process import UpgradeSource

__all__ = ["EX_FAILED", "loop_factory", "run"]

EX_FAILED: Final = 1
#: Seconds from a second signal to the forced end of a process whose event loop does not
#: react to it.
_INSISTENCE_S: Final = 2.0
#: Seconds after which a busy thread, such as one that reads a configuration, lets the
#: event loop's thread run. The interpreter's own 5 ms would be a part of each answer.
_SWITCH_S: Final = 0.0005


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    """Return the factory of the daemon's event loop: uvloop's where installed, else
    asyncio's.

    On Windows it is the selector loop: the daemon reads and writes its sockets itself.
    """
    try:
        import uvloop
    except ImportError:
        return asyncio.SelectorEventLoop
    return uvloop.new_event_loop


def run(config_path: Path) -> int:
    """Run the broker until it is told to stop; return the process's exit status.

    The status is 0 after a drain, and 1 if the broker can't listen or was told twice to
    stop. It is 78 if the configuration can't be used, alone or with the service
    manager's sockets.
    """
    old_process = UpgradeTarget.from_environ()
    if old_process is not None:
        return _replace(old_process, config_path)
    supervisor = Supervisor.from_environ()
    with garbage.tended():
        try:
            with garbage.undisturbed():
                config = load(config_path)
            activated = ActivatedSockets.take(os.environ, os.getpid())
        except (ConfigError, SocketActivationError) as error:
            supervisor.failed(str(error).partition("\n")[0])
            print(error, file=sys.stderr)  # noqa: T201 - one line for each mistake, for people
            return EX_CONFIG
        _allow_many_descriptors()
        keep_freed()
        sys.setswitchinterval(_SWITCH_S)
        with asyncio.Runner(loop_factory=loop_factory()) as runner:
            return runner.run(_serve(config, supervisor, activated))


def _replace(old_process: UpgradeTarget, config_path: Path) -> int:
    """Take the place of a serving process, or report to it why not; return the exit
    status.
    """
    _allow_many_descriptors()
    keep_freed()
    sys.setswitchinterval(_SWITCH_S)
    try:
        old_process.meet()
        with garbage.tended():
            with garbage.undisturbed():
                config = load(config_path)
            with asyncio.Runner(loop_factory=loop_factory()) as runner:
                return runner.run(
                    _serve(config, Supervisor.from_environ(), old_process.activated, old_process)
                )
    except (ConfigError, ListenError, StoreError, AuditError, UpgradeChannelError) as error:
        old_process.fail(str(error))
        return EX_CONFIG if isinstance(error, (ConfigError, SocketActivationError)) else EX_FAILED
    except Exception as error:
        old_process.fail(f"a bug: {in_words(error)}")
        raise


def _allow_many_descriptors() -> None:
    """Raise the soft limit of open files, often 1024, to the hard limit.

    The soft limit exists for programs that use select().
    """
    try:
        import resource
    except ImportError:
        return
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # Some systems report "no limit" and then accept less.
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


async def _serve(
    config: Config,
    supervisor: Supervisor,
    activated: ActivatedSockets,
    old_process: UpgradeTarget | None = None,
) -> int:
    try:
        with garbage.undisturbed():
            daemon = Daemon(config, supervisor=supervisor, activated=activated)
    except AuditError as error:
        if old_process is not None:
            raise
        supervisor.failed(str(error))
        print(error, file=sys.stderr)  # noqa: T201 - there is no log yet
        return EX_FAILED
    try:
        return await _until_stopped(daemon, supervisor, old_process)
    finally:
        daemon.close_log()


async def _until_stopped(
    daemon: Daemon, supervisor: Supervisor, old_process: UpgradeTarget | None
) -> int:
    upgrade_source = UpgradeSource(daemon, None if old_process is None else old_process.pid_holder)
    daemon.on_upgrade = upgrade_source.soon
    status = 0

    def on_signal(name: str) -> None:
        nonlocal status
        if not daemon.stop_soon(name) and not daemon.stopped.is_set():
            daemon.log.warning("daemon.killed", reason=f"second {name}")
            status = EX_FAILED
            daemon.kill()
            upgrade_source.kill()

    def once_it_serves(action: Callable[[str], object]) -> Callable[[str], None]:
        """Act on signals only once this process serves; until then they are for the old
        process.
        """

        def act(name: str) -> None:
            if old_process is None or old_process.is_over:
                action(name)

        return act

    def end_at_once() -> None:
        upgrade_source.abandon()
        os._exit(EX_FAILED)

    actions = map(once_it_serves, (on_signal, daemon.reload_soon, upgrade_source.soon))
    insistence = _Insistence(lambda: old_process is None or old_process.is_over, end_at_once)
    with _signals_go_to(*actions), insistence.listening():
        _ignore_signal("SIGUSR1")
        # Signals held since the start of the process are acted on now.
        release_signals()
        try:
            if not await _started(daemon, old_process):
                return status
        except (ListenError, StoreError, MembershipError) as error:
            if old_process is not None:
                raise
            daemon.log.error("daemon.failed", reason=str(error))
            supervisor.failed(str(error), getattr(error.__cause__, "errno", None))
            # A restart can help where an address is taken; an unexpected activated
            # socket stays unexpected.
            return EX_CONFIG if isinstance(error, SocketActivationError) else EX_FAILED
        garbage.set_apart()
        sweeper = garbage.Sweeper(asyncio.get_running_loop(), daemon.size)
        try:
            await daemon.stopped.wait()
        finally:
            sweeper.close()
        await upgrade_source.close()
    return status


async def _started(daemon: Daemon, old_process: UpgradeTarget | None) -> bool:
    """Start the daemon; return False if it was told to stop before the start was
    complete.
    """
    starting = asyncio.ensure_future(daemon.start(old_process))
    stopped = asyncio.ensure_future(daemon.stopped.wait())
    await asyncio.wait((starting, stopped), return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    starting.cancel()
    try:
        await starting
    except (Stopped, asyncio.CancelledError):
        return False
    return True


@contextlib.contextmanager
def _signals_go_to(
    end: Callable[[str], None], reload: Callable[[str], None], upgrade: Callable[[str], None]
) -> Iterator[None]:
    """Register loop callbacks that receive a signal's name.

    ``end`` is called for signals that end a process, ``reload`` for SIGHUP, and
    ``upgrade`` for SIGUSR2.
    """
    loop = asyncio.get_running_loop()
    actions = {signal.SIGTERM: end, signal.SIGINT: end}
    if hasattr(signal, "SIGHUP"):
        actions[signal.SIGHUP] = reload
        actions[signal.SIGUSR2] = upgrade
    if hasattr(signal, "SIGBREAK"):
        # Windows: Ctrl-Break, or the console's window was closed.
        actions[signal.SIGBREAK] = end
    until_the_end: contextlib.AbstractContextManager[None] = _signals_ignored_afterwards(
        loop, actions
    )
    try:
        for number, action in actions.items():
            loop.add_signal_handler(number, action, number.name)
    except NotImplementedError:
        until_the_end = _signals_wake(loop, actions)
    with until_the_end:
        yield


@contextlib.contextmanager
def _signals_ignored_afterwards(
    loop: asyncio.AbstractEventLoop, numbers: Iterable[signal.Signals]
) -> Iterator[None]:
    """Ignore these signals after the block, while the interpreter ends.

    The exit status is decided by then. A closing loop would restore the default
    actions, which end the process with a signal's status.
    """
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_IGN)


class _Insistence:
    """Forces the end of the process soon after a second signal, if the event loop is
    blocked.

    Args:
        concerned: Returns whether signals are for this process.
        end: Ends the process; called in a thread of its own.
    """

    def __init__(self, concerned: Callable[[], bool], end: Callable[[], None]) -> None:
        self._concerned = concerned
        self._end = end
        self._count = 0

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Handle signals in addition to the event loop, which is notified by a
        descriptor.
        """
        numbers = (signal.SIGTERM, signal.SIGINT) if os.name == "posix" else ()
        # A signal interrupts a blocking system call, so this handler runs even then.
        before = {number: signal.signal(number, self._hear) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if not self._concerned():
            return
        self._count += 1
        if self._count == 2:
            timer = threading.Timer(_INSISTENCE_S, self._end)
            timer.daemon = True
            timer.start()


def _ignore_signal(name: str) -> None:
    """Ignore a signal, on systems that have it, until the process ends.

    Its default action would end the process.
    """
    number = getattr(signal, name, None)
    if number is not None:
        signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def _signals_wake(
    loop: asyncio.AbstractEventLoop, actions: Mapping[signal.Signals, Callable[[str], None]]
) -> Iterator[None]:
    """Call the actions where the loop has no signal handlers, on Windows.

    A loop that waits for sockets is woken only by a socket there.
    """
    waker_out, waker_in = socket.socketpair()

    def on_wake() -> None:
        for number in map(signal.Signals, waker_out.recv(64)):
            if number in actions:
                actions[number](number.name)

    with waker_out, waker_in:
        waker_out.setblocking(False)
        waker_in.setblocking(False)
        loop.add_reader(waker_out, on_wake)
        # Python writes the number of every signal to this descriptor, in addition to
        # any handler.
        ringing_before = signal.set_wakeup_fd(waker_in.fileno(), warn_on_full_buffer=False)
        before = {number: signal.signal(number, lambda *_: None) for number in actions}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(ringing_before)
            loop.remove_reader(waker_out)
