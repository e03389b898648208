"""`.ci/setup.sh` where index and locks differ, with the real pip in a dry run."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SETUP = ROOT / ".ci" / "setup.sh"

#: A project whose installation pip can prepare without a download.
PROJECT = """
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]

[project]
name = "checkout"
version = "1"
dependencies = ["thing"]
"""

#: The smallest build backend that ``pip install --editable`` accepts.
BACKEND = """
from pathlib import Path

def prepare_metadata_for_build_editable(directory, config_settings=None):
    (Path(directory) / "checkout-1.dist-info").mkdir()
    (Path(directory) / "checkout-1.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\\nName: checkout\\nVersion: 1\\nRequires-Dist: thing\\n"
    )
    return "checkout-1.dist-info"

def build_editable(*arguments): raise NotImplementedError
def build_wheel(*arguments): raise NotImplementedError
"""

pytestmark = [
    pytest.mark.skipif(os.name == "nt", reason="a script for POSIX shells"),
    pytest.mark.skipif(
        not (3, 11) <= sys.version_info[:2] <= (3, 15),
        reason="the locks are for Python 3.11 to 3.15",
    ),
    pytest.mark.skipif(
        importlib.util.find_spec("pip") is None, reason="this environment has no pip"
    ),
]


class Checkout:
    """A project with locks, an environment, and an index on disk with one package in
    it: thing 1.0.
    """

    def __init__(self, path: Path) -> None:
        self.path = path / "checkout"
        self.index = path / "index"
        self.venv = self.path / ".venv"
        (self.path / ".ci").mkdir(parents=True)
        (self.venv / "bin").mkdir(parents=True)
        self.index.mkdir()
        shutil.copy(SETUP, self.path / ".ci")
        (self.path / "pyproject.toml").write_text(PROJECT, encoding="utf-8")
        (self.path / "backend.py").write_text(BACKEND, encoding="utf-8")
        python = self.venv / "bin" / "python"
        python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n', encoding="utf-8")
        python.chmod(0o755)
        wheel = self.index / "thing-1.0-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as file:
            file.writestr("thing.py", "")
            file.writestr(
                "thing-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: thing\nVersion: 1.0\n"
            )
            file.writestr(
                "thing-1.0.dist-info/WHEEL",
                "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
            )
            file.writestr("thing-1.0.dist-info/RECORD", "")
        self.digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
        (self.path / ".ci" / "requirements-build.txt").touch()

    def lock(self, requirement: str) -> None:
        (self.path / ".ci" / "requirements-run.txt").write_text(
            f"{requirement}\n", encoding="utf-8"
        )

    def set_up(self, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run the script with this index only; pip makes a dry run."""
        environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith("PIP_") and name not in ("LOCKED", "UNLOCKED")
        }
        environment |= {
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_NO_INDEX": "1",
            "PIP_FIND_LINKS": str(self.index),
            "PIP_DRY_RUN": "1",
            "PIP_NO_CACHE_DIR": "1",
        }
        return subprocess.run(
            [".ci/setup.sh", ".venv", "run"],
            cwd=self.path,
            env=environment | variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
            check=False,
        )

    @property
    def ready(self) -> bool:
        """Whether the script treats the environment as complete."""
        return (self.venv / ".installed-run").exists()


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    """A checkout without a lock yet."""
    return Checkout(tmp_path)


def test_setup_locked_package_is_installed_silently(checkout: Checkout) -> None:
    """The file with the locked hash is installed, even if nothing else is allowed."""
    checkout.lock(f"thing==1.0 --hash=sha256:{checkout.digest}")

    done = checkout.set_up(LOCKED="1")

    assert done.returncode == 0, done.stdout
    assert done.stdout == "installing into .venv, which takes a minute or two ...\n"
    assert checkout.ready


def test_setup_file_with_other_hash_is_refused(checkout: Checkout) -> None:
    """A hash that does not match ends the setup; nothing else is tried."""
    checkout.lock(f"thing==1.0 --hash=sha256:{'0' * 64}")

    done = checkout.set_up()

    assert done.returncode != 0
    assert "is not the one that is locked" in done.stdout
    assert "NOT LOCKED" not in done.stdout
    assert not checkout.ready


def test_setup_lock_without_hash_is_refused(checkout: Checkout) -> None:
    """A requirement that was written into the lock by hand ends the setup."""
    checkout.lock("thing==1.0")

    done = checkout.set_up()

    assert done.returncode != 0
    assert "Hashes are required" in done.stdout
    assert "NOT LOCKED" not in done.stdout
    assert not checkout.ready


def test_setup_locked_version_missing_from_index_is_reported(checkout: Checkout) -> None:
    """A version that pyproject.toml allows is installed in its place. A message names
    the missing version.
    """
    checkout.lock(f"thing==2.0 --hash=sha256:{'0' * 64}")

    done = checkout.set_up()

    assert done.returncode == 0, done.stdout
    assert "No matching distribution found for thing==2.0" in done.stdout
    assert "*** NOT LOCKED: " in done.stdout
    assert checkout.ready


def test_setup_with_locked_refuses_version_missing_from_index(checkout: Checkout) -> None:
    """With LOCKED=1 a version that the index lacks is an error. This holds even in an
    environment that was set up without it.
    """
    checkout.lock(f"thing==2.0 --hash=sha256:{'0' * 64}")
    assert checkout.set_up().returncode == 0
    assert checkout.set_up().stdout == ""

    done = checkout.set_up(LOCKED="1")

    assert done.returncode != 0
    assert "LOCKED is set" in done.stdout
    assert "NOT LOCKED" not in done.stdout


def test_setup_with_unlocked_installs_unlocked_versions_once(checkout: Checkout) -> None:
    """UNLOCKED=1 does so even in an environment with the locked versions. A second call
    installs nothing.
    """
    checkout.lock(f"thing==1.0 --hash=sha256:{checkout.digest}")
    assert checkout.set_up().returncode == 0

    done = checkout.set_up(UNLOCKED="1")

    assert done.returncode == 0, done.stdout
    assert "*** NOT LOCKED: " in done.stdout
    assert checkout.set_up(UNLOCKED="1").stdout == ""


def test_setup_with_locked_and_unlocked_is_refused(checkout: Checkout) -> None:
    """LOCKED=1 with UNLOCKED=1 is an error, not a guess, whatever is installed."""
    done = checkout.set_up(LOCKED="1", UNLOCKED="1")

    assert done.returncode != 0
    assert "both" in done.stdout
    assert not checkout.ready

    checkout.lock(f"thing==1.0 --hash=sha256:{checkout.digest}")
    assert checkout.set_up().returncode == 0
    assert checkout.set_up(LOCKED="1", UNLOCKED="1").returncode != 0


@pytest.mark.parametrize("source", ["brokerd/core/rate.py", "brokerd/core/rate.pxd"])
def test_setup_with_edited_source_of_compiled_module_compiles_once(
    checkout: Checkout, source: str
) -> None:
    """Nothing is installed again. Other modules of the core are not compiled."""
    core = checkout.path / "brokerd" / "core"
    core.mkdir(parents=True)
    for name in ("rate.py", "rate.pxd", "room.py"):
        (core / name).touch()
    (checkout.path / "setup.py").write_text("import sys; print(*sys.argv[1:])\n", encoding="utf-8")
    checkout.lock(f"thing==1.0 --hash=sha256:{checkout.digest}")
    assert checkout.set_up().returncode == 0
    for path in checkout.path.rglob("*"):
        os.utime(path, (1e9, 1e9))
    os.utime(core / "room.py", (1.2e9, 1.2e9))
    assert checkout.set_up().stdout == ""
    os.utime(checkout.path / source, (1.2e9, 1.2e9))

    done = checkout.set_up()

    assert done.returncode == 0, done.stdout
    said, command = done.stdout.splitlines()
    assert said == "compiling what has changed ..."
    assert command.startswith("--quiet build_ext --inplace ")
    assert checkout.set_up().stdout == ""
