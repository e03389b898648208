"""A small Debian with a booted systemd in a container, the project installed in it; for
tests of the service itself.

    with boot("bookworm") as machine:                 # some two seconds
        machine.write("/etc/brokerd/brokerd.yaml", "...", owner="brokerd")
        machine.run("systemctl", "start", "brokerd") machine.journal("brokerd.service")
        # its entries, as dictionaries machine.host_path("/run/brokerd/brokerd.sock")
        # the same file, seen from the test

Needs root and apt; what is missing of ``TOOLS`` is installed. The root file system is
made once by mmdebstrap, from the mirror in the machine's own apt sources, and kept in
the directory that BROKERD_TEST_CACHE names, or in the user's cache directory. A
container writes to a memory file system of its own, has no network but its own loopback
and leaves nothing behind: its cgroups, namespaces and files go with it.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import re
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import pytest
from support.system.packages import install_missing

ROOT: Final = Path(__file__).resolve().parents[3]
#: Each command that is needed, and the package that has it.
TOOLS: Final = {"mmdebstrap": "mmdebstrap", "systemd-nspawn": "systemd-container"}
PACKAGES: Final = "systemd,systemd-sysv,dbus,python3,procps,iproute2"
#: The Python of each suite, for which the project is installed.
PYTHONS: Final = {"bookworm": "3.11", "trixie": "3.13"}
UNITS: Final = {
    "brokerd.service": "/etc/systemd/system/brokerd.service",
    "brokerd.socket": "/etc/systemd/system/brokerd.socket",
    "brokerd.sysusers.conf": "/usr/lib/sysusers.d/brokerd.conf",
    "brokerd.tmpfiles.conf": "/usr/lib/tmpfiles.d/brokerd.conf",
}
TIMEOUT_S: Final = 60.0
_INSTALL_TIMEOUT_S: Final = 600
_CGROUPS: Final = Path("/sys/fs/cgroup")

#: $0: the container's name, $1...: arguments of systemd-nspawn. The container has mounts
#: and cgroups of its own.
_BOOT: Final = """
for d in $CGROUPS; do mkdir -p $d/$0; echo 0 > $d/$0/cgroup.procs; done
mkdir -p /run/systemd/nspawn
mount -t tmpfs tmpfs /run/systemd/nspawn
exec systemd-nspawn --quiet --boot --register=no --keep-unit -M $0 --volatile=overlay \\
    --private-network --link-journal=no --console=pipe "$@" </dev/null
"""


class Machine:
    """A booted container.

    Args:
        name: Its unique name.
        suite: Its Debian release.
        pid: Process id of its init, in this machine's namespace.
    """

    def __init__(self, name: str, suite: str, pid: int) -> None:
        self.name = name
        self.suite = suite
        self.pid = pid

    @property
    def systemd_version(self) -> int:
        """The number in ``systemctl --version``."""
        return int(self.run("systemctl", "--version").split()[1])

    def command(self, *command: object) -> list[str]:
        """Return a command that runs this command inside, for a Popen of the test's
        own.
        """
        return ["nsenter", "-t", str(self.pid), "-a", *map(str, command)]

    def run(
        self,
        *command: object,
        status: int | None = 0,
        stdin: str = "",
        timeout_s: float = TIMEOUT_S,
    ) -> str:
        """Return the output of a command inside, errors included.

        Args:
            status: The exit status that is required; None accepts any.
        """
        done = subprocess.run(
            self.command(*command),
            input=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_s,
            check=False,
            cwd="/",
            env={
                "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin",
                "LANG": "C.UTF-8",
                "TERM": "dumb",
            },
        )
        if status is not None:
            assert done.returncode == status, (
                f"{shlex.join(map(str, command))}: {done.returncode}\n{done.stdout}"
            )
        return done.stdout

    def python(self, program: str, *arguments: object, **how: Any) -> str:
        """Return the output of a Python program inside, which can import the project's
        packages.
        """
        return self.run("/usr/bin/python3", "-c", program, *arguments, **how)

    def host_path(self, path: str) -> Path:
        """Return the path of a container's file as seen from outside: for sockets and
        for writing files.
        """
        return Path(f"/proc/{self.pid}/root{path}")

    def write(self, path: str, text: str, *, owner: str = "root", mode: int = 0o600) -> None:
        """Write a file inside."""
        target = self.host_path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
        target.chmod(mode)
        self.run("chown", owner, path)

    def show(self, unit: str, *names: str) -> dict[str, str]:
        """Return properties of a unit, as ``systemctl show`` prints them."""
        lines = self.run(
            "systemctl", "show", unit, *(f"--property={name}" for name in names)
        ).splitlines()
        return dict(line.split("=", 1) for line in lines if "=" in line)

    def journal(self, unit: str, *arguments: str) -> list[dict[str, Any]]:
        """Return the journal entries of a unit since it was booted, oldest first."""
        self.run("journalctl", "--sync")
        text = self.run("journalctl", "--output=json", "--unit", unit, "--no-pager", *arguments)
        return [json.loads(line) for line in text.splitlines() if line.startswith("{")]

    def wait(self, what: str, *command: object, timeout_s: float = TIMEOUT_S) -> str:
        """Return the output of a command inside once the pattern is in it; fail if it
        never is.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            text = self.run(*command, status=None)
            if re.search(what, text):
                return text
            assert time.monotonic() < deadline, f"{what!r} never came from {command}:\n{text}"
            time.sleep(0.05)

    def events(self, unit: str = "brokerd.service") -> list[dict[str, Any]]:
        """Return the broker's own events in the journal of a unit, their fields by
        name.
        """
        entries = [entry for entry in self.journal(unit) if isinstance(entry.get("MESSAGE"), str)]
        return [
            json.loads(entry["MESSAGE"]) for entry in entries if entry["MESSAGE"].startswith("{")
        ]


@contextlib.contextmanager
def boot(
    suite: str = "bookworm",
    *,
    project: bool = True,
    units: bool = True,
    packages: tuple[str, ...] = (),
    binds: Mapping[Path, str] | None = None,
) -> Iterator[Machine]:
    """Boot a container with the project installed; stop and remove it at the end.

    Skip the test, with the reason, if containers can't be booted.

    Args:
        suite: One of PYTHONS.
        project: Whether anything of the project is in it, besides ``binds``.
        units: Whether to install the units, the user and the directories. They are in
            /usr/share/doc/brokerd in any case.
        packages: Debian packages that are in it besides PACKAGES.
        binds: More directories or files of this machine, seen inside, read-only.
    """
    need()
    root = root_of(suite, *packages)
    name = f"brokerd-{suite}-{secrets.token_hex(4)}"
    units = units and project
    shared = {**(_project(suite, units=units) if project else {}), **(binds or {})}
    arguments = ["-D", root, *(f"--bind-ro={source}:{target}" for source, target in shared.items())]
    # The unified hierarchy alone: so are real machines, and systemd 256 and later know
    # no other.
    outside = {
        **os.environ,
        "CGROUPS": " ".join(map(str, _hierarchies())),
        "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1",
    }
    with tempfile.TemporaryFile() as console:
        process = subprocess.Popen(
            [
                "unshare",
                "-m",
                "--propagation",
                "private",
                "bash",
                "-e",
                "-c",
                _BOOT,
                name,
                *map(str, arguments),
            ],
            stdin=subprocess.DEVNULL,
            stdout=console,
            stderr=subprocess.STDOUT,
            env=outside,
            start_new_session=True,
        )
        try:
            machine = Machine(name, suite, _init_of(process, console))
            # The socket is there a moment before the manager listens to it.
            machine.wait("running|degraded", "systemctl", "is-system-running")
            if units:
                machine.run("systemd-sysusers")
                machine.run("systemd-tmpfiles", "--create", "brokerd.conf")
            yield machine
        finally:
            _stop(process, name)


def _project(suite: str, *, units: bool) -> dict[Path, str]:
    """Return the project's files, and where they are in a container that has it."""
    installed = installed_for(suite)
    return {
        installed / "lib": f"/usr/local/lib/python{PYTHONS[suite]}/dist-packages",
        **{
            installed / "bin" / command: f"/usr/local/bin/{command}"
            for command in ("brokerd", "brokerctl")
        },
        **({ROOT / "systemd" / unit: place for unit, place in UNITS.items()} if units else {}),
        ROOT / "systemd": "/usr/share/doc/brokerd/systemd",
    }


def need() -> None:
    """Install a missing program; skip the test, with the reason, if that is not
    possible.
    """
    if sys.platform != "linux":
        pytest.skip("systemd runs on Linux only")
    if os.geteuid() != 0:
        pytest.skip("booting a systemd needs root")
    install_missing(TOOLS)


def cache() -> Path:
    """Return the directory for files that are made once and kept."""
    given = os.environ.get("BROKERD_TEST_CACHE")
    path = (
        Path(given)
        if given
        else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "brokerd-tests"
    )
    path.mkdir(parents=True, exist_ok=True)
    return path


@functools.cache
def root_of(suite: str, *more: str) -> Path:
    """Return the root file system of a Debian suite, which is never written to.

    Args:
        more: Packages that are in it besides PACKAGES.
    """
    path = cache() / "-".join(["debian", suite, *more])
    if path.is_dir():
        return path
    mirror = _mirror()
    with tempfile.TemporaryDirectory(prefix=f"debian-{suite}-", dir=cache()) as making:
        root = Path(making) / "root"
        command = [
            "mmdebstrap",
            "--quiet",
            "--variant=minbase",
            f"--include={','.join([PACKAGES, *more])}",
            suite,
            str(root),
            mirror,
        ]
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=_INSTALL_TIMEOUT_S,
            check=False,
        )
        if done.returncode:
            pytest.skip(
                f"mmdebstrap can't make a Debian {suite}: {done.stdout.strip().splitlines()[-1:]}"
            )
        with contextlib.suppress(FileExistsError):
            root.rename(path)
    return path


def _mirror() -> str:
    """Return the first Debian mirror among apt's own sources."""
    done = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(REPO_URI) $(ORIGIN)", "Created-By: Packages"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    for line in done.stdout.splitlines():
        uri, _, origin = line.partition(" ")
        if origin == "Debian":
            return uri
    return pytest.skip("apt's sources name no Debian mirror (run apt-get update)")


@functools.cache
def installed_for(suite: str) -> Path:
    """Return a directory with the project as pip installs it for the suite's Python:
    ``lib`` and ``bin``.
    """
    version = PYTHONS[suite]
    python = _python(version)
    path = Path(tempfile.mkdtemp(prefix="brokerd-installed-"))
    # Once for all tests, however many containers they boot.
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    # A copy: pip builds where the source is, and would find there what earlier builds
    # left.
    source = path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("brokerd", "client"):
        shutil.copytree(
            ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.so", "*.c")
        )
    _pip(
        python, "install", "--quiet", "--no-warn-script-location", "--target", path / "lib", source
    )
    (path / "bin").mkdir()
    for command, module in (("brokerd", "brokerd.cli.main"), ("brokerctl", "brokerd.ctl")):
        script = path / "bin" / command
        script.write_text(
            f"#!/usr/bin/python3\nimport sys\nfrom {module} import main\nsys.exit(main())\n"
        )
        script.chmod(0o755)
    # mkdtemp makes it for root alone; the service runs as another user.
    path.chmod(0o755)
    return path


def _pip(python: str, *arguments: object) -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "--python",
            python,
            "--disable-pip-version-check",
            *map(str, arguments),
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=_INSTALL_TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout


def _python(version: str) -> str:
    """Return an interpreter of this version: this one, one on the path, or one of
    pyenv.
    """
    if "{}.{}".format(*sys.version_info[:2]) == version:
        return sys.executable
    candidates = [f"python{version}"]
    if shutil.which("pyenv"):
        done = subprocess.run(
            ["pyenv", "root"], stdout=subprocess.PIPE, text=True, check=False, timeout=TIMEOUT_S
        )
        candidates += map(
            str, sorted(Path(done.stdout.strip()).glob(f"versions/{version}.*/bin/python"))
        )
    for candidate in candidates:
        with contextlib.suppress(OSError):
            command = [
                candidate,
                "-c",
                "import sys; print('{}.{}'.format(*sys.version_info[:2]), sys.executable)",
            ]
            done = subprocess.run(
                command, capture_output=True, text=True, check=False, timeout=TIMEOUT_S
            )
            found, _, executable = done.stdout.strip().partition(" ")
            if found == version:
                return executable
    return pytest.skip(f"there is no Python {version} here to install the project for")


def _hierarchies() -> list[Path]:
    """Return the cgroup hierarchies that systemd uses: one unified, or several beside
    it.
    """
    if (_CGROUPS / "cgroup.procs").exists():
        return [_CGROUPS]
    return [
        path
        for path in (_CGROUPS / name for name in ("systemd", "unified", "pids", "cpu"))
        if path.is_dir()
    ]


def _init_of(process: subprocess.Popen[bytes], console: Any) -> int:
    """Return the process id of the container's init, once it can be entered."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        for child in children.read_text().split():
            with contextlib.suppress(OSError):
                if Path("/proc", child, "root", "run/systemd/private").is_socket():
                    return int(child)
        time.sleep(0.02)
    console.seek(0)
    text = console.read().decode(errors="replace")[-2000:]
    if process.poll() is not None:
        return pytest.skip(f"this machine can't boot a container: {text}")
    raise AssertionError(f"the container did not boot:\n{text}")


def _stop(process: subprocess.Popen[bytes], name: str) -> None:
    """Power the container off, and remove its cgroups."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(TIMEOUT_S)
    for hierarchy in _hierarchies():
        for folder in sorted((hierarchy / name).rglob("*/"), reverse=True):
            if folder.is_dir():
                with contextlib.suppress(OSError):
                    folder.rmdir()
        with contextlib.suppress(OSError):
            (hierarchy / name).rmdir()
