"""The image, built from the Dockerfile and run, on a machine that can pull none.

The base image is made here by mmdebstrap, with a Python of this machine under
/usr/local, where the official one has it. It is imported under the name that the
Dockerfile asks for.

Storage, processes and mounts are the tests' own: everything runs in a mount and a
process namespace that end with the tests, beside the machine's own containers.
"""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from support.interpreters import interpreters
from support.system.packages import install_missing

ROOT = Path(__file__).resolve().parents[3]
DOCKERFILE = ROOT / "Dockerfile"
NAME = "localhost/brokerd:test"
PACKAGES = {
    "mmdebstrap": "mmdebstrap",
    "buildah": "buildah",
    "podman": "podman",
    "crun": "crun",
    "conmon": "conmon",
}
#: podman's policy, its registries and the filter of system calls that containers run
#: under.
SHARED_PACKAGE = "golang-github-containers-common"
TIMEOUT_S = 60.0
INSTALL_TIMEOUT_S = 600
CA_BUNDLE = "/etc/ssl/certs/ca-certificates.crt"

CONTAINERS_CONF = """
[containers]
default_ulimits = [{limits}]
netns = "{network}"
cgroups = "disabled"
log_driver = "k8s-file"
[engine]
runtime = "crun"
cgroup_manager = "cgroupfs"
events_logger = "file"
"""
# The unified hierarchy beside the old ones is one that podman can't use; unmounted
# here, it takes the old ones.
IN_NAMESPACE = "umount /sys/fs/cgroup/unified 2>/dev/null; exec tail -f /dev/null"


class Engine:
    """Podman, with a storage of its own, in namespaces that end with it.

    Attributes:
        directory: Holds the storage and all other files.
        unlocked: Whether the image was not built from the locked packages.

    Args:
        network: The containers' network: host, or bridge for networks of their own.
    """

    def __init__(self, directory: Path, network: str = "host") -> None:
        self.directory = directory
        self.unlocked = False
        # podman's own are higher than what a machine may give to it.
        limits = {"nofile": resource.RLIMIT_NOFILE, "nproc": resource.RLIMIT_NPROC}
        hard = {name: resource.getrlimit(kind)[1] for name, kind in limits.items()}
        given = {
            name: 2**20 if limit == resource.RLIM_INFINITY else limit
            for name, limit in hard.items()
        }
        listed = ", ".join(f'"{name}={limit}:{limit}"' for name, limit in given.items())
        (directory / "containers.conf").write_text(
            CONTAINERS_CONF.format(limits=listed, network=network)
        )
        self.storage = [
            f"--root={directory}/store",
            f"--runroot={directory}/run",
            "--storage-driver=overlay",
        ]
        self.environment = {**os.environ, "CONTAINERS_CONF": str(directory / "containers.conf")}
        namespaces = [
            "unshare",
            "--mount",
            "--pid",
            "--fork",
            "--mount-proc",
            "--kill-child",
            "--propagation",
            "private",
        ]
        self._outer = subprocess.Popen(
            [*namespaces, "sh", "-c", IN_NAMESPACE], stdin=subprocess.DEVNULL
        )
        children = Path(f"/proc/{self._outer.pid}/task/{self._outer.pid}/children")
        self._inner = int(
            wait_until(lambda: children.read_text().strip(), "the namespace did not come up")
        )
        # --mount-proc is done when the first process calls itself 1.
        wait_until(
            lambda: (self.proc / "1" / "stat").read_text().split()[1] == "(tail)",
            "the namespace is not ready",
        )

    @property
    def proc(self) -> Path:
        """The /proc of the namespace, as this process sees it: process ids in it are
        podman's.
        """
        return Path("/proc", str(self._inner), "root", "proc")

    def enter(self, *command: str) -> list[str]:
        """Return a command that runs this command in the namespaces."""
        return ["nsenter", f"--target={self._inner}", "--mount", "--pid", *command]

    def run(
        self, *arguments: object, check: bool = True, timeout_s: float = TIMEOUT_S
    ) -> subprocess.CompletedProcess[str]:
        """Run podman with these arguments; return its output."""
        command = self.enter("podman", *self.storage, *map(str, arguments))
        done = subprocess.run(
            command,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        assert not check or done.returncode == 0, (
            f"{arguments}: {done.returncode}\n{done.stdout}{done.stderr}"
        )
        return done

    def __call__(self, *arguments: object) -> str:
        """Return the standard output of podman with these arguments, without its last
        newline.
        """
        return self.run(*arguments).stdout.rstrip("\n")

    def end(self) -> None:
        """End every container, and with them the namespaces."""
        self.run("rm", "--all", "--force", "--time=0", check=False)
        self._outer.kill()
        self._outer.wait(TIMEOUT_S)


class Container:
    """One running container."""

    def __init__(self, engine: Engine, container_id: str) -> None:
        self.engine = engine
        self.id = container_id

    @property
    def pid(self) -> int:
        """The daemon's process id in the engine's namespace."""
        return int(self.engine("inspect", "--format={{.State.Pid}}", self.id))

    def status(self) -> dict[str, str]:
        """Return the fields of /proc/PID/status of the daemon's process."""
        text = (self.engine.proc / str(self.pid) / "status").read_text()
        return dict(line.split(":\t", 1) for line in text.splitlines() if ":\t" in line)

    def output(self) -> str:
        """Return everything that was printed, on either stream."""
        done = self.engine.run("logs", self.id)
        return done.stdout + done.stderr

    def events(self, name: str) -> list[dict[str, Any]]:
        """Return the events of this name in the log."""
        lines = [json.loads(line) for line in self.output().splitlines() if line.startswith("{")]
        return [line for line in lines if line.get("event") == name]

    def wait(self, name: str) -> dict[str, Any]:
        """Return the first event of this name, once it is there."""
        return wait_until(lambda: self.events(name), f"no {name} in:\n", self.output)[0]

    def signal(self, name: str) -> None:
        """Send the daemon a signal."""
        subprocess.run(
            self.engine.enter("kill", f"-{name}", str(self.pid)), check=True, timeout=TIMEOUT_S
        )

    def exit_status(self) -> int:
        """Wait for the daemon's end; return its exit status."""
        return int(self.engine("wait", self.id))

    def health(self) -> tuple[int, str]:
        """Run the image's HEALTHCHECK; return its exit status and its output."""
        done = self.engine.run("healthcheck", "run", self.id, check=False)
        log = json.loads(self.engine("inspect", "--format={{json .State.Health.Log}}", self.id))
        return done.returncode, log[-1]["Output"]


def wait_until(probe: Callable[[], Any], complaint: str, more: Callable[[], str] = str) -> Any:
    """Return the probe's result as soon as it is true; fail with the complaint if it
    never is.
    """
    deadline = time.monotonic() + TIMEOUT_S
    while True:
        try:
            found = probe()
        except OSError:
            found = None
        if found:
            return found
        assert time.monotonic() < deadline, complaint + more()
        time.sleep(0.02)


@contextmanager
def engine(*, network: str = "host", builds: bool = True) -> Iterator[Engine]:
    """Yield a podman that has the image; skip the test if that is not possible.

    Args:
        network: The containers' network, as for Engine.
        builds: Whether to build the image; otherwise there are only its base images.
    """
    _require_tools()
    # Storage of containers can't lie in an overlay, and sockets in it have long paths.
    directory = Path(tempfile.mkdtemp(prefix="bdi-", dir="/var/tmp"))
    try:
        running = Engine(directory, network)
        try:
            for name in base_names():
                archive = make_base(directory, name)
                running.run("import", archive, name, timeout_s=INSTALL_TIMEOUT_S)
                archive.unlink()
            if builds:
                _build(running)
            yield running
        finally:
            running.end()
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def base_names() -> list[str]:
    """Return the names of the images that the Dockerfile begins with."""
    names = re.findall(r"(?m)^FROM (\S+)", DOCKERFILE.read_text())
    return sorted({name for name in names if name != "scratch"})


def container_section() -> str:
    """Return the section "Container" of docs/operations.md."""
    page = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    return page.partition("\n## Container\n")[2].partition("\n## ")[0]


def container_commands() -> list[str]:
    """Return the shell commands of that section, block by block: those that run a
    container, those with a secret, and those with a secret under docker.
    """
    blocks = re.findall(r"(?s)```sh\n(.*?)```", container_section())
    assert len(blocks) == 3
    return blocks


def pip_install(directory: Path, requirement: str) -> Path:
    """Return the directory of a package's programs; skip the test if it can't be
    fetched.
    """
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        f"--target={directory}",
    ]
    done = subprocess.run(
        [*command, requirement],
        capture_output=True,
        text=True,
        timeout=INSTALL_TIMEOUT_S,
        check=False,
    )
    if done.returncode:
        pytest.skip(f"pip can't fetch {requirement}: {done.stderr.strip().splitlines()[-1:]}")
    return directory / "bin"


def _require_tools() -> None:
    if os.geteuid() != 0:
        pytest.skip("building and running images in namespaces of their own needs root")
    policy = Path("/etc/containers/policy.json")
    install_missing(PACKAGES, [] if policy.exists() else [SHARED_PACKAGE])


def make_base(directory: Path, name: str) -> Path:
    """Return an archive of the files that replaces the official image of this name."""
    match = re.search(r"/python:(3\.\d+)-slim-(\w+)$", name)
    assert match, f"the tests know how to make a python:VERSION-slim-SUITE, not {name}"
    version, suite = match.groups()
    python = interpreters().get(version)
    if python is None:
        pytest.skip(f"no Python {version} on this machine to put into the base image")
    ask = "import sys; print(sys.base_prefix)"
    prefix = subprocess.run(
        [python, "-c", ask], capture_output=True, text=True, check=True, timeout=60
    ).stdout.strip()
    if prefix == "/usr":
        pytest.skip(f"Python {version} is the system's own, which can't be copied out of it")
    (directory / "pip.conf").write_text(_pip_conf())
    archive = directory / "base.tar"
    copy = (
        f"tar -C {prefix} --exclude=__pycache__ --exclude=test --exclude='*.a' -cf - bin"
        " include lib"
    )
    command = [
        "mmdebstrap",
        "--quiet",
        "--variant=minbase",
        "--include=ca-certificates,python3,python3-venv",
        f'--customize-hook={copy} | tar -C "$1/usr/local" -xf -',
        f'--customize-hook=chroot "$1" ldconfig; cp {directory}/pip.conf "$1/etc/pip.conf"',
        suite,
        str(archive),
        *_mirrors(),
    ]
    if Path(CA_BUNDLE).exists():
        command.insert(4, f'--customize-hook=cp {CA_BUNDLE} "$1{CA_BUNDLE}"')
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=INSTALL_TIMEOUT_S, check=False
    )
    if done.returncode:
        pytest.skip(f"mmdebstrap can't make a {suite}: {done.stderr.strip().splitlines()[-1:]}")
    return archive


def _mirrors() -> list[str]:
    """Return the Debian mirrors of this machine's apt, for mmdebstrap; empty for its
    default.
    """
    policy = subprocess.run(
        ["apt-get", "indextargets", "--format=$(SITE) $(REPO_URI)"],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    ).stdout
    found = [
        line.split()[1]
        for line in policy.splitlines()
        if line.split()[1].rstrip("/").endswith("/debian")
    ]
    return found[:1]


def _pip_conf() -> str:
    """Return pip's configuration for the base image: this machine's package index."""
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "get", "global.index-url"],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    ).stdout.strip()
    index = f"index_url = {listed}\n" if listed.startswith("http") else ""
    return f"[global]\ncert = {CA_BUNDLE}\n{index}"


def _build(running: Engine) -> None:
    done = _bud(running)
    if done.returncode and "No matching distribution found for" in done.stderr:
        # The index of this machine does not have what is locked.
        running.unlocked = True
        done = _bud(running, "--build-arg=UNLOCKED=1")
    assert done.returncode == 0, (
        f"the image can't be built:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    )


def _bud(running: Engine, *more: str) -> subprocess.CompletedProcess[str]:
    return bud(running, f"--tag={NAME}", *more, str(ROOT))


def bud(running: Engine, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Build an image from images that are there."""
    options = ["--isolation=chroot", "--network=host", "--pull-never", "--format=docker"]
    return subprocess.run(
        running.enter("buildah", *running.storage, "bud", *options, *arguments),
        env=running.environment,
        capture_output=True,
        text=True,
        timeout=INSTALL_TIMEOUT_S,
        check=False,
    )
