"""What every part of the daemon may ask of the log."""

from __future__ import annotations

from typing import Any, Protocol

__all__ = ["Log"]


class Log(Protocol):
    """Where events go: structlog's bound loggers are one."""

    def debug(self, event: str, **fields: Any) -> Any:
        """Log what only a developer wants to see."""

    def info(self, event: str, **fields: Any) -> Any:
        """Log what happened."""

    def warning(self, event: str, **fields: Any) -> Any:
        """Log what an operator may have to act on."""

    def error(self, event: str, **fields: Any) -> Any:
        """Log what ends the daemon."""
