"""Programs of Debian packages, installed where a test needs them."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from typing import Final

import pytest

_INSTALL_TIMEOUT_S: Final = 600


def install_missing(programs: Mapping[str, str], more: Iterable[str] = ()) -> None:
    """Install what is missing with apt; skip the test, with the reason, if apt can't.

    Args:
        programs: Each program that is needed, and the package that has it.
        more: Packages that are missing in any case.
    """
    missing = [package for program, package in programs.items() if shutil.which(program) is None]
    missing += more
    if not missing:
        return
    listed = " and ".join(missing)
    if shutil.which("apt-get") is None:
        pytest.skip(f"{listed} not installed, and there is no apt-get to install it with")
    if os.geteuid() != 0:
        pytest.skip(f"{listed} not installed, and apt-get needs root")
    done = subprocess.run(
        ["apt-get", "install", "--yes", "--quiet", "--no-install-recommends", *missing],
        env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=_INSTALL_TIMEOUT_S,
        check=False,
    )
    if done.returncode:
        pytest.skip(f"apt-get can't install {listed}: {done.stdout.strip().splitlines()[-1:]}")
