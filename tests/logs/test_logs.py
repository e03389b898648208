"""The log of a daemon: levels by area, the audit, and where they are written."""

from __future__ import annotations

import ast
import io
import json
import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from brokerd.config.model import Log, LogAreas
from brokerd.log import logger as logs
from brokerd.log.levels import LevelRefused
from brokerd.log.logger import AuditError, DaemonLog

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 30.0


@contextmanager
def logging_to(stream: io.StringIO, **settings: Any) -> Iterator[DaemonLog]:
    """Yield a log; when the block has ended, all its lines are in the stream."""
    log = DaemonLog(Log.model_validate(settings), stream)
    yield log
    assert log.flush(TIMEOUT_S)
    log.close(TIMEOUT_S)


def events(stream: io.StringIO) -> list[str]:
    return [json.loads(line)["event"] for line in stream.getvalue().splitlines()]


def test_log_line_has_time_level_event_and_fields() -> None:
    """They are in this order, one JSON object per line."""
    stream = io.StringIO()
    with logging_to(stream) as log:
        log.logger.warning("client.slow", name="bob", waiting=5)

    entry = json.loads(stream.getvalue())
    assert list(entry) == ["timestamp", "level", "event", "name", "waiting"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", entry["timestamp"])
    assert (entry["level"], entry["event"]) == ("warning", "client.slow")


def test_log_area_with_own_level_uses_it() -> None:
    """The level of an area decides on its events, the general level on every other
    event.
    """
    stream = io.StringIO()
    with logging_to(stream, level="warning", areas={"client": "debug", "daemon": "error"}) as log:
        log.logger.debug("client.held")
        log.logger.info("message.refused")
        log.logger.warning("message.dropped")
        log.logger.warning("daemon.killed")
        log.logger.error("daemon.failed")

    assert events(stream) == ["client.held", "message.dropped", "daemon.failed"]


def test_log_level_changes_at_runtime_and_back() -> None:
    """It changes for one area, for all, and back to the configuration. Each change is
    an event with the name of the client that made it.
    """
    stream = io.StringIO()
    with logging_to(stream) as log:
        log.logger.debug("client.held", number=1)
        log.change_level("client", "debug", by="root")
        log.logger.debug("client.held", number=2)
        log.logger.debug("message.refused", number=3)
        log.change_level("all", "error", by="root")
        log.logger.info("client.connected")
        log.change_level("all", "default", by="root")
        log.logger.debug("client.held", number=4)
        log.logger.info("client.connected")

    entries = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [entry["event"] for entry in entries] == [
        "log.level_changed",
        "client.held",
        "log.level_changed",
        "client.connected",
    ]
    assert {key: entries[0][key] for key in ("area", "to", "by")} == {
        "area": "client",
        "to": "debug",
        "by": "root",
    }


def test_log_level_with_duration_ends_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """When the time is over, the former level holds again."""
    now = 100.0
    monkeypatch.setattr(logs.time, "monotonic", lambda: now)  # type: ignore[attr-defined]
    log = DaemonLog(Log(), io.StringIO())
    log.change_level("client", "debug", "10m", by="root")
    assert log.levels()["client"] == {"level": "debug", "changed": True, "seconds": 600.0}
    now += 599
    assert log.levels()["client"]["level"] == "debug"
    now += 2
    assert log.levels()["client"] == {"level": "info", "changed": False}
    monkeypatch.undo()
    log.close()


def test_log_reload_resets_changed_levels() -> None:
    """The configuration's levels hold again, and its new ones at once."""
    stream = io.StringIO()
    with logging_to(stream) as log:
        log.change_level("client", "debug", by="root")
        log.take_over(Log.model_validate({"areas": {"message": "debug"}}))
        assert {
            area: state["level"]
            for area, state in log.levels().items()
            if area in ("client", "message")
        } == {
            "client": "info",
            "message": "debug",
        }
        log.take_over(Log.model_validate({"format": "console"}))
        log.logger.info("client.connected")

    assert "client.connected" in stream.getvalue().splitlines()[-1]
    assert not stream.getvalue().splitlines()[-1].startswith("{")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("cliant", "debug"), "area is not valid"),
        ((None, "debug"), "area is not valid"),
        ((["client"], "debug"), "area is not valid"),
        (("client", "loud"), "level is not valid"),
        (("client", None), "level is not valid"),
        (("client", ["debug"]), "level is not valid"),
        (("client", "debug", "long"), "is not a valid duration"),
        (("client", "debug", []), "is not a valid duration"),
        (("client", "default", "1m"), "has no end"),
    ],
)
def test_log_level_invalid_is_refused(arguments: Any, message: str) -> None:
    """Nothing changes, and the message says what would be right."""
    log = DaemonLog(Log(), io.StringIO())

    with pytest.raises(LevelRefused, match=message):
        log.change_level(*arguments, by="root")

    assert not any(state["changed"] for state in log.levels().values())
    log.close()


def test_audit_records_access_admin_operations_and_changes(tmp_path: Path) -> None:
    """Whatever the levels are, it records accepted and refused connections, admin
    operations and changes; nothing else.
    """
    path = tmp_path / "audit"
    with logging_to(io.StringIO(), level="error", audit=str(path)) as log:
        log.logger.info("daemon.started")
        log.logger.info("client.connected", name="alice", key="0123abcd")
        log.logger.warning("client.refused", reason="unknown key")
        log.logger.warning("client.slow")
        log.logger.warning("message.refused", to="bob", code="denied")
        log.logger.warning("message.refused", to="$broker", code="denied")
        log.logger.info("admin.asked", op="disconnect")
        log.logger.debug("admin.asked", op="stats")
        log.logger.error("daemon.bug")
        log.change_level("client", "debug", by="root")

    assert [
        (entry["event"], entry.get("to"))
        for entry in map(json.loads, path.read_text().splitlines())
    ] == [
        ("daemon.started", None),
        ("client.connected", None),
        ("client.refused", None),
        ("message.refused", "$broker"),
        ("admin.asked", None),
        ("log.level_changed", "debug"),
    ]
    assert path.stat().st_mode & 0o777 == 0o600


def test_audit_reopened_after_rename_loses_no_line(tmp_path: Path) -> None:
    """Earlier lines are in the old file, later lines in the new one, and none is
    missing.
    """
    path = tmp_path / "audit"
    with logging_to(io.StringIO(), audit=str(path)) as log:
        for number in range(100):
            log.logger.info("daemon.reloaded", number=number)
            if number == 49:
                path.rename(tmp_path / "audit.1")
                log.reopen()

    old, new = (tmp_path / "audit.1").read_text().splitlines(), path.read_text().splitlines()
    assert [json.loads(line)["number"] for line in (*old, *new)] == list(range(100))
    assert json.loads(new[0])["number"] == 50 or len(old) >= 50


def test_audit_reopen_failed_continues_with_old_file(tmp_path: Path) -> None:
    """The old file is still written, and the log says why there is no new one."""
    directory = tmp_path / "d"
    directory.mkdir()
    stream = io.StringIO()
    with logging_to(stream, audit=str(directory / "audit")) as log:
        directory.rename(tmp_path / "moved")
        log.reopen()
        log.logger.info("daemon.reloaded")

    assert events(stream) == ["log.audit_failed", "daemon.reloaded"]
    assert "daemon.reloaded" in (tmp_path / "moved" / "audit").read_text()


def test_audit_file_that_can_not_be_opened_is_refused(tmp_path: Path) -> None:
    """It is an error at the start and in a reload, which then changes nothing. The
    message names the file and the reason.
    """
    bad = Log.model_validate({"audit": str(tmp_path / "none" / "audit")})
    with pytest.raises(AuditError, match=r"none/audit can't be opened: No such file or directory"):
        DaemonLog(bad, io.StringIO())
    log = DaemonLog(Log(), io.StringIO())
    with pytest.raises(AuditError):
        log.opened_audit(bad)
    with pytest.raises(AuditError):
        log.opened_audit(Log.model_validate({"audit": str(tmp_path)}))
    log.close()


def test_audit_reload_opens_replaces_and_closes_file(tmp_path: Path) -> None:
    """A reload may name a file, another file, or none."""
    first, second = tmp_path / "1", tmp_path / "2"
    with logging_to(io.StringIO()) as log:
        for audit in (str(first), str(second), None):
            settings = Log.model_validate({} if audit is None else {"audit": audit})
            log.take_over(settings, log.opened_audit(settings))
            log.logger.info("daemon.reloaded", to=audit)
            assert log.flush(TIMEOUT_S)

    assert [json.loads(path.read_text())["to"] for path in (first, second)] == [
        str(first),
        str(second),
    ]


class Stream(io.StringIO):
    """A stream with the descriptor of something else."""

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self._descriptor = descriptor

    def fileno(self) -> int:
        return self._descriptor


@pytest.fixture
def journal_stream(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Stream, int]]:
    """Return a standard error that systemd has connected to the journal, and a descriptor
    from which its bytes can be read.
    """
    reading, writing = os.pipe()
    status = os.fstat(writing)
    monkeypatch.setenv("JOURNAL_STREAM", f"{status.st_dev}:{status.st_ino}")
    yield Stream(writing), reading
    os.close(reading)
    os.close(writing)


def test_log_under_systemd_goes_to_journal(
    socket_dir: Path, journal_stream: tuple[Stream, int]
) -> None:
    """If standard error is the journal, entries have priorities and fields. A JSON log
    has to be configured.
    """
    stream, reading = journal_stream
    path = str(socket_dir / "journal")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as journal:
        journal.bind(path)
        journal.settimeout(TIMEOUT_S)
        log = DaemonLog(Log(), stream, journal=path)
        log.logger.warning("client.refused", name="alice\nPRIORITY=0", reason="unknown key")
        entry = journal.recv(10_000).decode()
        assert entry.splitlines() == [
            "PRIORITY=4",
            "SYSLOG_IDENTIFIER=brokerd",
            'MESSAGE=client.refused name="alice\\nPRIORITY=0" reason="unknown key"',
            "BROKERD_EVENT=client.refused",
            "BROKERD_NAME=alice\\nPRIORITY=0",
            "BROKERD_REASON=unknown key",
        ]
        log.close()
        log = DaemonLog(Log.model_validate({"format": "json"}), stream, journal=path)
        log.logger.info("client.connected")
        assert json.loads(os.read(reading, 10_000))["event"] == "client.connected"
        log.close()


def test_log_under_systemd_without_journal_socket_uses_prefixes(
    socket_dir: Path, journal_stream: tuple[Stream, int]
) -> None:
    """If a sandbox hides the socket, priorities still reach the journal."""
    stream, reading = journal_stream
    log = DaemonLog(Log(), stream, journal=str(socket_dir / "none"))
    log.logger.error("daemon.failed", reason="no")
    assert os.read(reading, 10_000) == b"<3>daemon.failed reason=no\n"
    log.close()


def test_log_stream_other_than_journal_gets_json(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A program started by a service inherits the variable, but its standard error may
    be another file.
    """
    monkeypatch.setenv("JOURNAL_STREAM", "1:2")
    with (tmp_path / "log").open("w") as stream:
        log = DaemonLog(Log(), stream)
        log.logger.info("client.connected")
        log.close(TIMEOUT_S)
    assert json.loads((tmp_path / "log").read_text())["event"] == "client.connected"


def test_log_close_waits_for_sink_on_busy_machine() -> None:
    """The last lines are written if the sink's thread runs within a second."""

    class Late(io.StringIO):
        def write(self, text: str) -> int:
            time.sleep(0.5)
            return super().write(text)

    stream = Late()
    log = DaemonLog(Log(), stream)
    log.logger.info("daemon.stopped")
    log.close()
    assert events(stream) == ["daemon.stopped"]


def called_events() -> set[str]:
    """Return every event that the daemon logs or notes, read from its source."""
    names = set()
    for path in (ROOT / "brokerd").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, (ast.Attribute, ast.Name)):
                name = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id
                if name in ("debug", "info", "warning", "error", "note", "_say", "add_header"):
                    leaves = [leaf for each in node.args for leaf in _either(each)]
                    texts = [each.value for each in leaves if isinstance(each, ast.Constant)]
                    names |= {
                        text
                        for text in texts
                        if isinstance(text, str) and re.fullmatch(r"[a-z]+\.[a-z_]+", text)
                    }
    # The counted forms are documented together, not one by one.
    return {event for event in names if event.removesuffix("_more") not in names - {event}}


def _either(node: ast.expr) -> list[ast.expr]:
    """Return both sides of a choice, the values of a mapping, or else the expression
    itself.
    """
    if isinstance(node, ast.IfExp):
        return [*_either(node.body), *_either(node.orelse)]
    return node.values if isinstance(node, ast.Dict) else [node]


def test_docs_list_every_log_event_and_no_other() -> None:
    """The source, the list in brokerd/log/logger.py and the table in docs/operations.md
    name the same events.
    """
    called = called_events()
    listed = set(
        re.findall(r"\b[a-z]+\.[a-z_]+\b", re.search(r"(?s)\n\n    .*?\n\n", logs.__doc__ or "")[0])
    )  # type: ignore[index]
    section = (
        (ROOT / "docs" / "operations.md")
        .read_text(encoding="utf-8")
        .partition("\n## Log events\n")[2]
    )
    section = section.partition("\n## ")[0]
    table = set(re.findall(r"(?m)^\| `([a-z]+\.[a-z_]+)` \|", section))

    assert len(called) > 20
    assert listed == called
    assert table == called


def test_log_areas_of_configuration_are_those_of_events() -> None:
    """The areas of the configuration are the first words of the events."""
    assert {event.partition(".")[0] for event in called_events()} == set(LogAreas.model_fields)
