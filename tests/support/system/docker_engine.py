"""A Docker engine of a Debian release, beside whatever this machine has itself.

    with docker_engine("trixie") as docker:
        docker.run("docker version")

The engine and its client are Debian's packages, in a root file system made by
mmdebstrap. Storage, sockets, processes and mounts are the tests' own: the engine is the
first process of a mount and a process namespace, which end with it. Containers get no
network but their own loopback, so that the engine changes nothing in this machine's.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
from support.system.image import base_names, make_base, wait_until
from support.system.machine import ROOT, need, root_of

#: What an administrator installs for docker in each suite.
PACKAGES: Final = {
    "bookworm": ("docker.io",),
    "trixie": ("docker.io", "docker-cli", "docker-buildx", "docker-compose"),
}
TIMEOUT_S: Final = 60.0
_BUILD_TIMEOUT_S: Final = 1800.0
_CGROUPS: Final = Path("/sys/fs/cgroup")

#: $0: the engine's name, $1: its root, $2: its storage, $3: the project. A hierarchy
#: that is unified beside the old ones is one that runc can't use.
_START: Final = """
umount /sys/fs/cgroup/unified 2>/dev/null || true
mount --bind $1 $1
mount --bind $2 $1/var/lib
mount --bind -o ro $3 $1/srv
mount -t proc proc $1/proc
mount --rbind /sys $1/sys
mount --rbind /dev $1/dev
for each in run tmp root; do mount -t tmpfs tmpfs $1/$each; done
mount --bind $(realpath /etc/resolv.conf) $1/etc/resolv.conf
cd $1
pivot_root . mnt
umount -l /mnt
exec dockerd --bridge=none --iptables=false --ip6tables=false --ip-forward=false \\
    --ip-masq=false --exec-opt native.cgroupdriver=cgroupfs --cgroup-parent=/$0
"""


class DockerEngine:
    """A running engine.

    Args:
        pid: Process id of the engine, in this machine's namespace.
        storage: Its /var/lib, as this machine sees it.
    """

    def __init__(self, pid: int, storage: Path) -> None:
        self.pid = pid
        self.storage = storage

    def run(
        self, script: str, *, check: bool = True, timeout_s: float = TIMEOUT_S
    ) -> subprocess.CompletedProcess[str]:
        """Run shell commands beside the engine; the project is in /srv.

        The first command that fails ends them.
        """
        enter = ["nsenter", f"--target={self.pid}", "--mount", "--pid"]
        done = subprocess.run(
            [*enter, "sh", "-e", "-c", f"cd /root\n{script}"],
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        assert not check or done.returncode == 0, (
            f"{script}: {done.returncode}\n{done.stdout[-8000:]}\n{done.stderr[-8000:]}"
        )
        return done

    def build(self, command: str) -> None:
        """Run the command that builds the image, in the project's directory."""
        for name in base_names():
            archive = make_base(self.storage, name)
            self.run(f"docker import /var/lib/{archive.name} {name}", timeout_s=_BUILD_TIMEOUT_S)
            archive.unlink()
        # The network of this machine is the one that reaches its package indexes.
        here = command.replace("docker build", "docker build --network=host")
        done = self.run(f"cd /srv\n{here}", check=False, timeout_s=_BUILD_TIMEOUT_S)
        if "No matching distribution found for" in done.stdout + done.stderr:
            # The index of this machine does not have what is locked.
            here = here.replace("docker build", "docker build --build-arg=UNLOCKED=1")
            done = self.run(f"cd /srv\n{here}", check=False, timeout_s=_BUILD_TIMEOUT_S)
        assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-8000:]


@contextlib.contextmanager
def docker_engine(suite: str) -> Iterator[DockerEngine]:
    """Start the engine of a suite of PACKAGES; skip the test if that is not possible."""
    need()
    root = root_of(suite, *PACKAGES[suite])
    name = f"brokerd-docker-{secrets.token_hex(4)}"
    # Storage of containers can't lie in an overlay.
    storage = Path(tempfile.mkdtemp(prefix="bdd-", dir="/var/tmp"))
    namespaces = ["unshare", "--mount", "--pid", "--fork", "--kill-child"]
    command = ["bash", "-e", "-c", _START, name, root, storage, ROOT]
    log = storage / "engine.log"
    try:
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*namespaces, "--propagation", "private", *map(str, command)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        try:
            yield DockerEngine(_serving(process, log), storage)
        finally:
            process.kill()
            process.wait(TIMEOUT_S)
    finally:
        _remove_cgroups(name)
        shutil.rmtree(storage, ignore_errors=True)


def _serving(process: subprocess.Popen[bytes], log: Path) -> int:
    """Return the engine's process id once it serves; skip the test if it never does."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    deadline = time.monotonic() + TIMEOUT_S
    while process.poll() is None and time.monotonic() < deadline:
        if b"API listen on " in log.read_bytes():
            return int(children.read_text())
        time.sleep(0.05)
    text = log.read_text(errors="replace")[-2000:]
    return pytest.skip(f"no docker engine runs on this machine: {text}")


def _remove_cgroups(name: str) -> None:
    """Remove the engine's cgroups, once the kernel has ended all processes in them."""
    hierarchies = [_CGROUPS, *(path for path in _CGROUPS.iterdir() if path.is_dir())]
    folders = [path / name for path in hierarchies if (path / name).is_dir()]
    for directory in [
        Path(each) for folder in folders for each, _, _ in os.walk(folder, topdown=False)
    ]:
        wait_until(
            lambda directory=directory: not (directory / "cgroup.procs").read_text(),
            f"processes stay in {directory}",
        )
        directory.rmdir()
