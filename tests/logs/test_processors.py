"""The log's structlog processors: each event of a broker passes through them."""

from __future__ import annotations

import asyncio
import io
import json
import time
from pathlib import Path
from typing import Any

import pytest
import structlog
from support.keys import key_of
from support.running_daemon import configuration

from brokerd.config.model import Log
from brokerd.config.values import LogLevel
from brokerd.daemon import Daemon
from brokerd.log.logger import DaemonLog, quiet_log
from brokerd.log.processors import add_header
from brokerd_client import aio
from brokerd_client.errors import AuthenticationError

TIMEOUT_S = 30.0


def test_log_processor_sees_and_changes_every_event(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Everything that a broker logs is an event of structlog, from its daemon,
    listeners and clients.
    """
    stream = io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    seen: list[str] = []

    def plant(logger: object, method_name: str, event_dict: dict[str, Any]) -> dict[str, Any]:
        seen.append(event_dict["event"])
        return {**event_dict, "planted": len(seen)}

    async def serve() -> None:
        daemon = Daemon(configuration("127.0.0.1:0", log={"level": "debug"}))
        assert daemon.own_log is not None
        daemon.own_log.processors.insert(0, plant)
        async with daemon:
            address = str(daemon.addresses[0])
            async with await aio.connect(address, name="alice", key=key_of("alice")) as alice:
                await alice.ping()
            with pytest.raises(AuthenticationError):
                await aio.connect(address, name="alice", key=b"another key")
        assert daemon.own_log.flush(TIMEOUT_S)
        daemon.own_log.close()

    asyncio.run(serve())

    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [(line["event"], line["planted"]) for line in lines] == list(
        zip(seen, range(1, len(seen) + 1), strict=True)
    )
    assert {
        "daemon.started",
        "client.connected",
        "client.disconnected",
        "client.refused",
        "daemon.stopped",
    } <= set(seen)


def test_log_processors_of_two_logs_and_of_program_are_separate() -> None:
    """A log uses neither another log's processors nor structlog's configuration."""

    def fail(logger: object, method_name: str, event_dict: Any) -> Any:
        raise AssertionError(event_dict)

    structlog.configure(processors=[fail], logger_factory=structlog.ReturnLoggerFactory())
    try:
        first, second = io.StringIO(), io.StringIO()
        logs = [
            DaemonLog(Log(), first),
            DaemonLog(Log.model_validate({"format": "console"}), second),
        ]
        for log in logs:
            log.logger.info("client.connected")
            log.close(TIMEOUT_S)
        quiet_log().error("daemon.bug")
    finally:
        structlog.reset_defaults()

    assert first.getvalue().startswith("{")
    assert "[info" in second.getvalue()


def test_log_bound_logger_follows_reload(tmp_path: Path) -> None:
    """A connection's logger uses the format, levels and audit file of the running
    configuration.
    """
    stream, audit = io.StringIO(), tmp_path / "audit"
    log = DaemonLog(Log(), stream)
    bound = log.logger.bind(name="alice", peer="unix uid=0")
    bound.info("client.connected")
    settings = Log.model_validate({"format": "console", "level": "error", "audit": str(audit)})
    log.take_over(settings, log.opened_audit(settings))
    bound.info("client.disconnected", reason="no reason")
    bound.error("daemon.failed")
    log.close(TIMEOUT_S)

    first, second = stream.getvalue().splitlines()
    assert list(json.loads(first)) == ["timestamp", "level", "event", "name", "peer"]
    assert "daemon.failed" in second
    assert "name=alice" in second
    entries = [json.loads(line) for line in audit.read_text().splitlines()]
    assert [list(entry) for entry in entries] == [
        ["timestamp", "level", "event", "name", "peer", "reason"],
        ["timestamp", "level", "event", "name", "peer"],
    ]


@pytest.mark.parametrize("method", ["debug", "info", "warning", "error"])
def test_log_quiet_one_accepts_every_call(method: str) -> None:
    """A program that embeds a broker sees nothing of its log."""
    log = quiet_log().bind(name="alice")

    assert getattr(log, method)("client.connected", peer="unix") is None


def test_log_event_below_level_reaches_no_processor(tmp_path: Path) -> None:
    """An event below the level costs no more than its call. With an audit file, only
    events for that file pass.
    """
    seen: list[str] = []

    def plant(logger: object, method_name: str, event_dict: dict[str, Any]) -> dict[str, Any]:
        seen.append(event_dict["event"])
        return event_dict

    log = DaemonLog(Log.model_validate({"level": "warning"}), io.StringIO())
    bound = log.logger.bind(name="alice")
    for settings in (Log(level=LogLevel.WARNING), Log(level=LogLevel.ERROR, audit=f"{tmp_path}/a")):
        log.take_over(settings, log.opened_audit(settings))
        log.processors.insert(0, plant)
        bound.debug("message.dropped")
        bound.info("client.connected")
        bound.warning("client.slow")
    log.close(TIMEOUT_S)

    assert seen == ["client.slow", "client.connected"]


def test_header_timestamp_is_the_time_to_the_microsecond(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each second has its own text, and a fraction keeps its leading zeros."""
    seen = []
    for nanoseconds in (999_999_999, 1_000_000_999, 1_000_042_000):
        monkeypatch.setattr(time, "time_ns", lambda nanoseconds=nanoseconds: nanoseconds)
        seen.append(add_header(None, "info", {"event": "daemon.started"})["timestamp"])
    assert seen == [
        "1970-01-01T00:00:00.999999Z",
        "1970-01-01T00:00:01.000000Z",
        "1970-01-01T00:00:01.000042Z",
    ]
