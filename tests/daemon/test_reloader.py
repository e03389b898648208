"""Reloads at odd moments: one that a bug ends, and one requested during the start."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.running_daemon import Recorder

from brokerd.config.load import load
from brokerd.daemon import daemon, garbage, reloader
from brokerd.daemon.reload import compare_running
from brokerd.daemon.reloader import Reloading
from brokerd.net.handshake.keyring import Keyring


def test_reload_ended_by_bug_is_reported_as_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reload that began with RELOADING ends with READY and a reason. The bug is not
    hidden, and the next reload runs.
    """
    states: list[str] = []
    supervisor = SimpleNamespace(
        reloading=lambda: states.append("reloading"), reloaded=states.append
    )

    async def listen_again() -> None:
        return

    daemon: Any = SimpleNamespace(
        config=SimpleNamespace(clients={}),
        activated=None,
        assigned={},
        serves=True,
        server=SimpleNamespace(keyring=Keyring([])),
        supervisor=supervisor,
        log=Recorder().logger,
        reopen_log=lambda: None,
        listen_again=listen_again,
    )

    def broken(*_: object) -> None:
        raise ZeroDivisionError

    async def reload_twice() -> None:
        subject = Reloading(daemon)
        subject.begin()
        for _ in range(2):
            with pytest.raises(ZeroDivisionError):
                await asyncio.wait_for(subject.run("the test"), 30)

    monkeypatch.setattr(reloader, "prepare", broken)
    asyncio.run(reload_twice())
    assert states == ["reloading", "reload failed"] * 2


def test_reload_requested_during_start_runs_after_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file may have changed since it was read. The request is not refused, and no
    message says that the broker stops.
    """
    file = tmp_path / "b.yaml"
    file.touch(mode=0o600)
    file.write_text("listen: [127.0.0.1:0]\nclients: {a: {key: k}}\nmonitor: 127.0.0.1:0\n")
    log = Recorder()

    async def run_at_once(function: Callable[[], object], **_: object) -> object:
        return function()

    async def serve() -> None:
        broker = daemon.Daemon(load(file), log.logger)

        async def request_reload_meanwhile(function: Callable[[], object], **_: object) -> object:
            if not log.named("daemon.started"):
                broker.reload_soon("SIGHUP")
            for _ in range(10):
                await asyncio.sleep(0)
            return function()

        monkeypatch.setattr(reloader, "run_in_thread", run_at_once)
        monkeypatch.setattr(daemon, "run_in_thread", request_reload_meanwhile)
        async with broker:
            await asyncio.wait_for(broker.wait_until_settled(), 30)

    asyncio.run(serve())
    assert not log.named("daemon.reload_refused")
    order = [
        each.event for each in log.events if each.event in ("daemon.started", "daemon.reloaded")
    ]
    assert order == ["daemon.started", "daemon.reloaded"]


def test_reload_of_many_clients_leaves_few_objects_to_collect(tmp_path: Path) -> None:
    """No turn of a reload leaves more young objects than those of some clients, which the
    collector would walk all at once.
    """
    path = tmp_path / "brokerd.yaml"

    def write(queue: str) -> None:
        path.touch(0o600)
        path.write_text(
            f"listen: [{tmp_path}/s]\nclients:\n"
            + "".join(
                f"  c{number}: {{key: 'key{number:061}', queue: {queue}}}\n"
                for number in range(2000)
            )
        )

    async def most_young() -> int:
        async with daemon.Daemon(load(path)) as subject:
            write("2MiB")
            with garbage.undisturbed():
                prepared = compare_running(
                    subject.config,
                    load(path),
                    subject.activated,
                    subject.assigned,
                    subject.server.keyring,
                )
            assert len(prepared.plan.changed) == 2000
            return max(
                sum(len(gc.get_objects(generation=number)) for number in range(2))
                for _ in subject.taking_over(prepared, "the test")
            )

    write("1MiB")
    with garbage.tended():
        assert asyncio.run(most_young()) < 4000
