"""The log's interface, for every part of the daemon."""

from __future__ import annotations

from typing import Any, Protocol

__all__ = ["Log"]


class Log(Protocol):
    """Where log events go: structlog's bound loggers fit."""

    def debug(self, event: str, **fields: Any) -> Any:
        """Log details for developers."""

    def info(self, event: str, **fields: Any) -> Any:
        """Log normal operation."""

    def warning(self, event: str, **fields: Any) -> Any:
        """Log a condition that may need an operator's action."""

    def error(self, event: str, **fields: Any) -> Any:
        """Log an error that ends the daemon."""
