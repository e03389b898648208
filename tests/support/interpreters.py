"""Finds the Pythons of this machine: by name on PATH, by ``pyenv``, and in
BROKERD_TEST_PYTHONS (paths, as in PATH).
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

#: Every Python that is still in use and whose standard library speaks the protocol.
ALL_VERSIONS = ("2.7", *(f"3.{minor}" for minor in range(6, 16)))
SUPPORTED_VERSIONS = ("3.11", "3.12", "3.13", "3.14", "3.15")


@functools.cache
def interpreters() -> dict[str, str]:
    """Return the path of an interpreter for each version found, such as ``{"3.12":
    "/usr/bin/python3.12"}``.
    """
    candidates = [
        path for path in os.environ.get("BROKERD_TEST_PYTHONS", "").split(os.pathsep) if path
    ]
    candidates += [path for version in ALL_VERSIONS if (path := shutil.which(f"python{version}"))]
    if pyenv := shutil.which("pyenv"):
        root = subprocess.run(
            [pyenv, "root"], capture_output=True, text=True, timeout=30, check=False
        ).stdout.strip()
        candidates += (
            [str(path) for path in sorted(Path(root).glob("versions/*/bin/python"))] if root else []
        )
    with ThreadPoolExecutor(4) as pool:
        versions = list(pool.map(_version, candidates))
    found: dict[str, str] = {}
    for version, path in zip(versions, candidates, strict=True):
        if version in ALL_VERSIONS:
            found.setdefault(version, path)
    return found


def _version(path: str) -> str:
    """Return the version of an interpreter; "" for what does not run, as a name that
    stands for no version does.
    """
    script = "import sys; print('%d.%d' % sys.version_info[:2])"
    try:
        ran = subprocess.run(
            [path, "-E", "-c", script], capture_output=True, text=True, timeout=30, check=False
        )
    except OSError:
        return ""
    return ran.stdout.strip()
