"""Types the commands of a page into terminals, and compares what they print."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from support.pages import CodeBlock

TIMEOUT_S: Final = 90.0
#: The key that ends a program, as a terminal shows it.
_CTRL_C: Final = "^C"
#: Stands for lines that the page leaves out.
_LEFT_OUT: Final = "..."
#: The project's commands, by the function that each calls.
_COMMANDS: Final = {"brokerd": "brokerd.cli.main", "brokerctl": "brokerd.ctl"}


class Terminal:
    """A command in a directory, and the lines that it has printed so far."""

    def __init__(self, command: str, directory: Path, environ: dict[str, str]) -> None:
        self.lines: list[str] = []
        self._command = command
        self._news = threading.Condition()
        self.process = subprocess.Popen(
            # A shell that was started in the background may ignore Ctrl-C.
            ["sh", "-c", f"trap - INT; exec {command}"],
            cwd=directory,
            env=environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout:
            for line in self.process.stdout:
                with self._news:
                    self.lines.append(line.rstrip("\n"))
                    self._news.notify_all()

    def wait_for_lines(self, count: int) -> None:
        """Wait until the command has printed this number of lines."""
        with self._news:
            assert self._news.wait_for(lambda: len(self.lines) >= count, TIMEOUT_S), (
                f"{self._command} printed {self.lines}"
            )

    def wait_for_end(self) -> None:
        """Wait until the command has ended without an error."""
        status = self.process.wait(TIMEOUT_S)
        self._reader.join(TIMEOUT_S)
        assert status == 0, f"{self._command} ended with {status} and printed {self.lines}"

    def close(self) -> None:
        """End the command, if it still runs."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(TIMEOUT_S)
        self._reader.join(TIMEOUT_S)


def commands_in(directory: Path) -> dict[str, str]:
    """Make the commands of the project and ``python``; return an environment with them."""
    directory.mkdir()
    for name, module in _COMMANDS.items():
        script = directory / name
        script.write_text(f"#!{sys.executable}\nfrom {module} import main\nmain()\n")
        script.chmod(0o755)
    python = directory / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith("BROKERD_")},
        "PATH": f"{directory}:{os.environ['PATH']}",
    }


def type_and_compare(blocks: Sequence[CodeBlock], directory: Path, environ: dict[str, str]) -> None:
    """Type the command of each block into a terminal of its own, one after the other.

    A command whose first line is "ready" is waited for before the next one is typed.
    When the last one has printed a line, Ctrl-C is pressed where a block shows it. The
    last command must end; every command must print what its block shows.
    """
    terminals: list[Terminal] = []
    expected: list[list[str]] = []
    try:
        for block in blocks:
            command, *lines = block.text.splitlines()
            terminals.append(Terminal(command.removeprefix("$ "), directory, environ))
            expected.append([line for line in lines if line != _CTRL_C])
            if lines[:1] == ["ready"]:
                terminals[-1].wait_for_lines(1)
        terminals[-1].wait_for_lines(1)
        for block, terminal in zip(blocks, terminals, strict=True):
            if f"\n{_CTRL_C}\n" in block.text:
                terminal.process.send_signal(signal.SIGINT)
                terminal.wait_for_end()
        terminals[-1].wait_for_end()
        for terminal, lines in zip(terminals, expected, strict=True):
            terminal.wait_for_lines(len(lines))
    finally:
        for terminal in terminals:
            terminal.close()
    for block, terminal, lines in zip(blocks, terminals, expected, strict=True):
        pattern = "".join(
            r"(.*\n)*" if line == _LEFT_OUT else re.escape(line) + r"\n" for line in lines
        )
        printed = "".join(f"{line}\n" for line in terminal.lines)
        assert re.fullmatch(pattern, printed), f"{block.text}\nprinted:\n{printed}"
