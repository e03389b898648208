"""A real broker in a thread of the test: real sockets, its log kept as a list."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple, NoReturn, TypeVar

import structlog
from structlog.typing import EventDict, FilteringBoundLogger
from support.keys import key_of
from support.raw_client import Raw, login

from brokerd.config.load import build_config
from brokerd.config.model import Config
from brokerd.daemon import Daemon
from brokerd.daemon.process import loop_factory
from brokerd_client.address import Address

T = TypeVar("T")
TIMEOUT_S = 90.0


class Event(NamedTuple):
    """One line of the log."""

    level: str
    event: str
    fields: dict[str, Any]


class Recorder:
    """A log that keeps its events; ``wait`` waits for them.

    Attributes:
        logger: The logger to give to a daemon.
    """

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._news = threading.Condition()
        self.logger: FilteringBoundLogger = structlog.wrap_logger(
            structlog.ReturnLogger(),
            processors=[self._record],
            wrapper_class=structlog.make_filtering_bound_logger("debug"),
            context_class=dict,
        ).bind()

    def _record(self, logger: object, method_name: str, event_dict: EventDict) -> NoReturn:
        event = event_dict.pop("event")
        with self._news:
            self.events.append(Event(method_name, event, dict(event_dict)))
            self._news.notify_all()
        raise structlog.DropEvent

    def named(self, event: str) -> list[Event]:
        return [each for each in self.events if each.event == event]

    def wait(self, event: str, count: int = 1) -> list[Event]:
        """Return the events of that name when there are ``count``."""
        with self._news:
            assert self._news.wait_for(lambda: len(self.named(event)) >= count, TIMEOUT_S), (
                self.events
            )
        return self.named(event)


class RunningDaemon:
    """A running broker: connect to its sockets, or look inside with ``call``."""

    def __init__(self, daemon: Daemon, log: Recorder, loop: asyncio.AbstractEventLoop) -> None:
        self.daemon = daemon
        self.log = log
        self._loop = loop

    @property
    def addresses(self) -> list[Address]:
        return self.daemon.addresses

    @property
    def address(self) -> Address:
        """The first address that it listens at."""
        return self.daemon.addresses[0]

    def raw(self) -> Raw:
        """Return a connection that has sent nothing yet."""
        return Raw(self.address)

    def login(self, name: str, **how: Any) -> Raw:
        """Return a connection of that client, whose key is ``NAME's key``, found by its
        name.
        """
        return login(self.address, key_of(name), name.encode(), **how)

    def call(self, function: Callable[[], T]) -> T:
        """Return the function's result, called in the broker's thread."""

        async def run() -> T:
            return function()

        return asyncio.run_coroutine_threadsafe(run(), self._loop).result(TIMEOUT_S)

    def stop_soon(self) -> None:
        self._loop.call_soon_threadsafe(self.daemon.stop_soon, "the test ends")


def configuration(
    listen: Any, clients: Mapping[str, Any] | str = "alice bob carol", **more: Any
) -> Config:
    """Return a configuration; every client without a key gets ``NAME's key``, and every
    handshake a minute if nothing else is said: a busy machine may need it.
    """
    entries: Mapping[str, Any] = (
        dict.fromkeys(clients.split()) if isinstance(clients, str) else clients
    )
    whole: dict[str, Any] = {}
    for name, entry in entries.items():
        given = dict(entry or {})
        if not given.keys() & {"key", "keys", "key_file", "peer_uid"}:
            given["key"] = key_of(name)
        whole[name] = given
    limits = {"handshake_timeout": "60s", **(more.pop("limits", None) or {})}
    return build_config(listen, whole, limits=limits, **more)


@contextmanager
def running_daemon(config: Config) -> Iterator[RunningDaemon]:
    """Run a broker in a thread until the block ends; it is killed then, and everything
    it had is closed.
    """
    log = Recorder()
    started: list[RunningDaemon | BaseException] = []
    ready = threading.Event()
    complaints: list[dict[str, Any]] = []

    async def main() -> None:
        daemon = Daemon(config, log.logger)
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda loop, context: complaints.append(context))
        try:
            await daemon.start()
        except BaseException as error:
            started.append(error)
            raise
        else:
            started.append(RunningDaemon(daemon, log, loop))
        finally:
            ready.set()
        await daemon.stopped.wait()

    def run() -> None:
        with asyncio.Runner(loop_factory=loop_factory()) as runner:
            try:
                runner.run(main())
            except Exception:
                if isinstance(started[0], RunningDaemon):
                    raise

    thread = threading.Thread(target=run, name="broker")
    thread.start()
    assert ready.wait(TIMEOUT_S)
    running = started[0]
    if not isinstance(running, RunningDaemon):
        thread.join(TIMEOUT_S)
        raise running
    try:
        yield running
    finally:
        # It may be ending by itself at this very moment.
        with suppress(RuntimeError):
            running._loop.call_soon_threadsafe(running.daemon.kill)
        thread.join(TIMEOUT_S)
        assert not thread.is_alive(), "the broker did not stop"
    if complaints:
        problem = complaints[0].get("exception")
        raise AssertionError(
            f"{len(complaints)} callbacks failed in the broker: {complaints[0]}"
        ) from problem
