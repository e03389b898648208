"""The installation holds both packages, their type marks and commands, and no tests."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import brokerd
import brokerd_client
from brokerd.core.compiled import MODULES

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
CLIENT = tomllib.loads((ROOT / "client" / "pyproject.toml").read_text(encoding="utf-8"))
FOLDERS = {"brokerd": ROOT / "brokerd", "brokerd_client": ROOT / "client" / "brokerd_client"}
#: Where the wheel of brokerd has its copy of the library.
BUNDLED = "brokerd/_bundled"

#: Run where the checkout is not the current directory; prints where each package came
#: from.
IMPORT_BOTH = (
    "import brokerd, brokerd.config, brokerd.core, brokerd.net, brokerd_client,"
    " brokerd_client.wire.handshake;print(brokerd.__file__); print(brokerd_client.__file__)"
)


def packages_on_disk() -> set[str]:
    """Return the dotted name of every folder with an ``__init__.py`` in the two
    packages.
    """
    return {
        ".".join((package, *marker.parent.relative_to(folder).parts))
        for package, folder in FOLDERS.items()
        for marker in folder.rglob("__init__.py")
    }


def run(*command: str | Path, cwd: Path) -> str:
    """Return the output of a command; fail with that output if the command fails."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("PYTHONPATH", "VIRTUAL_ENV")
    }
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_packaging_list_holds_every_package() -> None:
    """Every package on disk is in pyproject.toml's list. A forgotten package would be
    missing from the wheel.
    """
    packages = packages_on_disk()

    assert set(PROJECT["tool"]["setuptools"]["packages"]) == packages
    assert set(CLIENT["tool"]["setuptools"]["packages"]) == {
        package for package in packages if package.startswith("brokerd_client")
    }


def test_distributions_have_one_version_and_license() -> None:
    """The library, the daemon and the project have one version, and one license."""
    assert brokerd_client.__version__ == brokerd.__version__ == PROJECT["project"]["version"]
    assert CLIENT["project"]["dynamic"] == ["version"]
    assert (ROOT / "client" / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()


def test_client_distribution_requires_no_package() -> None:
    """The library installs alone, on Python 3.9 and later."""
    assert CLIENT["project"]["dependencies"] == []
    assert CLIENT["project"]["requires-python"] == ">=3.9"


def test_packaging_folder_with_modules_has_init_file() -> None:
    """Every folder with modules has its ``__init__.py``. An import from the checkout
    would work without it.
    """
    for folder in FOLDERS.values():
        for path in folder.rglob("*.py"):
            assert (path.parent / "__init__.py").exists(), (
                f"{path.parent} has modules and no __init__.py"
            )


def test_packaging_installed_packages_import_outside_checkout(tmp_path: Path) -> None:
    """The installation that runs these tests imports both packages from outside the
    checkout.
    """
    files = run(sys.executable, "-c", IMPORT_BOTH, cwd=tmp_path).splitlines()

    assert [Path(file).parent.name for file in files] == ["brokerd", "brokerd_client"]


def test_packaging_command_has_its_function() -> None:
    """The functions behind the commands exist. A missing one would only fail when the
    command starts.
    """
    for target in PROJECT["project"]["scripts"].values():
        module, _, function = target.partition(":")
        run(
            sys.executable,
            "-c",
            f"from {module} import {function}; assert callable({function})",
            cwd=ROOT.parent,
        )


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources: builds leave files behind, and old ones must not count."""
    copy = tmp_path_factory.mktemp("checkout") / "brokerd"
    copy.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, copy)
    for folder in ("brokerd", "client", "tests"):
        shutil.copytree(
            ROOT / folder,
            copy / folder,
            ignore=shutil.ignore_patterns("__pycache__", "*.so", "*.c", "build", "*.egg-info"),
        )
    return copy


def sources(package: str) -> set[str]:
    """Return the files of a package that a wheel has to contain, as paths below it."""
    folder = FOLDERS[package]
    return {
        str(Path(package) / path.relative_to(folder))
        for path in [*folder.rglob("*.py"), *folder.rglob("*.pyi"), folder / "py.typed"]
    }


def files_of(wheel: Path) -> set[str]:
    """Return the files in a wheel without its metadata."""
    return {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}


@pytest.fixture(scope="module")
def wheels(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The wheels of both distributions, by their names."""
    folder = tmp_path_factory.mktemp("wheels")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder]
    run(*pip, checkout, checkout / "client", cwd=folder)
    return {path.name.partition("-")[0]: path for path in folder.glob("*.whl")}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_wheel_holds_packages_and_nothing_else(wheels: dict[str, Path]) -> None:
    """Every module and both py.typed are in the wheel; tests and caches are not."""
    files = files_of(wheels["brokerd"])

    bundled = {f"{BUNDLED}/{name}" for name in sources("brokerd_client")}
    expected = sources("brokerd") | bundled | {"brokerd.pth"}
    assert expected <= files
    compiled = files - expected
    assert {Path(name).suffix for name in compiled} <= {".so", ".pyd"}
    assert {name.partition(".")[0] for name in compiled} in (
        set(),
        {"brokerd/net/handshake/_key_search_c", *(f"brokerd/core/{name}" for name in MODULES)},
    )


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_wheel_of_client_is_pure_and_shares_no_file(wheels: dict[str, Path]) -> None:
    """It holds the library alone, and pip removes neither distribution with the other."""
    files = files_of(wheels["brokerd_client"])

    assert wheels["brokerd_client"].name.endswith("-py3-none-any.whl")
    assert files == sources("brokerd_client")
    assert files & files_of(wheels["brokerd"]) == set()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_sdists_build_the_same_wheels(
    checkout: Path, wheels: dict[str, Path], tmp_path: Path
) -> None:
    """What an index is given is whole: a wheel from an sdist is one from the checkout."""
    for name, source in (("brokerd", checkout), ("brokerd_client", checkout / "client")):
        program = f"from setuptools.build_meta import build_sdist; build_sdist({str(tmp_path)!r})"
        run(sys.executable, "-c", program, cwd=source)
        (sdist,) = tmp_path.glob(f"{name}-*.tar.gz")
        if name == "brokerd":
            compiled_from = {
                path.relative_to(ROOT).as_posix()
                for path in FOLDERS["brokerd"].rglob("*.p*")
                if path.suffix in (".pyx", ".pxd")
            }
            with tarfile.open(sdist) as archive:
                assert compiled_from <= {member.partition("/")[2] for member in archive.getnames()}
        folder = tmp_path / name
        pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder]
        run(*pip, sdist, cwd=tmp_path)
        (wheel,) = folder.glob("*.whl")
        assert files_of(wheel) == files_of(wheels[name])


#: A C compiler that writes empty files, and fails for the module named in $BROKEN.
FAKE_COMPILER = """#!/bin/sh
while [ $# -gt 0 ]; do
    case $1 in
        */$BROKEN.*) exit 1 ;;
        -o) : >"$2" ;;
    esac
    shift
done
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="the compiler is a script")
@pytest.mark.parametrize("broken", ["rate", "_routing_c"])
@pytest.mark.parametrize("command", ["build", "build_ext --inplace"])
def test_build_with_one_module_not_compiled_holds_none(
    checkout: Path, tmp_path: Path, command: str, broken: str
) -> None:
    """A failure of the C compiler leaves no compiled module, not even one of an earlier
    build. It does not end the build.
    """
    pytest.importorskip("Cython", reason="only the locked environment has what compiles")
    copy = tmp_path / "checkout"
    shutil.copytree(checkout, copy)
    compiler = tmp_path / "cc"
    compiler.write_text(FAKE_COMPILER, encoding="ascii")
    compiler.chmod(0o755)
    environment = os.environ | {"CC": str(compiler), "LDSHARED": str(compiler)}

    def build(broken: str) -> set[str]:
        subprocess.run(
            [sys.executable, "-W", "ignore", "setup.py", "--quiet", *command.split(), "--force"],
            cwd=copy,
            env=environment | {"BROKEN": broken},
            check=True,
            timeout=120,
        )
        suffixes = tuple(EXTENSION_SUFFIXES)
        return {
            file.name.partition(".")[0]
            for file in copy.rglob("*.*")
            if str(file).endswith(suffixes)
        }

    assert build("none") == {"_key_search_c", *MODULES}
    assert build(broken) == set()


#: Run where the checkout is not the current directory; prints where the library is.
USE_LIBRARY = (
    "import brokerd_client, brokerd_client.aio, brokerd_client.tls;"
    " from brokerd_client import connect; print(brokerd_client.__file__)"
)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("removed", ["brokerd", "brokerd-client"])
@pytest.mark.parametrize("last", ["brokerd", "brokerd-client"])
def test_both_distributions_install_and_either_can_be_removed(
    wheels: dict[str, Path], tmp_path: Path, last: str, removed: str
) -> None:
    """In both orders; what stays works, and after the last one nothing is left."""
    environment = tmp_path / "venv"
    venv.create(environment, with_pip=True, symlinks=True)
    python = environment / "bin" / "python"
    pip = [python, "-m", "pip", "--disable-pip-version-check"]
    (packages,) = environment.glob("lib/*/site-packages")
    bundled = packages / BUNDLED / "brokerd_client"
    before = {path.name for path in packages.iterdir()}

    for name in ("brokerd-client" if last == "brokerd" else "brokerd", last):
        run(
            *pip,
            "install",
            "--quiet",
            "--no-index",
            "--no-deps",
            wheels[name.replace("-", "_")],
            cwd=tmp_path,
        )
        file = Path(run(python, "-c", USE_LIBRARY, cwd=tmp_path).strip())
    assert file == packages / "brokerd_client" / "__init__.py"
    # The daemon takes its own copy all the same.
    entry = (
        "from brokerd.entry import prefer_bundled_library as prefer; prefer();"
        " import brokerd_client; print(brokerd_client.__file__)"
    )
    assert Path(run(python, "-c", entry, cwd=tmp_path).strip()) == bundled / "__init__.py"

    run(*pip, "uninstall", "--quiet", "--yes", removed, cwd=tmp_path)
    file = Path(run(python, "-c", USE_LIBRARY, cwd=tmp_path).strip())
    left = "brokerd-client" if removed == "brokerd" else "brokerd"
    assert file.parent == (packages / "brokerd_client" if removed == "brokerd" else bundled)
    run(*pip, "uninstall", "--quiet", "--yes", left, cwd=tmp_path)
    assert {path.name for path in packages.iterdir()} == before


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_target_directory_has_the_library_for_the_daemon(
    wheels: dict[str, Path], tmp_path: Path
) -> None:
    """Python reads no .pth file there; the package brokerd finds its copy by itself."""
    target = tmp_path / "target"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    run(*pip, "--target", target, wheels["brokerd"], cwd=tmp_path)
    program = (
        f"import sys; sys.path.insert(0, {str(target)!r});"
        " import brokerd, brokerd_client; print(brokerd_client.__file__)"
    )

    file = Path(run(sys.executable, "-S", "-c", program, cwd=tmp_path).strip())

    assert file == target / BUNDLED / "brokerd_client" / "__init__.py"


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("editable", [False, True], ids=["plain", "editable"])
def test_pip_install_imports_both_packages(checkout: Path, tmp_path: Path, editable: bool) -> None:
    """After ``pip install .`` and ``pip install -e .`` both packages import, each from
    its expected folder.
    """
    environment = tmp_path / "venv"
    venv.create(environment, with_pip=True, symlinks=True)
    python = environment / "bin" / "python"
    target = ["--editable", checkout] if editable else [checkout]
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", *target, cwd=tmp_path)

    files = run(python, "-c", IMPORT_BOTH, cwd=tmp_path).splitlines()

    assert [Path(file).is_relative_to(checkout) for file in files] == [editable, editable]
    assert [Path(file).parent.name for file in files] == ["brokerd", "brokerd_client"]


def locked(name: str) -> dict[str, str]:
    """Return the version of each package in a lock, by its canonical name; fail for one
    without a hash.
    """
    text = (
        (ROOT / ".ci" / f"requirements-{name}.txt").read_text(encoding="utf-8").replace("\\\n", "")
    )
    versions = {}
    for line in text.splitlines():
        if not line.startswith("#"):
            assert "--hash=sha256:" in line, line
            requirement = Requirement(line.partition("--hash")[0])
            (pin,) = requirement.specifier
            assert pin.operator == "=="
            versions[canonicalize_name(requirement.name)] = pin.version
    return versions


@pytest.mark.parametrize(
    ("lock", "wanted"),
    [
        ("run", PROJECT["project"]["dependencies"]),
        ("build", PROJECT["build-system"]["requires"]),
        (
            "test",
            PROJECT["project"]["dependencies"]
            + PROJECT["project"]["optional-dependencies"]["test"],
        ),
    ],
)
def test_lock_holds_every_requirement_in_allowed_version(lock: str, wanted: list[str]) -> None:
    """Every requirement of pyproject.toml is locked in a version that it allows. If
    this fails, run `make lock`.
    """
    versions = locked(lock)
    for requirement in map(Requirement, wanted):
        version = versions.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement.name} is not locked: run make lock"
        assert requirement.specifier.contains(version), (
            f"{requirement} is locked as {version}: run make lock"
        )


def test_lock_names_no_index() -> None:
    """The user who installs the packages decides where they come from."""
    for path in (ROOT / ".ci").glob("requirements-*.txt"):
        text = path.read_text(encoding="utf-8")
        assert "--index" not in text
        assert "://" not in text


@pytest.mark.skipif(os.name == "nt", reason="a script for POSIX shells")
@pytest.mark.parametrize(
    ("output", "status", "expected"),
    [
        ("No known vulnerabilities found", 0, 0),
        ("Found 1 known vulnerability in 1 package", 1, 1),
        ("ERROR:pip_audit._cli:yarl: Dependency not found and could not be audited", 1, 2),
        ("ConnectionError: Max retries exceeded", 1, 2),
    ],
)
def test_audit_not_completed_exits_2(
    tmp_path: Path, output: str, status: int, expected: int
) -> None:
    """Known vulnerabilities give status 1. A failed lookup gives 2, never 0."""
    tool = tmp_path / "bin" / "pip-audit"
    tool.parent.mkdir()
    tool.write_text(f"#!/bin/sh\necho '{output}' >&2\nexit {status}\n", encoding="utf-8")
    tool.chmod(0o755)

    done = subprocess.run(
        [ROOT / ".ci" / "audit.sh", tmp_path],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert done.returncode == expected
    assert ("NOT AUDITED" in done.stdout) == (expected == 2)
