"""The image under Docker: what docs/operations.md and config/compose.yaml say for it.

Each test runs with the Docker of a Debian release. test_image.py tests the image itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from support.system.docker_engine import PACKAGES, DockerEngine, docker_engine
from support.system.image import ROOT, container_commands, container_section, wait_until

pytestmark = [pytest.mark.system, pytest.mark.timeout(2400)]

#: On the page, what waits for the daemon is a person's pace.
PACE = """
wait_for() {
    for try in $(seq 300); do
        command docker logs "$1" 2>&1 | grep -q "daemon.$2" && return
        sleep 0.1
    done
    command docker logs "$1"
    return 1
}
docker() {
    command docker "$@" || return
    case "$*" in
        "run --detach --name "*) wait_for "$4" started ;;
        "kill --signal USR2 "*) wait_for "$4" upgraded ;;
    esac
}
"""


def for_docker(commands: str) -> str:
    """Return commands for podman as the page's table changes them for docker."""
    table = re.findall(r"(?m)^\| `(podman [^`]+)` \| `(docker [^`]+)`", container_section())
    assert len(table) == 2
    for podman, docker in table:
        pattern = re.escape(podman).replace("NAME", r"(\S+)")
        commands = re.sub(pattern, docker.replace("NAME", r"\1"), commands)
    return commands.replace("podman", "docker")


@pytest.fixture(scope="module", params=list(PACKAGES))
def suite(request: pytest.FixtureRequest) -> str:
    """A Debian release with a Docker."""
    return str(request.param)


@pytest.fixture(scope="module")
def docker(suite: str) -> Iterator[DockerEngine]:
    """A Docker that has the image, built by the command of the page."""
    with docker_engine(suite) as running:
        build = for_docker(container_commands()[0].partition("\n")[0])
        assert build == "docker build --tag brokerd ."
        running.build(build)
        yield running


def test_operations_page_docker_commands_work_in_order(docker: DockerEngine) -> None:
    """Typed in order, each command of the page does what the page says."""
    _, _, commands = for_docker(container_commands()[0]).partition("\n")
    secrets = container_commands()[2]

    done = docker.run(f"{PACE}{commands}{secrets}")

    assert re.search(r"alice: [\d.]+ ms", done.stdout)
    assert done.stdout.count("healthy: /run/brokerd/brokerd.sock: answered in ") == 2
    exits = docker.run("docker inspect --format '{{.State.ExitCode}}' broker secretive")
    assert exits.stdout.split() == ["0", "0"]
    assert "daemon.reloaded" in docker.run("docker logs broker 2>&1").stdout


def test_docker_runs_health_check_of_image(docker: DockerEngine) -> None:
    """The image that is built without options has a health check, which the engine
    runs.
    """
    configuration = "BROKERD_CONFIG_YAML={listen: [/run/brokerd/brokerd.sock]}"
    found = re.search(r"`(docker inspect [^`]+) NAME`", container_section())
    assert found

    docker.run(
        f"docker run --detach --name checked --health-interval 1s --env '{configuration}' brokerd\n"
    )

    wait_until(
        lambda: docker.run(f"{found[1]} checked").stdout.strip() == "healthy",
        "never healthy: ",
        lambda: docker.run("docker inspect checked").stdout,
    )


def test_compose_file_runs_by_its_commands(docker: DockerEngine, suite: str) -> None:
    """Bob prints alice's message; the broker alone has a health check."""
    if "docker-compose" not in PACKAGES[suite]:
        pytest.skip(f"Debian {suite} has no docker compose")
    header = (ROOT / "config" / "compose.yaml").read_text(encoding="utf-8")
    build, *commands = for_docker("\n".join(re.findall(r"(?m)^#   (.+)", header))).splitlines()
    assert build == "docker build --tag brokerd ."
    up = commands[-1]
    compose = up.removesuffix(" up")
    health = "{{if .State.Health}}{{.State.Health.Status}}{{else}}none{{end}}"

    docker.run(
        "mkdir -p project/config; cd project; cp /srv/config/compose.yaml config\n"
        + "\n".join([*commands[:-1], f"{up} --detach"])
    )

    printed = f"cd project; {compose} logs"
    wait_until(
        lambda: "hello" in docker.run(f"{printed} bob").stdout,
        "bob never printed the message:\n",
        lambda: docker.run(printed).stdout,
    )
    shown = docker.run(f"docker inspect --format '{health}' brokerd-broker-1 brokerd-bob-1")
    assert shown.stdout.split() == ["healthy", "none"]
    docker.run(f"cd project; {compose} down --volumes")
