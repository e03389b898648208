"""The start of the commands: signals that arrive before their handlers, and closed
standard descriptors.
"""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.broker_process import BrokerProcess
from support.keys import key_of

import brokerd

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals and descriptors of POSIX")

#: The command, with signals that arrive as soon as it can take any.
SIGNALLED = """
import os, signal, sys
from brokerd import entry
hold = entry.hold_signals
def held():
    hold()
    for name in SIGNALS:
        os.kill(os.getpid(), getattr(signal, name))
entry.hold_signals = held
sys.argv[:] = ["brokerd", *(COMMAND or ["--config", sys.argv[1]])]
entry.brokerd()
"""


def program(*signals: str, command: list[str] | None = None) -> str:
    return SIGNALLED.replace("SIGNALS", repr(signals)).replace("COMMAND", repr(command))


def test_entry_signals_before_start_take_effect_after_it(socket_dir: Path) -> None:
    """SIGHUP becomes a reload, and SIGUSR1 does no harm, then or later."""
    with (
        BrokerProcess(socket_dir, program=program("SIGHUP", "SIGUSR1")) as broker,
        broker.login("alice") as alice,
    ):
        broker.wait("daemon.reloaded")
        broker.signal(signal.SIGUSR1)
        broker.signal(signal.SIGHUP)
        broker.wait("daemon.reloaded", 2)
        alice.ping()
        broker.signal()
        assert broker.exit_status() == 0


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="sockets are handed over on Linux only"
)
def test_entry_sigusr2_before_start_upgrades_after_it(socket_dir: Path) -> None:
    """The new process, which serves then, got none of the signals for the old one."""
    with BrokerProcess(socket_dir, program=program("SIGUSR2")) as broker:
        (upgraded,) = broker.wait("daemon.upgraded")
        assert upgraded["pid"] != broker.events("daemon.started")[0].get("pid")
        with broker.login("alice") as alice:
            alice.ping()
        broker.signal()
        assert broker.exit_status() == 0


def test_entry_signals_of_other_command_end_it() -> None:
    """A closed terminal ends the commands that run in it, as usual."""
    code = program("SIGHUP", command=["key"])
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stdout) == (-signal.SIGHUP, "")


def test_entry_import_before_signals_are_held_loads_no_module() -> None:
    """So a signal ends the process only during the interpreter's own start. Without
    ``site``, no editable installation imports modules of its own.
    """
    code = (
        "import os, sys\n"
        f"sys.path.insert(0, {str(Path(brokerd.__file__).parent.parent)!r})\n"
        "before = set(sys.modules)\n"
        "import brokerd.entry\n"
        "print(*sorted(sys.modules.keys() - before))"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.split() == [
        "__future__",
        "brokerd",
        "brokerd._held_signals",
        "brokerd.entry",
    ]


#: A shell that ignores the three signals, says so, sends them to itself, and becomes the
#: command.
IGNORING = """
trap '' HUP USR1 USR2
echo ignored
for name in HUP USR1 USR2; do kill -s "$name" "$$"; done
exec "$@"
"""
#: The command as its script runs it.
COMMAND = (
    "import sys; from brokerd.entry import brokerd;"
    " sys.argv[:] = ['brokerd', '--config', sys.argv[1]]; brokerd()"
)


def start_under_fire(directory: Path, *numbers: signal.Signals) -> BrokerProcess:
    """Start a broker with ignored signals, and send it signals from before its exec
    until it serves.
    """
    broker = BrokerProcess(directory, program=COMMAND, prefix=("sh", "-c", IGNORING, "sh"))
    deadline = time.monotonic() + 60
    while "ignored\n" not in broker.lines:
        assert time.monotonic() < deadline
        time.sleep(0.0005)
    while not broker.events("daemon.started") and broker.popen.poll() is None:
        assert time.monotonic() < deadline
        for number in numbers:
            broker.signal(number)
        time.sleep(0.0005)
    return broker


def check_start_under_fire(directory: Path) -> None:
    with start_under_fire(directory, signal.SIGHUP, signal.SIGUSR1) as broker:
        with broker.login("alice") as alice:
            reloads = len(broker.wait("daemon.reloaded"))
            # The last signals of the series may still cause a reload.
            broker.signal(signal.SIGHUP)
            broker.wait("daemon.reloaded", reloads + 1)
            alice.ping()
        broker.signal()
        assert broker.exit_status() == 0


def test_entry_signals_ignored_at_start_serve_reloads(socket_dir: Path) -> None:
    """A parent can ignore the signals for the interpreter's own start. None ends the
    process, and the broker installs its handlers all the same.
    """
    check_start_under_fire(socket_dir)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_entry_signals_ignored_at_start_never_end_it(socket_dir: Path) -> None:
    """The same, 200 times."""
    for _ in range(200):
        check_start_under_fire(socket_dir)


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="sockets are handed over on Linux only"
)
def test_entry_sigusr2_ignored_at_start_upgrades_later(socket_dir: Path) -> None:
    """A broker that was started with SIGUSR2 ignored upgrades once it serves."""
    with start_under_fire(socket_dir) as broker:
        broker.signal(signal.SIGUSR2)
        broker.wait("daemon.upgraded")
        with broker.login("alice") as alice:
            alice.ping()
        broker.signal()
        assert broker.exit_status() == 0


CLOSED = [chosen for count in (1, 2, 3) for chosen in itertools.combinations((0, 1, 2), count)]


def without(descriptors: tuple[int, ...], *command: str) -> list[str]:
    """Return a shell's command that runs another one with these descriptors closed."""
    return [
        "sh",
        "-c",
        f'exec "$@" {" ".join(f"{each}>&-" for each in descriptors)}',
        "sh",
        sys.executable,
        *command,
    ]


@pytest.mark.parametrize("closed", CLOSED)
def test_entry_broker_with_closed_standard_descriptors_starts_and_ends(
    socket_dir: Path, closed: tuple[int, ...]
) -> None:
    """The broker opens the null device in their place and serves. Its exit status is
    that of a drain.
    """
    config = socket_dir / "b.yaml"
    config.touch(mode=0o600)
    config.write_text("listen: [./b.sock]\nclients: {alice: {key: k}}\n")
    command = without(closed, "-m", "brokerd", "--config", str(config))
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL
    ) as broker:
        try:
            while not (socket_dir / "b.sock").exists():
                assert broker.poll() is None
                time.sleep(0.01)
            if sys.platform.startswith("linux"):
                for each in closed:
                    assert str(Path(f"/proc/{broker.pid}/fd/{each}").readlink()) == os.devnull
            broker.terminate()
            broker.communicate(timeout=30)
            assert broker.returncode == 0
        finally:
            broker.kill()


@pytest.mark.parametrize("closed", [(1,), (2,), (0, 1, 2)])
def test_entry_upgrade_with_closed_standard_descriptors_goes_on(
    socket_dir: Path, closed: tuple[int, ...]
) -> None:
    """The new process, too, has no socket in the place of a standard descriptor."""
    if not sys.platform.startswith("linux"):
        pytest.skip("sockets are handed over on Linux only")
    config, log = socket_dir / "b.yaml", socket_dir / "audit"
    config.touch(mode=0o600)
    config.write_text("listen: [./b.sock]\nclients: {alice: {key: k}}\nlog: {audit: audit}\n")
    command = without(closed, "-m", "brokerd", "--config", str(config))
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as broker:
        try:
            for event, number in (
                ("daemon.started", signal.SIGUSR2),
                ("daemon.upgraded", signal.SIGTERM),
            ):
                while not (log.exists() and event in log.read_text()):
                    assert broker.poll() is None
                    time.sleep(0.01)
                broker.send_signal(number)
            assert broker.wait(30) == 0
            assert "daemon.stopped" in log.read_text()
        finally:
            broker.kill()


COMMANDS = [
    "brokerd check CONFIG",
    "brokerd key",
    "brokerd schema",
    "brokerd --version",
    "brokerd health",
    "brokerctl --help",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_entry_command_with_closed_descriptors_keeps_exit_status(
    tmp_path: Path, command: str
) -> None:
    """Each command, with all three closed, has the exit status that it has with the
    null device.
    """
    config = tmp_path / "b.yaml"
    config.touch(mode=0o600)
    config.write_text("listen: [./b.sock]\nclients: {alice: {key: k}}\n")
    name, *arguments = command.replace("CONFIG", str(config)).split()
    code = [
        "-c",
        f"from brokerd.entry import {name}; import sys; sys.argv[0] = '{name}'; sys.exit({name}())",
    ]
    environ = {**os.environ, "BROKERD_CONFIG": str(config)}
    statuses = [
        subprocess.run(
            run,
            env=environ,
            stdin=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=60,
            check=False,
        )
        for run in ([sys.executable, *code, *arguments], without((0, 1, 2), *code, *arguments))
    ]
    assert statuses[0].returncode == statuses[1].returncode


def test_entry_brokerctl_with_closed_stdout_writes_to_no_socket(
    socket_dir: Path,
) -> None:
    """The printed text does not reach the broker in the place of a frame."""
    with BrokerProcess(socket_dir, {"alice": None}) as broker:
        broker.wait("daemon.started")
        (socket_dir / "key").touch(mode=0o600)
        (socket_dir / "key").write_bytes(key_of("alice"))
        access = [
            "--address",
            str(broker.socket),
            "--name",
            "alice",
            "--key-file",
            str(socket_dir / "key"),
        ]
        code = "from brokerd.entry import brokerctl; brokerctl()"
        for closed in CLOSED:
            done = subprocess.run(
                without(closed, "-c", code, *access, "ping"), timeout=60, check=False
            )
            assert done.returncode == 0
        assert {each["reason"] for each in broker.wait("client.disconnected", len(CLOSED))} == {
            "connection closed by the client"
        }
