"""Reloads at odd moments: one that a bug ends, one asked for before there is anything
to reload.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.running_daemon import Recorder

from brokerd.config.load import load
from brokerd.daemon import daemon, reloader
from brokerd.daemon.reloader import Reloading


def test_a_reload_that_a_bug_ends_is_told_as_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What began with RELOADING ends with READY and a reason, the bug is not hidden,
    and the next reload goes on.
    """
    told: list[str] = []
    supervisor = SimpleNamespace(reloading=lambda: told.append("reloading"), reloaded=told.append)

    async def listen_again() -> None:
        return

    daemon: Any = SimpleNamespace(
        config=SimpleNamespace(clients={}),
        activated=None,
        assigned={},
        serves=True,
        supervisor=supervisor,
        log=Recorder().logger,
        reopen_log=lambda: None,
        listen_again=listen_again,
    )

    def broken(*_: object) -> None:
        raise ZeroDivisionError

    async def twice() -> None:
        subject = Reloading(daemon)
        subject.begin()
        for _ in range(2):
            with pytest.raises(ZeroDivisionError):
                await asyncio.wait_for(subject.run("the test"), 30)

    monkeypatch.setattr(reloader, "prepare", broken)
    asyncio.run(twice())
    assert told == ["reloading", "reload failed"] * 2


def test_a_reload_asked_for_during_the_start_takes_place_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file may have changed since it was read: nothing is refused, and nobody is
    told that the broker stops.
    """
    file = tmp_path / "b.yaml"
    file.touch(mode=0o600)
    file.write_text("listen: [127.0.0.1:0]\nclients: {a: {key: k}}\nmonitor: 127.0.0.1:0\n")
    log = Recorder()

    async def at_once(function: Callable[[], object], **_: object) -> object:
        return function()

    async def serve() -> None:
        broker = daemon.Daemon(load(file), log.logger)

        async def ask_meanwhile(function: Callable[[], object], **_: object) -> object:
            if not log.named("daemon.started"):
                broker.reload_soon("SIGHUP")
            for _ in range(10):
                await asyncio.sleep(0)
            return function()

        monkeypatch.setattr(reloader, "run_in_thread", at_once)
        monkeypatch.setattr(daemon, "run_in_thread", ask_meanwhile)
        async with broker:
            await asyncio.wait_for(broker.wait_until_settled(), 30)

    asyncio.run(serve())
    assert not log.named("daemon.reload_refused")
    order = [
        each.event for each in log.events if each.event in ("daemon.started", "daemon.reloaded")
    ]
    assert order == ["daemon.started", "daemon.reloaded"]
