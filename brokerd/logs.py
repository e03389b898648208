"""The log: structlog, set up once. One event with fields a line; never a key, a MAC or a body.

Console lines on a terminal, JSON elsewhere (``log.format`` in docs/configuration.md). The events:

    daemon.started  daemon.stopping  daemon.stopped  daemon.failed
    daemon.reloaded  daemon.reload_refused  daemon.killed  daemon.bug
    client.connected  client.disconnected  client.refused  client.slow  client.recovered  client.held
    client.unsubscribed  message.refused  message.dropped  admin.asked
    client.left (closed without having sent a byte, as a health check does; only at level debug)
    listener.paused  listener.not_handed_over
    key.expiring  key.expiring_more (of many clients at once, counted)  key.expired

Those that others can cause at will have a second form, with ``_more`` at its end: many within a second, counted.
"""

from __future__ import annotations

import contextlib
import sys
from typing import Any, TextIO, cast

import structlog

from brokerd.config.values import LogFormat, LogLevel

__all__ = ["make_log", "quiet_log"]

_LEVELS = {LogLevel.DEBUG: 10, LogLevel.INFO: 20, LogLevel.WARNING: 30, LogLevel.ERROR: 40}


def make_log(
    level: LogLevel = LogLevel.INFO, format: LogFormat = LogFormat.AUTO, stream: TextIO | None = None
) -> structlog.typing.FilteringBoundLogger:
    """Return a logger of its own for one daemon; nothing global is changed.

    stream: standard error unless given.
    """
    stream = stream or sys.stderr
    console = format is LogFormat.CONSOLE or (format is LogFormat.AUTO and stream.isatty())
    renderer: structlog.typing.Processor = (
        structlog.dev.ConsoleRenderer(colors=stream.isatty()) if console else structlog.processors.JSONRenderer()
    )
    return cast(
        "structlog.typing.FilteringBoundLogger",
        structlog.wrap_logger(
            structlog.PrintLogger(cast("TextIO", _Patient(stream))),
            processors=[
                structlog.processors.add_log_level,
                structlog.processors.TimeStamper(fmt="iso", utc=True),
                renderer,
            ],
            wrapper_class=structlog.make_filtering_bound_logger(_LEVELS[level]),
            context_class=dict,
        ),
    )


class _Patient:
    """A stream that loses a line rather than raise: messages must go on when the disk is full or nobody reads."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()


class _Nowhere:
    """A logger that keeps nothing, for brokers inside a program."""

    def __getattr__(self, method: str) -> Any:
        return lambda event, **fields: None


def quiet_log() -> Any:
    """Return a logger that keeps nothing."""
    return _Nowhere()
