"""brokerd demo: shows what it promises, leaves nothing behind, and fails when a message
does not arrive.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from rich.console import Console

from brokerd.cli import demo


def run_demo(monkeypatch: pytest.MonkeyPatch, directory: Path) -> tuple[int, str]:
    """Run the demo in this process with its files in the directory; return its exit
    status and what it printed.
    """
    monkeypatch.setattr(tempfile, "tempdir", str(directory))
    output = io.StringIO()
    status = demo.run(Console(file=output, width=60, highlight=False))
    return status, output.getvalue()


def test_demo_shows_messages_and_leaves_no_file(socket_dir: Path) -> None:
    """The command shows three clients exchanging messages, exits with 0 and leaves no
    file, whatever the configuration is.
    """
    done = subprocess.run(
        [sys.executable, "-m", "brokerd.cli.main", "demo"],
        env={**os.environ, "TMPDIR": str(socket_dir), "BROKERD_CONFIG": "/nonexistent"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )

    assert (done.returncode, done.stderr) == (0, "")
    lines = [line.strip() for line in done.stdout.splitlines()]
    assert 'bob receives from alice: "hello, bob"' in lines
    assert "alice receives from bob: 42" in lines
    assert 'bob receives from carol: "hello from a stock Python"' in lines
    assert 'carol receives from bob: "welcome"' in lines
    assert "bob receives from alice: 8 MiB" in lines
    assert lines[-1].startswith("6 messages arrived")
    assert list(socket_dir.iterdir()) == []


def test_demo_prints_whole_stock_client_and_no_key(
    socket_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lines that the stock Python runs are printed unchanged, however narrow the
    terminal is. No key is printed.
    """
    keys: list[str] = []
    new_key = demo.new_key

    def recorded_key() -> str:
        keys.append(new_key())
        return keys[-1]

    monkeypatch.setattr(demo, "new_key", recorded_key)

    status, text = run_demo(monkeypatch, socket_dir)

    assert status == 0
    for line in demo.STOCK_CLIENT.splitlines():
        assert line in text
    assert len(keys) == 3
    assert not any(key in text for key in keys)


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        # Never connects.
        ("raise SystemExit(3)", "TimedOut"),
        # Sends what it should, and does not print what it receives.
        (demo.STOCK_CLIENT.rpartition("print(")[0], "the stock Python received"),
        # Sends something else.
        (demo.STOCK_CLIENT.replace("hello from", "greetings from"), ", expected"),
    ],
    ids=["silent", "deaf", "wrong"],
)
def test_demo_with_missing_message_fails(
    socket_dir: Path, monkeypatch: pytest.MonkeyPatch, program: str, reason: str
) -> None:
    """Unless every message is seen, the exit status is 1, and the reason is printed. No
    file is left then either.
    """
    monkeypatch.setattr(demo, "STOCK_CLIENT", program)
    monkeypatch.setattr(demo, "_TIMEOUT_S", 3.0)

    status, text = run_demo(monkeypatch, socket_dir)

    assert status == 1
    assert "The demo failed: " in text
    assert reason in text.replace("\n", " ")
    assert list(socket_dir.iterdir()) == []


@pytest.mark.skipif(os.name != "posix", reason="the interpreters here are shell scripts")
def test_demo_interpreter_that_does_not_run_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The newest Python on the PATH that starts and has the version in its name is
    used, else the running one.
    """

    def script(name: str, body: str) -> None:
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)

    script("python3.14", "exit 1")
    script("python3.13", "echo 3 9")
    script("python3.12", "echo 3 12")
    monkeypatch.setattr(demo, "_MODERN", (99, 0))
    monkeypatch.setenv("PATH", str(tmp_path))

    assert demo.find_interpreter() == demo.Interpreter(str(tmp_path / "python3.12"), (3, 12))

    (tmp_path / "python3.12").unlink()
    assert demo.find_interpreter() == demo.Interpreter(sys.executable, sys.version_info[:2])


def test_demo_interpreter_of_modern_python_is_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the current Python supports HMAC-SHA256, no other one is searched for, and MD5
    is not needed.
    """
    monkeypatch.setattr(demo, "_MODERN", (3, 0))
    monkeypatch.setenv("PATH", "")

    interpreter = demo.find_interpreter()

    assert (interpreter.path, interpreter.needs_md5) == (sys.executable, False)
