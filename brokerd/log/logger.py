"""The log: one structured event per occurrence, without keys, MACs or bodies, and never
blocking.

The first word of an event is its area, which can have a level of its own (``log`` in
docs/configuration.md). Events that matter to an auditor also go to a separate file,
whatever the levels. docs/operations.md says of each event what it means and what to do.
The events:

    daemon.started  daemon.stopping  daemon.stopped  daemon.failed daemon.reloaded
    daemon.reload_refused  daemon.state_unwritten daemon.killed  daemon.bug daemon.upgrading
    daemon.handing_over  daemon.upgraded  daemon.upgrade_failed daemon.slow_routing client.connected
    client.disconnected  client.refused  client.slow  client.recovered  client.held
    client.unsubscribed  message.refused  message.refusals message.dropped
    message.unreported  admin.asked client.left client.undecided channel.opened
    channel.closed channel.refused channel.withdrawn
    client.users_unseen listener.paused  listener.plain  listener.not_handed_over
    listener.unchanged listener.lost  listener.restored key.expiring  key.expired
    key.odd log.level_changed  log.lost  log.audit_failed monitor.listening
    monitor.exposed  monitor.closed  monitor.bug mailbox.changed  mailbox.dead
    mailbox.dead_full  mailbox.expired  mailbox.shown  mailbox.ack_timeout
    mailbox.store_failed
    mailbox.store_slow  mailbox.orphaned cluster.joined  cluster.host_found
    cluster.host_lost  cluster.refused_to_join  cluster.too_many_hosts
    cluster.malformed cluster.nats_lost  cluster.nats_found  cluster.nats_error
    cluster.small_max_payload

Events that clients can cause at will have a second form, with ``_more`` at its end. It
counts the occurrences within a second.
"""

from __future__ import annotations

import atexit
import os
import sys
import time
from collections.abc import Iterable
from typing import Any, Final, TextIO

import structlog
from structlog.typing import FilteringBoundLogger, Processor, WrappedLogger

from brokerd.config.model import Log as Settings
from brokerd.config.values import LogFormat
from brokerd.log.formats import JOURNAL, JSON, PREFIXED, Format, console, renderer
from brokerd.log.levels import AreaLevels, make_area_bound_logger
from brokerd.log.processors import AuditBranch, add_header, may_be_audited
from brokerd.log.sinks import Descriptor, Journal, Sink, Target, of_stream, open_for_append

__all__ = [
    "AuditError",
    "DaemonLog",
    "SinkLogger",
    "in_words",
    "quiet_log",
]

#: Where systemd's journal takes entries.
_JOURNAL: Final = "/run/systemd/journal/socket"
#: Most seconds that the end of the process waits for its last lines. A busy machine may
#: not run a sink's thread for half a second.
_CLOSE_S: Final = 1.0


class AuditError(Exception):
    """The audit file can't be opened; the message is the reason."""


class SinkLogger:
    """The logger that structlog wraps: it passes each event to a sink."""

    def __init__(self, sink: Sink) -> None:
        self.sink = sink

    def msg(self, /, **event: Any) -> None:
        """Queue an event; never blocks."""
        self.sink.put(event)

    debug = info = warning = error = critical = msg


class DaemonLog:
    """The log of one daemon, without global state: a structlog logger and its sinks.

    Attributes:
        logger: Logs events; connections, reloads and other parts bind fields to it.
        processors: The processors of each event that is at or above its level or may
            be audited. Bound loggers share this list, so a reload changes it in place.
    """

    def __init__(
        self,
        settings: Settings | None = None,
        stream: TextIO | None = None,
        *,
        journal: str = _JOURNAL,
    ) -> None:
        """Open the files of the log.

        Args:
            settings: The section ``log`` of a configuration.
            stream: The stream for events; standard error unless given.
            journal: The path of the socket of the system's journal.

        Raises:
            AuditError: The audit file can't be opened.
        """
        self._settings = settings or Settings()
        self._stream = stream or sys.stderr
        self._journal = journal
        self._levels = AreaLevels(self._settings)
        self._output = SinkLogger(_place(self._settings.format, self._stream, journal))
        self._audit: tuple[Sink, Descriptor] | None = None
        self.processors: list[Processor] = []
        #: Lines that sinks could not write that are no longer in use.
        self._lost_before = 0
        self._begin_audit(None if self._settings.audit is None else _opened(self._settings.audit))
        self._set_processors()
        self.logger = _logger(self._output, self.processors, make_area_bound_logger(self._admit))
        atexit.register(self.close)

    def _set_processors(self) -> None:
        self.processors[:] = [add_header]
        if self._audit is not None:
            self.processors.append(AuditBranch(self._levels.admit, self._audit[0].put))

    def _admit(self, method_name: str, event: str) -> bool:
        """Return whether the processors see an event."""
        return self._levels.admit(method_name, event) or (
            self._audit is not None and may_be_audited(event)
        )

    @property
    def lost(self) -> int:
        """The number of lines that could not be written, of the log and the audit."""
        return self._lost_before + sum(sink.lost for sink in self._sinks())

    # Levels

    def levels(self) -> dict[str, dict[str, Any]]:
        """Return the level of each area, as :meth:`AreaLevels.levels` does."""
        return self._levels.levels()

    def change_level(self, area: object, level: object, for_: object = None, *, by: str) -> None:
        """Set the level of one area or of all, and log the change.

        Args:
            area: See :meth:`AreaLevels.change`, as for ``level`` and ``for_``.
            by: The name of the client that asked.

        Raises:
            LevelRefused: An argument is not valid; nothing has changed.
        """
        change = self._levels.change(area, level, for_)
        self.logger.warning("log.level_changed", **change, by=by)

    # Other settings, other files

    def reopen(self) -> None:
        """Open the audit file again after it was moved; keep the old file on failure.

        Called in a thread: the file system may be slow.
        """
        if self._audit is None:
            return
        try:
            self._replace_audit(self._audit, _opened(str(self._settings.audit)))
        except AuditError as error:
            self.logger.error("log.audit_failed", reason=str(error))

    def opened_audit(self, settings: Settings) -> int | None:
        """Open the audit file in other settings, if it is not the current one.

        Called in a thread: the file system may be slow.

        Args:
            settings: The settings for a later ``take_over``.

        Returns:
            A descriptor for ``take_over``, or None.

        Raises:
            AuditError: The audit file can't be opened.
        """
        if settings.audit is None or settings.audit == self._settings.audit:
            return None
        return _opened(settings.audit)

    def precheck(self, settings: Settings) -> list[str]:
        """Return why settings would be refused, without creating a file.

        Called in a thread: the file system may be slow.

        Args:
            settings: The settings to check.

        Returns:
            The problems, a line each.
        """
        if (
            settings.audit is None
            or settings.audit == self._settings.audit
            or os.path.exists(settings.audit)  # noqa: PTH110
        ):
            return []
        directory = os.path.dirname(os.path.abspath(settings.audit))  # noqa: PTH100, PTH120 - as written
        if os.access(directory, os.W_OK | os.X_OK):
            return []
        return [f"the audit file {settings.audit} can't be made there (see to log.audit)"]

    def take_over(self, settings: Settings, audit: int | None = None) -> None:
        """Switch to other settings; levels changed at run time are reset.

        Args:
            settings: The settings to use from now on.
            audit: The result of ``opened_audit`` for them; this object now owns it.
        """
        if settings.audit != self._settings.audit:
            self._begin_audit(audit)
        self._levels.configure(settings)
        before = None
        if settings.format != self._settings.format:
            before = self._output.sink
            self._output.sink = _place(settings.format, self._stream, self._journal)
        self._set_processors()
        if before is not None:
            # Lines that wait in the old sink are written first, if that is quick.
            before.close(0.1)
            self._lost_before += before.lost
        self._settings = settings

    def _begin_audit(self, descriptor: int | None) -> None:
        before = self._audit
        if descriptor is None:
            self._audit = None
            if before is not None:
                before[0].close(0.1)
                self._lost_before += before[0].lost
        elif before is None:
            target = Descriptor(descriptor, owned=True)
            self._audit = (_sink(target, JSON), target)
        else:
            self._replace_audit(before, descriptor)

    def _replace_audit(self, audit: tuple[Sink, Descriptor], descriptor: int) -> None:
        sink, target = audit
        sink.call(lambda: target.replace(descriptor))

    # Closing

    def flush(self, timeout_s: float = 0.3) -> bool:
        """Write all waiting lines.

        Args:
            timeout_s: The most seconds to wait for all sinks together.

        Returns:
            Whether every line was written in time.
        """
        end = time.monotonic() + timeout_s
        done = [sink.flush(max(0.0, end - time.monotonic())) for sink in self._sinks()]
        return all(done)

    def close(self, timeout_s: float = _CLOSE_S) -> None:
        """Write the waiting lines and close all sinks.

        Args:
            timeout_s: The seconds after which lines that still wait are discarded.
        """
        atexit.unregister(self.close)
        end = time.monotonic() + timeout_s
        for sink in self._sinks():
            sink.close(max(0.0, end - time.monotonic()))

    def _sinks(self) -> list[Sink]:
        main = self._output.sink
        return [main] if self._audit is None else [main, self._audit[0]]


def _logger(
    wrapped: WrappedLogger,
    processors: Iterable[Processor],
    wrapper_class: type[FilteringBoundLogger],
) -> FilteringBoundLogger:
    """Return a structlog logger that uses nothing of structlog's global configuration."""
    logger: FilteringBoundLogger = structlog.wrap_logger(
        wrapped,
        processors=processors,
        wrapper_class=wrapper_class,
        context_class=dict,
        cache_logger_on_first_use=False,
    ).bind()
    return logger


def _sink(target: Target, form: Format) -> Sink:
    return Sink(target, renderer(form))


def _place(chosen: LogFormat, stream: TextIO, journal: str) -> Sink:
    """Return the sink of all events, with their format."""
    if chosen is LogFormat.JSON:
        return _sink(of_stream(stream), JSON)
    if chosen is LogFormat.CONSOLE or stream.isatty():
        return _sink(of_stream(stream), console(colors=stream.isatty()))
    if _is_journal(stream):
        try:
            return _sink(Journal(journal), JOURNAL)
        except OSError:
            return _sink(of_stream(stream), PREFIXED)
    return _sink(of_stream(stream), JSON)


def _is_journal(stream: TextIO) -> bool:
    """Return whether the stream is a pipe to the journal (systemd.exec(5),
    $JOURNAL_STREAM).
    """
    try:
        status = os.fstat(stream.fileno())
    except (OSError, ValueError, AttributeError):
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def _opened(path: str) -> int:
    try:
        return open_for_append(path)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise AuditError(
            f"the audit file {path} can't be opened: {reason} (see to log.audit)"
        ) from None


def in_words(error: BaseException) -> str:
    """Return an error as text for the log.

    Not its repr: an error about text or bytes shows all of them there, which may be a
    client's message.
    """
    return f"{type(error).__name__}: {error}"


def quiet_log() -> FilteringBoundLogger:
    """Return a logger that discards every event, for brokers inside a program."""
    # No event of a broker is critical.
    return _logger(structlog.ReturnLogger(), (), structlog.make_filtering_bound_logger("critical"))
