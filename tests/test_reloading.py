"""What the service manager is told of a reload that a bug ends."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from brokerd import reloading
from brokerd.reloading import Reloading


def test_a_reload_that_a_bug_ends_is_told_as_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What began with RELOADING ends with READY and a reason, the bug is not hidden, and the next reload goes on."""
    told: list[str] = []
    supervisor = SimpleNamespace(reloading=lambda: told.append("reloading"), reloaded=told.append)
    daemon: Any = SimpleNamespace(
        config=None, handed=None, allotted={}, serves=True, supervisor=supervisor, reopen_log=lambda: None
    )

    def broken(*_: object) -> None:
        raise ZeroDivisionError

    async def twice() -> None:
        subject = Reloading(daemon)
        for _ in range(2):
            with pytest.raises(ZeroDivisionError):
                await asyncio.wait_for(subject.run("the test"), 30)

    monkeypatch.setattr(reloading, "prepare", broken)
    asyncio.run(twice())
    assert told == ["reloading", "it failed"] * 2
