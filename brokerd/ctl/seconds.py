"""The type of the options that are a time."""

from __future__ import annotations

import math
from typing import Any, Final

import click

__all__ = ["DAY_S", "Seconds"]

#: Longest pause between two looks, in seconds: the system takes no infinity.
DAY_S: Final = 86400.0


class Seconds(click.FloatRange):
    """A number of seconds within its bounds; not NaN, which ``FloatRange`` lets pass."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Return the seconds. Fails as a usage error."""
        seconds: float = super().convert(value, param, ctx)
        if math.isnan(seconds):
            self.fail(f"{value!r} is not a number of seconds.", param, ctx)
        return seconds
