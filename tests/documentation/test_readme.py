"""README.md: its commands and programs do what it shows."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.pages import code_blocks
from support.terminals import Terminal, commands_in
from support.waiting import until

from brokerd.testing import running

BLOCKS = list(code_blocks("README.md"))
TIMEOUT_S = 30


def example(word: str) -> str:
    """Return the one block with this word, without the prompts of the shell."""
    [text] = (block.text for block in BLOCKS if word in block.text)
    return text.replace("$ ", "")


def test_readme_own_broker_passes_a_message(tmp_path: Path) -> None:
    """The commands of "Your own broker in a minute", in three terminals."""
    environ = commands_in(tmp_path / "bin")
    *setup, start = example("brokerd key > keys/alice").splitlines()
    export, listen, send = example("brokerctl listen").splitlines()
    script = tmp_path / "setup.sh"
    script.write_text("\n".join(["set -e", *setup, ""]))
    preparation = Terminal("sh setup.sh", tmp_path, environ)
    preparation.wait_for_end()
    assert preparation.lines[0] == "brokerd.yaml: ok, 2 clients, 1 listener"
    name, address = export.removeprefix("export ").split("=")
    environ[name] = address
    terminals = [Terminal(start, tmp_path, environ)]
    try:
        until(lambda: (tmp_path / "brokerd.sock").exists())
        # Each sets variables before its command, which only a shell does.
        terminals.append(Terminal(f"sh -c '{listen}'", tmp_path, environ))

        def sent() -> bool:
            command = subprocess.run(
                send, shell=True, cwd=tmp_path, env=environ, capture_output=True, check=False
            )
            return command.returncode == 0

        until(sent)
        terminals[1].wait_for_lines(1)
        assert "hello" in terminals[1].lines[0]
    finally:
        for terminal in terminals:
            terminal.close()


def test_readme_check_reports_the_mistakes_that_it_shows(tmp_path: Path) -> None:
    """Both mistakes of the example are found at the places shown."""
    environ = commands_in(tmp_path / "bin")
    (tmp_path / "broken.yaml").write_text(
        "listen: [./brokerd.sock]\n"
        "clients:\n"
        '  alice: {key: "alice\'s own key", send_to: [bbo]}\n'
        '  bob: {key: "bob\'s own key", conections: 2}\n'
    )
    (tmp_path / "broken.yaml").chmod(0o600)
    command, *shown = example("brokerd check broken.yaml").splitlines()
    done = subprocess.run(
        command.split(), cwd=tmp_path, env=environ, capture_output=True, text=True, check=False
    )
    without_columns = [
        [line.split(":")[1], line.partition(": ")[2]]
        for line in (done.stdout + done.stderr).splitlines()
    ]
    for line in shown:
        assert [line.split(":")[1], line.partition(": ")[2]] in without_columns


def test_readme_programs_reach_bob(capsys: pytest.CaptureFixture[str], socket_dir: Path) -> None:
    """The program with the library, and the one without it."""
    clients = {"alice": {"key": "alice's key", "connections": 2, "allow_md5": True}, "bob": {}}
    with running(clients) as broker:
        bob = broker.connect("bob")
        bob.on_request(lambda message: "fine")
        key_file = broker.environ("alice")["BROKERD_KEY_FILE"]
        program = example("import brokerd_client")
        for shown, real in (
            ("/run/brokerd/brokerd.sock", broker.address),
            ("keys/alice", key_file),
        ):
            program = program.replace(shown, real)
        exec(program, {})
        assert capsys.readouterr().out == "fine\n"
        assert bob.recv(timeout=TIMEOUT_S).payload == {"temperature": 21.5}

        stock = example("from multiprocessing.connection import Client")
        subprocess.run(
            [sys.executable, "-c", stock.replace("/run/brokerd/brokerd.sock", broker.address)],
            env=os.environ,
            timeout=TIMEOUT_S,
            check=True,
        )
        assert bob.recv(timeout=TIMEOUT_S).body == b"hello"


def test_readme_test_passes(tmp_path: Path) -> None:
    """The test with the fixture passes as it stands."""
    (tmp_path / "test_readme.py").write_text(example("from brokerd.testing import broker"))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"],
        cwd=tmp_path,
        env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
