"""The log: one structured event per occurrence, without keys, MACs or bodies, and never
blocking.

The first word of an event is its area, which can have a level of its own (``log`` in
docs/configuration.md). Events that matter to an auditor also go to a separate file,
whatever the levels. docs/operations.md says of each event what it means and what to do.
The events:

    daemon.started  daemon.stopping  daemon.stopped  daemon.failed daemon.reloaded
    daemon.reload_refused  daemon.killed  daemon.bug daemon.upgrading
    daemon.handing_over  daemon.upgraded  daemon.upgrade_failed client.connected
    client.disconnected  client.refused  client.slow  client.recovered  client.held
    client.unsubscribed  message.refused  message.dropped  admin.asked client.left
    client.users_unseen listener.paused  listener.plain  listener.not_handed_over
    listener.unchanged listener.lost  listener.restored key.expiring  key.expired
    key.odd log.level_changed  log.lost  log.audit_failed monitor.listening
    monitor.exposed  monitor.closed  monitor.bug

Events that clients can cause at will have a second form, with ``_more`` at its end. It
counts the occurrences within a second.
"""

from __future__ import annotations

import atexit
import os
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Final, TextIO

from brokerd.config import units
from brokerd.config.model import Log as Settings
from brokerd.config.model import LogAreas
from brokerd.config.values import LogFormat, LogLevel
from brokerd.log.formats import Entry, Form, console, journal_entry, json_line, prefixed
from brokerd.log.sinks import Descriptor, Journal, Outlet, Target, of_stream, open_for_append

__all__ = ["AUDITED", "AuditError", "LevelRefused", "Logs", "in_words", "quiet_log"]

#: Events that go to the audit file whatever the levels, besides all events of
#: _AUDITED_AREAS.
AUDITED: Final = frozenset(
    {
        "client.connected",
        "client.disconnected",
        "client.refused",
        "client.refused_more",
        "client.unsubscribed",
    }
)
_AUDITED_AREAS: Final = frozenset({"admin", "daemon", "key", "log"})
_ORDER: Final = {LogLevel.DEBUG: 10, LogLevel.INFO: 20, LogLevel.WARNING: 30, LogLevel.ERROR: 40}
#: Where systemd's journal takes entries.
_JOURNAL: Final = "/run/systemd/journal/socket"


class AuditError(Exception):
    """The audit file can't be opened; the message is the reason."""


class LevelRefused(Exception):
    """A level can't be changed as requested; the message says what is wrong and what is
    right.
    """


class Logs:
    """The log of one daemon, without global state.

    settings: the section ``log``. stream: standard error unless given. journal: the
    socket of the system's journal. Raises AuditError.
    """

    def __init__(
        self,
        settings: Settings | None = None,
        stream: TextIO | None = None,
        *,
        journal: str = _JOURNAL,
    ) -> None:
        self._settings = settings or Settings()
        self._stream = stream or sys.stderr
        self._journal = journal
        #: By area: the level set at run time, and until when on the monotonic clock.
        self._changed: dict[str, tuple[LogLevel, float | None]] = {}
        self._form, target = _place(self._settings.format, self._stream, journal)
        self._main = self._outlet(target, self._form)
        self._audit: tuple[Outlet, Descriptor] | None = None
        self._begin_audit(None if self._settings.audit is None else _opened(self._settings.audit))
        atexit.register(self.close)

    def _outlet(self, target: Target, form: Form) -> Outlet:
        return Outlet(target, lambda count: form(_entry("warning", "log.lost", {"count": count})))

    # Events

    def debug(self, event: str, **fields: Any) -> None:
        """Log details for developers."""
        self._log(LogLevel.DEBUG, event, fields)

    def info(self, event: str, **fields: Any) -> None:
        """Log normal operation."""
        self._log(LogLevel.INFO, event, fields)

    def warning(self, event: str, **fields: Any) -> None:
        """Log a condition that may need an operator's action."""
        self._log(LogLevel.WARNING, event, fields)

    def error(self, event: str, **fields: Any) -> None:
        """Log an error that ends the daemon, or a bug."""
        self._log(LogLevel.ERROR, event, fields)

    def _log(self, level: LogLevel, event: str, fields: dict[str, Any]) -> None:
        area = event.partition(".")[0]
        wanted = _ORDER[level] >= _ORDER[self._level_of(area)]
        audited = self._audit is not None and _is_audited(area, level, event, fields)
        if not (wanted or audited):
            return
        entry = _entry(level, event, fields)
        if wanted:
            self._main.put(self._form(entry))
        if audited and self._audit is not None:
            self._audit[0].put(json_line(entry))

    # Levels

    def _level_of(self, area: str) -> LogLevel:
        changed = self._changed.get(area)
        if changed is not None:
            level, until = changed
            if until is None or time.monotonic() < until:
                return level
            del self._changed[area]
        return getattr(self._settings.areas, area, None) or self._settings.level

    def levels(self) -> dict[str, dict[str, Any]]:
        """Return, by area, its level, whether it was changed at run time, and the
        seconds left.
        """
        found: dict[str, dict[str, Any]] = {}
        for area in LogAreas.model_fields:
            level = self._level_of(area)
            changed = self._changed.get(area)
            found[area] = {"level": level.value, "changed": changed is not None}
            if changed is not None and changed[1] is not None:
                found[area]["seconds"] = round(changed[1] - time.monotonic(), 1)
        return found

    def change_level(self, area: object, level: object, for_: object = None, *, by: str) -> None:
        """Set the level of one area or of all, until the next reload or for a time.

        area: an area or ``all``. level: a level, or ``default`` for the level in the
        configuration. for_: a duration as in the configuration, None for no end. by:
        the client that asked. Raises LevelRefused.
        """
        areas = (
            list(LogAreas.model_fields)
            if area == "all"
            else [area]
            if isinstance(area, str)
            else []
        )
        if not set(areas) <= set(LogAreas.model_fields) or not areas:
            raise LevelRefused(
                f"there is no such area (give all, or one of {', '.join(LogAreas.model_fields)})"
            )
        if level != "default" and level not in tuple(LogLevel):
            raise LevelRefused(f"there is no such level (give {', '.join(LogLevel)}, or default)")
        try:
            seconds = None if for_ is None else units.duration(for_)
        except ValueError as error:
            raise LevelRefused(str(error)) from None
        if level == "default" and seconds is not None:
            raise LevelRefused(
                "what the configuration says holds without end (give a level, or no time)"
            )
        until = None if seconds is None else time.monotonic() + seconds
        for each in areas:
            if level == "default":
                self._changed.pop(each, None)
            else:
                self._changed[each] = (LogLevel(str(level)), until)
        time_s = {} if seconds is None else {"for_s": seconds}
        self.warning("log.level_changed", area=area, to=str(level), **time_s, by=by)

    # Other settings, other files

    def reopen(self) -> None:
        """Open a new audit file where the old one was moved away; keep the old one if
        that fails.

        Slow where the file system is: to be called in a thread.
        """
        if self._audit is None:
            return
        try:
            self._replace_audit(self._audit, _opened(str(self._settings.audit)))
        except AuditError as error:
            self.error("log.audit_failed", reason=str(error))

    def opened_audit(self, settings: Settings) -> int | None:
        """Return a descriptor of a new audit file in the settings, for ``take_over``,
        or None.

        Slow where the file system is: to be called in a thread. Raises AuditError.
        """
        if settings.audit is None or settings.audit == self._settings.audit:
            return None
        return _opened(settings.audit)

    def precheck(self, settings: Settings) -> list[str]:
        """Return why the settings would be refused, as far as a check without creating
        files shows.

        Slow where the file system is: to be called in a thread.
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

        audit: the result of ``opened_audit`` for them; this object owns it from now on.
        """
        if settings.audit != self._settings.audit:
            self._begin_audit(audit)
        self._changed.clear()
        if settings.format != self._settings.format:
            self._form, target = _place(settings.format, self._stream, self._journal)
            before, self._main = self._main, self._outlet(target, self._form)
            # Lines that wait in the old outlet are written first, if that is quick.
            before.close(0.1)
        self._settings = settings

    def _begin_audit(self, descriptor: int | None) -> None:
        before = self._audit
        if descriptor is None:
            self._audit = None
            if before is not None:
                before[0].close(0.1)
        elif before is None:
            target = Descriptor(descriptor, owned=True)
            self._audit = (self._outlet(target, json_line), target)
        else:
            self._replace_audit(before, descriptor)

    def _replace_audit(self, audit: tuple[Outlet, Descriptor], descriptor: int) -> None:
        outlet, target = audit
        outlet.call(lambda: target.replace(descriptor))

    # Closing

    def flush(self, timeout_s: float = 0.3) -> bool:
        """Write all waiting lines; return False if that takes longer than the time for
        them all.
        """
        end = time.monotonic() + timeout_s
        done = [outlet.flush(max(0.0, end - time.monotonic())) for outlet in self._outlets()]
        return all(done)

    def close(self, timeout_s: float = 0.3) -> None:
        """Write the waiting lines and close; discard those that take longer than the
        time.
        """
        atexit.unregister(self.close)
        end = time.monotonic() + timeout_s
        for outlet in self._outlets():
            outlet.close(max(0.0, end - time.monotonic()))

    def _outlets(self) -> list[Outlet]:
        return [self._main] if self._audit is None else [self._main, self._audit[0]]


def _entry(level: str, event: str, fields: dict[str, Any]) -> Entry:
    now = datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
    return {"timestamp": now, "level": str(level), "event": event, **fields}


def _is_audited(area: str, level: LogLevel, event: str, fields: dict[str, Any]) -> bool:
    """Return whether the event goes to the audit file.

    It does if it shows which clients connected or were refused, what administrators
    did, or what changed.
    """
    if level is LogLevel.DEBUG or event == "daemon.bug":
        return False
    if event == "message.refused":
        return fields.get("to") == "$broker" and fields.get("code") == "denied"
    return area in _AUDITED_AREAS or event in AUDITED


def _place(format: LogFormat, stream: TextIO, journal: str) -> tuple[Form, Target]:
    """Return the form of a line, and its target."""
    if format is LogFormat.JSON:
        return json_line, of_stream(stream)
    if format is LogFormat.CONSOLE or stream.isatty():
        return console(colors=stream.isatty()), of_stream(stream)
    if _is_journal(stream):
        try:
            return journal_entry, Journal(journal)
        except OSError:
            return prefixed, of_stream(stream)
    return json_line, of_stream(stream)


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


class _Nowhere:
    """A logger that discards every event, for brokers inside a program."""

    def __getattr__(self, method: str) -> Callable[..., None]:
        return lambda event, **fields: None


def quiet_log() -> Any:
    """Return a logger that discards every event."""
    return _Nowhere()
