"""The new process does not take over: the old one goes on as before."""

from __future__ import annotations

import contextlib
import resource
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.raw_client import MESSAGE, WANT_RECEIPT, Raw, packed
from support.upgradable_process import IMPATIENT, Upgradable, descriptors, is_running

from brokerd.upgrade.channel import FORMAT

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="sockets are handed over on Linux only"
)

CLIENTS = {
    "ops": {"admin": True},
    "alice": None,
    "bob": {"queue": "64KiB"},
    "late": {"connections": 9},
}


class Failing(Upgradable):
    """A daemon all of whose upgrades fail."""

    failures = 0

    def upgrade(self, ops: Raw) -> dict[str, Any]:
        """Ask for an upgrade, and return the answer when the log tells of the failure."""
        answer = super().upgrade(ops)
        self.failure()
        return answer

    def failure(self) -> dict[str, Any]:
        """Return the log's event of one more failure."""
        self.failures += 1
        return self.wait("daemon.upgrade_failed", self.failures)[self.failures - 1]


class Scene:
    """A held sender, a recipient that does not read, half a frame, and an
    administrator.
    """

    def __init__(self, broker: Failing) -> None:
        self.broker = broker
        self.ops, self.alice, self.bob = (broker.login(name) for name in ("ops", "alice", "bob"))
        self.count = 0
        self.filler = threading.Thread(target=self._fill)
        self.filler.start()
        while not any(each["address"] == "alice" and each["held"] for each in self._connections()):
            threading.Event().wait(0.01)

    def _connections(self) -> list[dict[str, object]]:
        return self.ops.ask("connections").json["connections"]  # type: ignore[no-any-return]

    def _fill(self) -> None:
        for number in range(1500):
            self.alice.send(MESSAGE, "bob", b"%06d" % number + bytes(1000))
        self.alice.write(packed(MESSAGE, "bob", b"the end")[:10])

    def all_goes_on(self) -> None:
        """Read the queue, each message once and in order, and connect a new client."""
        with self.broker.login("late") as late:
            late.ping()
        for number in range(1500):
            assert self.bob.recv().body[:6] == b"%06d" % number
        self.filler.join()
        self.alice.write(packed(MESSAGE, "bob", b"the end")[10:])
        assert self.bob.recv().body == b"the end"
        self.alice.send(MESSAGE, "bob", b"x", message_id=5, flags=WANT_RECEIPT)
        assert self.bob.recv().body == b"x"
        assert self.alice.recv().id == 5

    def close(self) -> None:
        for raw in (self.ops, self.alice, self.bob):
            raw.close()
        self.filler.join()


@pytest.fixture(scope="module")
def broker() -> Iterator[Failing]:
    """One broker for all tests: each failure leaves it as it was."""
    directory = Path(tempfile.mkdtemp(prefix="bd-"))
    with Failing(directory, CLIENTS, first=IMPATIENT) as broker:
        yield broker
        assert not broker.events("daemon.upgraded")
        assert not broker.events("daemon.bug")
    shutil.rmtree(directory)


@pytest.fixture
def scene(broker: Failing) -> Iterator[Scene]:
    config = broker.config.read_text()
    scene = Scene(broker)
    yield scene
    scene.close()
    broker.config.write_text(config)
    broker.before_new_process("")


RECEIVING = (
    "from brokerd.upgrade import channel, new_process as successor\nimport os, signal, time\n"
)
#: Where the descriptors of the state are taken, not those that are copied before.
TAKING = """
import sys
take = channel.UpgradeChannel._take
def taking(act, self, count, deadline, *given):
    if count and sys._getframe(2).f_locals['say'] == 'state': act(*given)
    return take(self, count, deadline)
"""
FAILURES = {
    "a module that can't be imported": ("raise ImportError('planted')", "ended with status 1"),
    "an end without a word": ("sys.exit(7)", "ended with status 7"),
    "a format it does not read": (
        RECEIVING + "successor.READS = channel.READS = (99,)",
        f"hands over its state in the format {FORMAT}, and",
    ),
    "an offer it would read and a state it would not": (
        RECEIVING + "successor.READS = (channel.FORMAT,)\n"
        "was = channel.UpgradeChannel.expect\n"
        "def expect(self, *words, **how):\n"
        "    message = was(self, *words, **how)\n"
        "    if message.say == 'state': message.facts['format'] += 1\n"
        "    return message\n"
        "channel.UpgradeChannel.expect = expect",
        f"a state of the format {FORMAT + 1}",
    ),
    "killed while it receives connections that are copied": (
        RECEIVING
        + TAKING.replace("'state'", "'copy'")
        + "channel.UpgradeChannel._take = lambda *given: taking(os.kill, *given, os.getpid(), 9)",
        "ended by signal 9",
    ),
    "killed while it receives the state": (
        RECEIVING
        + TAKING
        + "channel.UpgradeChannel._take = lambda *given: taking(os.kill, *given, os.getpid(), 9)",
        "ended by signal 9",
    ),
    "hanging while it receives the state": (
        RECEIVING
        + TAKING
        + "channel.UpgradeChannel._take = lambda *given: taking(time.sleep, *given, 60)",
        "the other process sent nothing for ",
    ),
    "a state it makes no sense of": (
        RECEIVING + "from brokerd.core import snapshot\n"
        "def fails(*_): raise KeyError('planted')\n"
        "snapshot._restore_outbox = fails",
        "a bug: KeyError: 'planted'",
    ),
    "a limit of open files too low for it": (
        RECEIVING
        + TAKING
        + "import resource\ndef lower(): resource.setrlimit(resource.RLIMIT_NOFILE,"
        " (os.open('/dev/null', 0) + 2,) * 2)\nchannel.UpgradeChannel._take = lambda *given:"
        " taking(lower, *given)",
        "is the limit of open files reached?",
    ),
    "dead when it is told to begin": (
        RECEIVING + "was = channel.UpgradeChannel.expect\n"
        "def expect(self, *words, **how):\n"
        "    message = was(self, *words, **how)\n"
        "    if message.say == 'commit': os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return message\n"
        "channel.UpgradeChannel.expect = expect",
        "ended by signal 9",
    ),
    "hanging when it is told to begin": (
        RECEIVING + "was = channel.UpgradeChannel.expect\n"
        "def expect(self, *words, **how):\n"
        "    message = was(self, *words, **how)\n"
        "    if message.say == 'commit': time.sleep(60)\n"
        "    return message\n"
        "channel.UpgradeChannel.expect = expect",
        "the other process sent nothing for 2 s",
    ),
}


#: Hardly different from the other cases, and a second each.
SLOW = {
    "an end without a word",
    "an offer it would read and a state it would not",
    "hanging while it receives the state",
    "a state it makes no sense of",
    "dead when it is told to begin",
}


@pytest.mark.parametrize(
    "failure",
    [
        pytest.param(failure, marks=[pytest.mark.slow] if failure in SLOW else [])
        for failure in FAILURES
    ],
)
def test_upgrade_new_process_fails_old_process_goes_on(scene: Scene, failure: str) -> None:
    """The answer and the log give the reason. Clients, queues and open descriptors are
    as before.
    """
    broker = scene.broker
    code, problem = FAILURES[failure]
    broker.before_new_process(code)
    descriptors_before = descriptors(broker.popen.pid)

    answer = broker.upgrade(scene.ops)

    assert not answer["upgraded"]
    assert problem in "\n".join(answer["problems"])
    assert problem in broker.events("daemon.upgrade_failed")[-1]["problem"]
    assert not is_running(broker.events("daemon.upgrading")[-1]["pid"])
    assert descriptors(broker.popen.pid) == descriptors_before
    scene.all_goes_on()


def test_upgrade_invalid_configuration_reports_every_mistake(scene: Scene) -> None:
    """The answer lists the mistakes as a reload's answer does; standard error holds
    only the log.
    """
    config = scene.broker.config
    config.write_text(config.read_text() + "limits: {connections: none}\nmonitors: 1\n")

    answer = scene.broker.upgrade(scene.ops)

    assert not answer["upgraded"]
    problems = "\n".join(answer["problems"])
    assert "limits.connections" in problems
    assert "monitors" in problems
    scene.all_goes_on()


def test_upgrade_address_in_use_is_refused(scene: Scene) -> None:
    """The new configuration has an address that is taken. The answer says so, and no
    socket file of the new process is left.
    """
    config = scene.broker.config
    blocked = scene.broker.directory / "blocked.sock"
    blocked.write_text("no socket")
    new = scene.broker.directory / "new.sock"
    config.write_text(config.read_text().replace("listen:\n", f"listen:\n- {new}\n- {blocked}\n"))

    answer = scene.broker.upgrade(scene.ops)

    assert not answer["upgraded"]
    assert "a file that is not a socket is there" in "\n".join(answer["problems"])
    assert not new.exists()
    assert scene.broker.socket.is_socket()
    scene.all_goes_on()


def test_upgrade_during_upgrade_is_refused(scene: Scene) -> None:
    """A reload is refused too, and the first upgrade is not disturbed."""
    broker = scene.broker
    broker.before_new_process("import time; time.sleep(1); raise ImportError('planted')")
    begun = len(broker.events("daemon.upgrading"))
    with broker.login("late") as second:
        scene.ops.write(packed(2, "$broker", b'{"op": "upgrade"}', message_id=1, codec=2))
        broker.wait("daemon.upgrading", begun + 1)
        scene.ops.write(packed(2, "$broker", b'{"op": "upgrade"}', message_id=2, codec=2))
        scene.ops.write(packed(2, "$broker", b'{"op": "reload"}', message_id=3, codec=2))
        answers = {frame.id: frame.json for frame in (scene.ops.recv() for _ in range(3))}
        second.ping()
    assert answers[2]["problems"] == ["an upgrade is in progress already"]
    assert answers[3]["problems"] == [
        "an upgrade is in progress, which reads the configuration again"
    ]
    assert not answers[1]["upgraded"]
    assert broker.failure()["problem"] == "an upgrade is in progress already"
    assert "status 1" in broker.failure()["problem"]
    scene.all_goes_on()


@pytest.mark.slow
def test_upgrade_by_signal_fails_with_reason_in_log(scene: Scene) -> None:
    """SIGUSR2 starts an upgrade too; the log says why it failed."""
    scene.broker.before_new_process("sys.exit(3)")
    scene.broker.signal(signal.SIGUSR2)
    event = scene.broker.failure()
    assert event["reason"] == "SIGUSR2"
    assert "ended with status 3" in event["problem"]
    scene.all_goes_on()


@pytest.mark.slow
def test_upgrade_without_free_descriptor_is_refused(socket_dir: Path) -> None:
    """The old process has as many connections as it may have open files."""

    def few() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))

    clients = {"ops": {"admin": True}, "crowd": {"connections": 100}}
    with Upgradable(socket_dir, clients, preexec=few) as broker:
        ops = broker.login("ops")
        connections: list[Raw] = []
        while not broker.events("listener.paused"):
            connections.append(Raw(broker.address))
            threading.Event().wait(0.005)
        answer = broker.upgrade(ops)
        assert answer["problems"][0].startswith(
            "the new process can't be started: Too many open files"
        )
        for raw in connections:
            raw.close()
        ops.ping()
        ops.close()


@pytest.mark.slow
def test_upgrade_silent_new_process_times_out(socket_dir: Path) -> None:
    """The new process is killed after its timeout."""
    impatient = IMPATIENT.replace("_HELLO_S = 60.0", "_HELLO_S = 0.5")
    with Upgradable(socket_dir, CLIENTS, first=impatient) as broker, broker.login("ops") as ops:
        broker.before_new_process("import time; time.sleep(60)")
        answer = broker.upgrade(ops)
        assert answer["problems"] == [
            (
                "the new process can't take over: the other process sent nothing for 0.5 s"
                " (killed because it did not end)"
            )
        ]
        assert not is_running(broker.wait("daemon.upgrading")[-1]["pid"])


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_upgrade_stop_signal_during_start_of_new_process_stops(
    socket_dir: Path, number: signal.Signals
) -> None:
    """The broker does not wait for the new process, which leaves nothing behind."""
    with Upgradable(socket_dir, CLIENTS, first=IMPATIENT) as broker, broker.login("ops"):
        broker.before_new_process("import time; time.sleep(60)")
        broker.signal(signal.SIGUSR2)
        pid = broker.wait("daemon.upgrading")[0]["pid"]
        broker.signal(number)
        assert broker.exit_status() == 0
        assert not is_running(pid)
        assert broker.events("daemon.stopped")


@pytest.mark.parametrize(("word", "upgraded"), [("ready", 0), ("serving", 1)])
def test_upgrade_stop_signal_during_handover_drains(
    socket_dir: Path, word: str, upgraded: int
) -> None:
    """While the new process restores the state, the old one drains; after the commit,
    the new one does.
    """
    with Upgradable(socket_dir, CLIENTS) as broker, broker.login("ops"):
        broker.before_new_process(
            RECEIVING + "was = channel.UpgradeChannel.send\n"
            "def send(self, say, *given, **how):\n"
            f"    if say == '{word}': os.kill(os.getppid(), signal.SIGTERM)\n"
            "    was(self, say, *given, **how)\n"
            "channel.UpgradeChannel.send = send"
        )
        broker.signal(signal.SIGUSR2)
        assert broker.exit_status() == 0
        assert broker.events("daemon.stopped")
        assert len(broker.events("daemon.upgraded")) == upgraded


@pytest.mark.slow
def test_upgrade_during_drain_is_refused(socket_dir: Path) -> None:
    """A new process would have nothing to take over."""
    with (
        Upgradable(socket_dir, CLIENTS) as broker,
        broker.login("alice") as alice,
        broker.login("bob"),
    ):
        alice.sock.settimeout(0.2)
        with contextlib.suppress(TimeoutError):
            # Until the broker reads no more.
            alice.write(packed(MESSAGE, "bob", bytes(1000)) * 2000)
        broker.signal(signal.SIGTERM)
        broker.wait("daemon.stopping")
        broker.signal(signal.SIGUSR2)
        event = broker.wait("daemon.upgrade_failed")[0]
        assert event["problem"] == "the broker is stopping"
        broker.signal(signal.SIGTERM)
        broker.exit_status()
