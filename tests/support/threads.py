"""Functions that run in another thread."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

#: Starts a function in another thread and returns its future: the fixture ``aside``.
Aside = Callable[..., "Future[Any]"]
