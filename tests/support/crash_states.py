"""What a killed process or a lost power supply leaves of recorded calls on files."""

from __future__ import annotations

import random
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_SHIM = Path(__file__).with_name("disk_shim.c")
_NUMBERS = struct.Struct("=QI")
#: Bytes that a disk writes as a whole.
SECTOR = 512


class Call(NamedTuple):
    """One recorded call; see disk_shim.c."""

    kind: str
    name: str
    offset: int
    data: bytes


def build_shim(directory: Path) -> Path:
    """Compile the file layer; return its library."""
    library = directory / "disk_shim.so"
    command = ["gcc", "-shared", "-fPIC", "-O1", "-o", library, _SHIM, "-ldl"]
    subprocess.run(command, check=True)
    return library


def recorded(log: Path) -> list[Call]:
    """Return the calls in a log."""
    content = log.read_bytes()
    calls, at = [], 0
    while at < len(content):
        length = content[at + 1]
        name = content[at + 2 : at + 2 + length].decode()
        offset, size = _NUMBERS.unpack_from(content, at + 2 + length)
        start = at + 2 + length + _NUMBERS.size
        calls.append(Call(chr(content[at]), name, offset, content[start : start + size]))
        at = start + size
    return calls


class _File:
    """One file: its content, what of it is on disk, and whether its name is."""

    def __init__(self) -> None:
        self.content = bytearray()
        self.on_disk = b""
        #: Whether the file, or its absence, outlasts the power supply.
        self.exists = True
        self.name_on_disk = False


class CrashStates:
    """The files of one directory, call by call."""

    def __init__(self) -> None:
        self._files: dict[str, _File] = {}
        #: Removed files whose removal is not on disk.
        self._removed: dict[str, _File] = {}

    def apply(self, call: Call) -> None:
        """Carry out one call."""
        if call.kind == "o":
            self._files[call.name] = _File()
        elif call.kind == "d":
            self._removed.clear()
            for file in self._files.values():
                file.name_on_disk = True
        elif call.kind == "u":
            file = self._files.pop(call.name, None)
            if file is not None and file.name_on_disk:
                self._removed[call.name] = file
        elif call.kind == "s":
            file = self._files[call.name]
            file.on_disk = bytes(file.content)
        elif call.kind == "t":
            file = self._files[call.name]
            del file.content[call.offset :]
            file.content += bytes(call.offset - len(file.content))
        elif call.kind == "w":
            content = self._files[call.name].content
            content += bytes(max(0, call.offset - len(content)))
            content[call.offset : call.offset + len(call.data)] = call.data

    def after_kill(self, half: Call | None = None) -> dict[str, bytes]:
        """Return the files as a killed process leaves them.

        half: a call of which only the first sectors were carried out.
        """
        files = {name: bytes(file.content) for name, file in self._files.items()}
        if half is not None and half.kind == "w" and half.name in files:
            content = bytearray(files[half.name])
            data = half.data[: len(half.data) // 2 // SECTOR * SECTOR]
            content += bytes(max(0, half.offset - len(content)))
            content[half.offset : half.offset + len(data)] = data
            files[half.name] = bytes(content)
        return files

    def after_power_loss(self, chance: random.Random) -> dict[str, bytes]:
        """Return the files as a disk may leave them that has lost what was not synced.

        Each sector is written or not, in any order.
        """
        files = {}
        for name, file in self._files.items():
            if file.name_on_disk or chance.random() < 0.5:
                files[name] = self._torn(file, chance)
        for name, file in self._removed.items():
            if name not in files and chance.random() < 0.5:
                files[name] = self._torn(file, chance)
        return files

    @staticmethod
    def _torn(file: _File, chance: random.Random) -> bytes:
        mode = chance.choice(("nothing", "everything", "some"))
        if mode == "nothing":
            return file.on_disk
        if mode == "everything":
            return bytes(file.content)
        size = chance.choice((len(file.on_disk), len(file.content)))
        torn = bytearray()
        for start in range(0, size, SECTOR):
            source = chance.choice((file.on_disk, file.content))
            torn += bytes(source[start : start + SECTOR]).ljust(min(SECTOR, size - start), b"\0")
        return bytes(torn[:size])


def write_crash(directory: Path, files: dict[str, bytes]) -> None:
    """Write files into an empty directory."""
    directory.mkdir()
    for name, content in files.items():
        (directory / name).write_bytes(content)


def states(calls: list[Call]) -> Iterator[tuple[int, CrashStates, Call | None]]:
    """Yield the files before each call, with the call, and after the last one."""
    files = CrashStates()
    for number, call in enumerate(calls):
        yield number, files, call
        files.apply(call)
    yield len(calls), files, None


def run_recorded(library: Path, directory: Path, log: Path, *command: str) -> None:
    """Run a Python program whose calls on the files of a directory are recorded."""
    environment = {
        "LD_PRELOAD": str(library),
        "DISK_DIR": str(directory),
        "DISK_LOG": str(log),
        "PYTHONPATH": ":".join(path for path in sys.path if path),
    }
    subprocess.run([sys.executable, *command], env=environment, check=True, timeout=60)
