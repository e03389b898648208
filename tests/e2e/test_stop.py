"""A stop in every state: a file, a name service or a new process that hangs never
delays the end.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trustme
from support.broker_process import PROGRAM, BrokerProcess
from support.raw_client import MESSAGE, RECEIPT, WANT_RECEIPT
from support.upgradable_process import IMPATIENT, Upgradable, is_running

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="FIFOs, and upgrades, are on Linux"
)

#: Much more than an end takes, and less than any wait of the broker.
SOON_S = 25.0


@contextmanager
def held_fifo(path: Path) -> Iterator[None]:
    """Make a FIFO with a writer that never writes: a read from it hangs, like a read
    from a dead NFS.
    """
    os.mkfifo(path, 0o600)
    writer = os.open(path, os.O_RDWR)
    try:
        yield
    finally:
        os.close(writer)


def include(broker: BrokerProcess, name: str) -> None:
    text = broker.config.read_text()
    broker.config.write_text(f"{text}include: [{name}]\n")


def start_hanging_reload(broker: BrokerProcess) -> None:
    broker.wait("daemon.started")
    include(broker, "fifo")
    broker.signal(signal.SIGHUP)
    fifo = f"{broker.directory}/fifo"
    while fifo not in descriptors_of(broker.popen.pid):
        time.sleep(0.01)


def descriptors_of(pid: int) -> list[str]:
    found = []
    for each in Path(f"/proc/{pid}/fd").iterdir():
        try:
            found.append(str(each.readlink()))
        except FileNotFoundError:
            continue
    return found


def exit_status_soon(broker: BrokerProcess, began: float) -> int:
    status = broker.exit_status()
    assert time.monotonic() - began < SOON_S
    return status


@pytest.mark.parametrize("upgrade", [False, True])
def test_stop_during_hanging_reload_drains(socket_dir: Path, upgrade: bool) -> None:
    """SIGTERM drains, and the exit status is 0, also with an upgrade that waits for the
    reload.
    """
    with held_fifo(socket_dir / "fifo"), BrokerProcess(socket_dir) as broker:
        start_hanging_reload(broker)
        if upgrade:
            broker.signal(signal.SIGUSR2)
            time.sleep(0.2)
        began = time.monotonic()
        broker.signal()
        assert exit_status_soon(broker, began) == 0
        assert not broker.socket.exists()
        assert not broker.events("daemon.upgrading")


@pytest.mark.parametrize("upgrade", [False, True])
def test_stop_second_signal_during_hanging_reload_ends_at_once(
    socket_dir: Path, upgrade: bool
) -> None:
    """A drain that would take a minute is cut short, whatever else the broker waits
    for.
    """
    with (
        held_fifo(socket_dir / "fifo"),
        BrokerProcess(socket_dir, limits={"drain_timeout": "60s"}) as broker,
        broker.login("alice") as alice,
        broker.login("bob"),
    ):
        for number in range(50):
            alice.send(MESSAGE, "bob", bytes(100_000), message_id=number, flags=WANT_RECEIPT)
            assert alice.recv().kind == RECEIPT
        start_hanging_reload(broker)
        if upgrade:
            broker.signal(signal.SIGUSR2)
        broker.signal()
        broker.wait("daemon.stopping")
        began = time.monotonic()
        broker.signal()
        assert exit_status_soon(broker, began) == 1
        assert broker.events("daemon.killed")


#: What hangs at a reload and is none of the broker's own files: how it is called, and a
#: change that asks for it.
HANGING = {
    "a key file": ("from brokerd.config import key_files as keys", "keys.read_private", ""),
    "a certificate": ("from brokerd.config import certificates", "certificates.read_file", ""),
    "a name service": ("import socket", "socket.getaddrinfo", ", 'broker.example:6000'"),
    "a socket's directory": (
        "from brokerd.net.listen import socket_activation as handed",
        "handed.listen",
        ", '{directory}/second.sock'",
    ),
}


@pytest.mark.parametrize("resource", HANGING)
def test_stop_during_reload_waiting_for_any_resource_ends_broker(
    socket_dir: Path, resource: str
) -> None:
    """Clients are served while the resource does not answer, and SIGTERM does not wait
    for it.
    """
    module, function, listen = HANGING[resource]
    program = (
        f"{module}\nimport os, sys, time\nreal = {function}\n"
        "def hangs(*given, **more):\n"
        "    if os.path.exists(os.path.dirname(sys.argv[1]) + '/hang'):\n"
        '        print(\'{"event": "hangs"}\', flush=True)\n        time.sleep(60)\n'
        f"    return real(*given, **more)\n{function} = hangs\n{PROGRAM}"
    )
    authority = trustme.CA()
    issued = authority.issue_cert("broker.example")
    (socket_dir / "key.pem").touch(mode=0o600)
    issued.private_key_pem.write_to_path(socket_dir / "key.pem")
    issued.cert_chain_pems[0].write_to_path(socket_dir / "cert.pem")
    tls = {"address": "127.0.0.1:0", "tls": {"certificate": "cert.pem", "key": "key.pem"}}
    with (
        BrokerProcess(socket_dir, listen=[tls], program=program) as broker,
        broker.login("alice") as alice,
    ):
        (socket_dir / "hang").touch()
        included = listen.replace("{directory}", str(socket_dir)).removeprefix(", ")
        (socket_dir / "more.yaml").write_text(
            f"listen: [{included}]\n" if included else "clients: {}\n"
        )
        include(broker, "more.yaml")
        broker.signal(signal.SIGHUP)
        broker.wait("hangs")
        alice.ping()
        began = time.monotonic()
        broker.signal()
        assert exit_status_soon(broker, began) == 0
        assert not broker.socket.exists()


@pytest.mark.timing
@pytest.mark.parametrize("signals", [1, 2])
def test_stop_during_upgrade_with_hanging_process_ends_both(socket_dir: Path, signals: int) -> None:
    """The new process reads a file that does not answer: it is killed, and leaves
    nothing behind.
    """
    with held_fifo(socket_dir / "fifo"), BrokerProcess(socket_dir) as broker:
        broker.wait("daemon.started")
        include(broker, "fifo")
        broker.signal(signal.SIGUSR2)
        pid = broker.wait("daemon.upgrading")[0]["pid"]
        while f"{socket_dir}/fifo" not in descriptors_of(pid):
            time.sleep(0.01)
        began = time.monotonic()
        for _ in range(signals):
            broker.signal()
        assert exit_status_soon(broker, began) in (0, signals - 1)
        assert not broker.socket.exists()
        while is_running(pid):
            assert time.monotonic() - began < SOON_S
            time.sleep(0.01)


def test_stop_during_handover_ends_upgrade_at_once(socket_dir: Path) -> None:
    """The new process has the state and does not answer. SIGTERM does not wait for its
    timeout.
    """
    first = IMPATIENT.replace("_HANDOVER_S = 3.0", "_HANDOVER_S = 60.0")
    with Upgradable(socket_dir, first=first) as broker:
        broker.before_new_process(
            "import time\nfrom brokerd.upgrade import new_process as successor\n"
            "class Slow(successor.RestoredState):\n"
            "    def __init__(self, *given): time.sleep(60)\n"
            "successor.RestoredState = Slow\n"
        )
        broker.wait("daemon.started")
        broker.signal(signal.SIGUSR2)
        pid = broker.wait("daemon.handing_over")[0]["pid"]
        time.sleep(0.2)
        began = time.monotonic()
        broker.signal()
        assert exit_status_soon(broker, began) == 0
        assert broker.events("daemon.stopped")
        assert not is_running(pid)


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
def test_stop_second_signal_ends_broker_with_blocked_event_loop(
    socket_dir: Path, loop: str
) -> None:
    """The first signal has no effect while the event loop is blocked; the second one
    ends the process.
    """
    program = (
        'import time\nfrom brokerd import daemon\ndef stands_still(*_):\n    print(\'{"event":'
        ' "stuck"}\', flush=True)\n    for _ in range(6000):\n        time.sleep(0.01)\n'
        f"daemon.Daemon.stop_soon = stands_still\n{PROGRAM}"
    )
    if loop == "asyncio":
        program = f"import sys\nsys.modules['uvloop'] = None\n{program}"
    with BrokerProcess(socket_dir, program=program) as broker:
        broker.wait("daemon.started")
        broker.signal()
        broker.wait("stuck")
        began = time.monotonic()
        broker.signal(signal.SIGINT)
        assert exit_status_soon(broker, began) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stop_during_hanging_start_ends_broker(socket_dir: Path, number: int) -> None:
    """A name service that does not answer delays the start, but not the end."""
    program = (
        'import socket, time\ndef hangs(*_, **__):\n    print(\'{"event": "asked"}\','
        f" flush=True)\n    time.sleep(60)\nsocket.getaddrinfo = hangs\n{PROGRAM}"
    )
    with BrokerProcess(socket_dir, listen=["broker.example:6000"], program=program) as broker:
        broker.wait("asked")
        began = time.monotonic()
        broker.signal(number)
        assert exit_status_soon(broker, began) == 0
        assert not broker.events("daemon.started")


@pytest.mark.parametrize("change", ["the same file", "another file"])
def test_audit_file_hanging_at_reload_blocks_no_client_or_stop(
    socket_dir: Path, change: str
) -> None:
    """Clients are served while the file system does not answer, and SIGTERM ends the
    broker.
    """
    program = (
        "import time\nfrom brokerd.log import logger as logs\nopened = []\nopen_for_append ="
        " logs.open_for_append\ndef hangs(path):\n    opened.append(path)\n    if len(opened) =="
        ' HUNG:\n        print(\'{"event": "hangs"}\', flush=True)\n        time.sleep(60)\n   '
        f" return open_for_append(path)\nlogs.open_for_append = hangs\n{PROGRAM}"
    )
    hung = program.replace("HUNG", "2" if change == "the same file" else "3")
    with (
        BrokerProcess(socket_dir, log={"audit": "audit.log"}, program=hung) as broker,
        broker.login("alice") as alice,
    ):
        if change == "another file":
            broker.config.write_text(broker.config.read_text().replace("audit.log", "other.log"))
        broker.signal(signal.SIGHUP)
        broker.wait("hangs")
        alice.ping()
        began = time.monotonic()
        broker.signal()
        assert exit_status_soon(broker, began) == 0
