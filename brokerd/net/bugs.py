"""Bugs of the broker that end one connection, and nothing else."""

from __future__ import annotations

import traceback
from typing import TYPE_CHECKING

from brokerd.log.logger import in_words

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

    from brokerd.net.context import Context

__all__ = ["note_bug"]


def note_bug(context: Context, log: FilteringBoundLogger, error: Exception) -> None:
    """Count and log a bug. log: with the fields of the connection."""
    context.counters.bugs += 1
    context.log_limiter.note(
        "error",
        "daemon.bug",
        type(error).__name__,
        log=log,
        error=in_words(error),
        trace=traceback.format_exception(error),
    )
