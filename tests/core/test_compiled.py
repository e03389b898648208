"""The compiled modules of the core: all of them are used, or none."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from importlib.machinery import EXTENSION_SUFFIXES, PathFinder
from pathlib import Path

import pytest

from brokerd.core import WHY_SOURCES, compiled, routing
from brokerd.core.compiled import MODULES, choose, why_sources

CORE = Path(compiled.__file__).parent
NO_COMPILER = (
    "brokerd was installed without a working C compiler or without Python's headers (on"
    " Debian: apt install gcc python3-dev, then install brokerd again)"
)

#: Prints the routing loop in use and the file of each module that can be imported.
SHOW = f"""
import importlib
from brokerd.core import routing
print(routing.NAME)
for name in {MODULES}:
    try:
        print(importlib.import_module("brokerd.core." + name).__file__)
    except ImportError:
        print("no", name)
"""


def shown(folder: Path, **variables: str) -> list[str]:
    """Return what a new process shows that finds the package brokerd in a folder."""
    environment = {name: each for name, each in os.environ.items() if name != "BROKERD_PURE"}
    library = CORE.parent.parent / "client"
    environment |= {"PYTHONPATH": f"{folder}{os.pathsep}{library}"} | variables
    done = subprocess.run(
        [sys.executable, "-c", SHOW],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as installed, with an empty file for each source and compiled module."""
    monkeypatch.delenv("BROKERD_PURE", raising=False)
    for name in MODULES:
        (tmp_path / f"{name}{EXTENSION_SUFFIXES[0]}").touch()
        (tmp_path / f"{name}.py").touch()
    return tmp_path


def test_compiled_modules_are_those_with_c_types() -> None:
    """A module is listed once, and each .pxd and .pyx file belongs to a listed one."""
    files = {path.stem for path in CORE.iterdir() if path.suffix in (".pxd", ".pyx")}

    assert sorted(set(MODULES)) == list(MODULES)
    if (CORE / "_routing_c.pyx").exists():
        assert files == set(MODULES)


def test_compiled_modules_are_up_to_date() -> None:
    """What was edited runs all the same, as a source. The other tests should run what
    is compiled.
    """
    assert not WHY_SOURCES.endswith("run make ready-test"), WHY_SOURCES


def test_compiled_modules_are_used_where_there_is_a_compiler() -> None:
    """An error of the C compiler in one of them does not stay hidden."""
    if WHY_SOURCES == "BROKERD_PURE=1":
        pytest.skip(WHY_SOURCES)
    cc = (sysconfig.get_config_var("CC") or "cc").split()[0]
    headers = Path(sysconfig.get_path("include"))
    if not (shutil.which(cc) and (headers / "Python.h").exists()):
        pytest.skip("no C compiler, or no headers of Python")

    assert WHY_SOURCES == ""


def test_compiled_modules_in_use_are_all_or_none() -> None:
    """The name of the routing loop holds for all modules of this process."""
    files = shown(CORE.parent.parent)[1:]

    assert (routing.NAME == "compiled") == (WHY_SOURCES == "")
    if WHY_SOURCES == "":
        assert [file for file in files if not file.endswith(tuple(EXTENSION_SUFFIXES))] == []


def test_compiled_modules_with_brokerd_pure_are_not_used() -> None:
    """BROKERD_PURE=1 gives the sources. Nothing imports the compiled loop."""
    name, *files = shown(CORE.parent.parent, BROKERD_PURE="1")

    assert name == "python"
    assert sorted(files) == sorted(
        "no _routing_c" if name == "_routing_c" else str(CORE / f"{name}.py") for name in MODULES
    )


@pytest.mark.parametrize("missing", MODULES)
def test_compiled_modules_with_one_missing_are_not_used(tmp_path: Path, missing: str) -> None:
    """A part that could not be built leaves all sources."""
    if WHY_SOURCES:
        pytest.skip(WHY_SOURCES)
    copy = tmp_path / "brokerd"
    copy.mkdir()
    shutil.copy(CORE.parent / "__init__.py", copy)
    ignored = shutil.ignore_patterns(f"{missing}.*.*", "*.pyx", "__pycache__")
    shutil.copytree(CORE, copy / "core", ignore=ignored)

    name, *files = shown(tmp_path)

    assert name == "python"
    assert {Path(file).suffix for file in files} <= {".py", ""}
    assert all(file.startswith((str(copy), "no _routing_c")) for file in files)


def test_choose_with_all_modules_uses_what_is_compiled(folder: Path) -> None:
    """An installation has no sources of Cython, and its times mean nothing."""
    os.utime(folder / "rate.py", (2e9, 2e9))

    assert choose(str(folder)) == ""
    found = PathFinder.find_spec("rate", [str(folder)])
    assert found is not None
    assert found.origin == str(folder / f"rate{EXTENSION_SUFFIXES[0]}")


def test_choose_with_pure_forced_hides_what_is_compiled(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The variable comes first."""
    monkeypatch.setenv("BROKERD_PURE", "1")

    assert choose(str(folder)) == "BROKERD_PURE=1"
    found = PathFinder.find_spec("rate", [str(folder)])
    del sys.path_importer_cache[str(folder)]
    assert found is not None
    assert found.origin == str(folder / "rate.py")


def test_why_sources_without_one_module_blames_compiler(folder: Path) -> None:
    """So does a folder in a zip file, whose finder stays."""
    (folder / f"rate{EXTENSION_SUFFIXES[0]}").unlink()
    zipped = str(folder / "brokerd.zip" / "brokerd" / "core")

    assert why_sources(str(folder)) == NO_COMPILER
    assert choose(zipped) == NO_COMPILER
    assert zipped not in sys.path_importer_cache


@pytest.mark.parametrize("source", ["_routing_c.pyx", "rate.py", "rate.pxd"])
def test_why_sources_with_newer_source_in_checkout_asks_to_compile(
    folder: Path, source: str
) -> None:
    """What a developer edits runs, even if it has not been compiled since."""
    (folder / "_routing_c.pyx").touch()
    for path in folder.iterdir():
        os.utime(path, (1e9, 1e9))
    assert why_sources(str(folder)) == ""
    (folder / source).touch()

    assert why_sources(str(folder)) == (
        f"{source} is newer than what was compiled from it: run make ready-test"
    )
