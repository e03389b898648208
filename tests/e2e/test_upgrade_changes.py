"""What an upgrade changes, and what it takes over: handshakes, listeners, keys, code."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import sys
import threading
import urllib.request
from pathlib import Path

import pytest
from support.keys import key_of
from support.raw_client import (
    CHALLENGE,
    MESSAGE,
    REQUEST,
    WELCOME,
    Raw,
    Rejected,
    login,
    packed,
    prefixed,
)
from support.service_manager import Manager
from support.upgradable_process import Upgradable, is_running
from support.waiting import until

from brokerd.daemon.online_names import file_of
from brokerd_client.address import Address

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="sockets are handed over on Linux only"
)

CLIENTS = {"ops": {"admin": True}, "alice": None, "bob": None, "crowd": {"connections": 9}}
#: A process in which clients have a minute to read their last bytes: the new process takes
#: a second to start, and a busy machine several.
PATIENT = """
from brokerd.net.connection import connection, connections
connection.GRACE = connections.GRACE = 60.0
"""


def test_upgrade_during_handshake_continues_from_each_step(socket_dir: Path) -> None:
    """Nothing sent, half an answer, welcomed, half a challenge, nearly done: each
    handshake is finished after the upgrade.
    """
    key = key_of("crowd")
    limits = {"handshake_timeout": "60s"}
    with Upgradable(socket_dir, CLIENTS, limits=limits) as broker, broker.login("ops") as ops:
        silent, halved, welcomed, challenged, answered = pending = [
            Raw(broker.address) for _ in range(5)
        ]
        whole = prefixed(halved.answer(key, b"crowd"))
        halved.write(whole[:20])
        for raw in (welcomed, challenged, answered):
            raw.write(prefixed(raw.answer(key, b"crowd")))
            assert raw.read_body() == WELCOME
        challenged.write(prefixed(CHALLENGE + b"{sha256}" + bytes(40))[:30])
        answered.challenge(key)

        answer = broker.upgrade(ops)
        assert answer["handshakes"] == len(pending)

        silent.log_in(key, b"crowd")
        halved.write(whole[20:])
        assert halved.read_body() == WELCOME
        halved.challenge(key)
        halved.write(prefixed(WELCOME))
        welcomed.challenge(key)
        welcomed.write(prefixed(WELCOME))
        challenged.write(prefixed(CHALLENGE + b"{sha256}" + bytes(40))[30:])
        challenged.read_body()
        challenged.write(prefixed(WELCOME))
        # The last word of the handshake and a first frame in one.
        answered.write(prefixed(WELCOME) + packed(MESSAGE, "alice", b"", message_id=3))
        assert answered.recv().code == "offline"
        for raw in pending:
            raw.ping()
            raw.close()


def test_upgrade_goes_on_with_incidents_taps_and_return_grace(
    socket_dir: Path, tmp_path: Path
) -> None:
    """Bob was online before a restart, and comes back after the upgrade."""
    environ = {"STATE_DIRECTORY": str(tmp_path)}
    names = file_of(str(socket_dir / "brokerd.yaml"), environ)
    names.write_text('{"online": ["bob"]}')
    with (
        Upgradable(socket_dir, CLIENTS, environ=environ, limits={"return_grace": "600s"}) as broker,
        broker.login("ops") as ops,
        broker.login("crowd") as crowd,
        broker.login("alice") as alice,
    ):
        crowd.send(MESSAGE, "ops", b"x", message_id=4)
        crowd.send(MESSAGE, "$nobody", b"x", message_id=5)
        assert crowd.recv().code == "no_such_client"
        assert ops.recv().body == b"x"
        alice.send(MESSAGE, "bob", b"hello", message_id=6)
        assert ops.ask("tap", pattern="alice").json["copied"] == 0

        assert broker.upgrade(ops)["upgraded"]

        with broker.login("bob") as bob:
            assert bob.recv().body == b"hello"
        copies = json.loads(ops.recv().body.removeprefix(b"\x0b$broker.tap"))["copies"]
        assert [(copy["recipient"], copy["id"]) for copy in copies] == [("bob", 6)]
        incidents = ops.ask("why", name="crowd").json["incidents"]
        assert [(each["code"], each["ids"]) for each in incidents] == [("no_such_client", [5])]


def test_upgrade_undecided_connection_is_decided_by_new_process(socket_dir: Path) -> None:
    """It has sent a part of its first frame; the rest decides it after the upgrade."""
    # In both processes no silence decides.
    patience = """
from brokerd.net.handshake import undecided
undecided.SILENCE_S.update(dict.fromkeys(undecided.SILENCE_S, 1000.0))
"""
    clients = {**CLIENTS, "alice": {"when_connected": "replace"}}
    with (
        Upgradable(socket_dir, clients, first=patience, log={"level": "debug"}) as broker,
        broker.login("ops") as ops,
        broker.login("alice") as alice,
        broker.login("bob") as bob,
    ):
        broker.before_new_process(patience)
        with (
            login(broker.address, key_of("alice")) as replacing,
            login(broker.address, key_of("bob")) as refused,
        ):
            whole = packed(MESSAGE, "bob", b"hello")
            replacing.write(whole[:3])
            broker.wait("client.undecided", 2)
            assert broker.upgrade(ops)["upgraded"]
            assert "bob" in bob.ask("whoami").json["name"]
            replacing.write(whole[3:])
            assert bob.recv().body == b"hello"
            assert alice.is_closed("replaced")
            refused.write(whole)
            assert refused.is_closed("name_taken")


@pytest.mark.slow
def test_upgrade_during_handshake_with_removed_key_ends_it(socket_dir: Path) -> None:
    """The client was welcomed under the old configuration; the new one does not have
    its key.
    """
    with (
        Upgradable(socket_dir, CLIENTS) as broker,
        broker.login("ops") as ops,
        Raw(broker.address) as raw,
    ):
        raw.write(prefixed(raw.answer(key_of("bob"), b"bob")))
        assert raw.read_body() == WELCOME
        (socket_dir / "bob.key").write_bytes(b"another key")
        assert broker.upgrade(ops)["upgraded"]
        assert raw.is_closed()
        assert broker.wait("client.refused")[0]["reason"] == "key removed from the configuration"


def counters(page: str) -> dict[str, float]:
    """Return the samples of the monitor's page that an upgrade carries over."""
    kinds = (
        "handshakes_total",
        "accept_pauses_total",
        "bugs_total",
        "reloads_total",
        "messages_received_total",
    )
    text = urllib.request.urlopen(f"http://{page}/metrics", timeout=30).read().decode()
    samples = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    return {
        name: float(value)
        for name, value in samples.items()
        if name.startswith(tuple(f"brokerd_{k}" for k in kinds))
    }


def test_upgrade_keeps_counters_and_last_use_of_keys(socket_dir: Path) -> None:
    """In the metrics no counter falls, and no used key appears unused."""
    with (
        Upgradable(socket_dir, CLIENTS, monitor="127.0.0.1:0") as broker,
        broker.login("ops") as ops,
    ):
        (page,) = broker.wait("monitor.listening")[0]["addresses"]
        broker.login("alice").close()
        for _ in range(3):
            with pytest.raises(Rejected):
                login(broker.address, b"wrong")
        assert ops.ask("reload").json["reloaded"]
        good = broker.config.read_text()
        broker.config.write_text("listen: 7\n")
        assert not ops.ask("reload").json["reloaded"]
        broker.config.write_text(good)
        used, before = ops.ask("keys").json["clients"], counters(page)

        assert broker.upgrade(ops)["upgraded"]

        after = counters(page)
        assert ops.ask("keys").json["clients"] == used
        (alice,) = [each for each in used if each["name"] == "alice"]
        assert alice["keys"][0]["last_used"] is not None
        assert all(after[name] >= value for name, value in before.items())
        assert after['brokerd_handshakes_total{result="accepted"}'] == 2
        assert after['brokerd_handshakes_total{result="rejected"}'] == 3
        assert [
            after[f'brokerd_reloads_total{{result="{how}"}}'] for how in ("accepted", "refused")
        ] == [1, 1]


def test_upgrade_listener_with_removed_socket_file_is_bound_again(socket_dir: Path) -> None:
    """The new process can be reached at the removed path; connections made before stay."""
    with Upgradable(socket_dir, CLIENTS) as broker, broker.login("ops") as ops:
        broker.socket.unlink()
        assert broker.upgrade(ops)["upgraded"]
        with broker.login("alice") as alice:
            alice.ping()
        ops.ping()
        broker.wait("listener.restored")
        broker.signal()
        assert broker.exit_status() == 0
        assert not broker.socket.exists()


def test_upgrade_applies_new_configuration(socket_dir: Path) -> None:
    """As after a reload, clients whose name or key was removed are disconnected with
    the reason. New entries can be used.
    """
    old = socket_dir / "old.sock"
    with (
        Upgradable(socket_dir, CLIENTS, listen=[str(old), "127.0.0.1:0"]) as broker,
        broker.login("ops") as ops,
        broker.login("alice") as alice,
        broker.login("bob") as bob,
        broker.login("crowd", Address("AF_UNIX", path=str(old))) as crowd,
    ):
        tcp = broker.addresses()[2]
        new = socket_dir / "new.sock"
        text = broker.config.read_text().replace(str(old), str(new))
        broker.config.write_text(
            text.replace("  alice:\n    key_file: alice.key\n", "  carol:\n    key: carol is new\n")
        )
        (socket_dir / "bob.key").write_bytes(b"another key")
        ops.ask("subscribe", topic="$broker.upgraded")

        ops.send(REQUEST, "$broker", b'{"op": "upgrade"}', message_id=1)
        reply, event = sorted((ops.recv(), ops.recv()), key=lambda frame: frame.kind)
        assert reply.json["upgraded"]
        assert event.body.endswith(b'{"version": "%s"}' % reply.json["version"].encode())

        assert alice.is_closed("key_removed")
        assert bob.is_closed("key_removed")
        reasons = {
            event["name"]: event["reason"] for event in broker.wait("client.disconnected", 2)
        }
        assert reasons == {
            "alice": "name removed from the configuration",
            "bob": "key removed from the configuration",
        }
        crowd.ping()
        assert not old.exists()
        assert new.is_socket()
        # The port that the system chose stays.
        assert str(tcp) in broker.wait("daemon.upgraded")[0]["listeners"]
        with (
            broker.login("crowd", tcp) as other,
            broker.login("crowd", Address("AF_UNIX", path=str(new))) as third,
        ):
            other.ping()
            third.ping()


def test_upgrade_connection_made_during_pause_is_accepted(socket_dir: Path) -> None:
    """Both at an address of the new configuration and at one that it no longer has."""
    old = socket_dir / "old.sock"
    with Upgradable(socket_dir, CLIENTS, listen=[str(old)]) as broker, broker.login("ops") as ops:
        broker.config.write_text(broker.config.read_text().replace(f"- {old}\n", ""))
        broker.before_new_process(
            "from pathlib import Path\nimport time\nfrom brokerd.net import handover\n"
            "was = handover.RestoredState.begin\n"
            "def begin(self):\n"
            "    Path(sys.argv[1]).with_name('pause').touch()\n"
            "    while not Path(sys.argv[1]).with_name('over').exists(): time.sleep(0.01)\n"
            "    was(self)\n"
            "handover.RestoredState.begin = begin"
        )
        ops.write(packed(REQUEST, "$broker", b'{"op": "upgrade"}', message_id=1))
        while not (socket_dir / "pause").exists():
            threading.Event().wait(0.01)
        with Raw(broker.address) as first, Raw(Address("AF_UNIX", path=str(old))) as second:
            (socket_dir / "over").touch()
            for raw in (first, second):
                raw.log_in(key_of("crowd"), b"crowd")
                raw.ping()
        assert ops.recv().json["upgraded"]
        assert not old.exists()


@pytest.mark.slow
def test_upgrade_keeps_socket_file_until_stop(socket_dir: Path) -> None:
    """The file is never missing while the process is replaced, and is removed at the
    end.
    """
    with Upgradable(socket_dir, CLIENTS) as broker, broker.login("ops") as ops:
        inode = broker.socket.stat().st_ino
        assert broker.upgrade(ops)["upgraded"]
        assert broker.socket.stat().st_ino == inode
        broker.signal(signal.SIGTERM)
        assert broker.exit_status() == 0
        assert not broker.socket.exists()


@pytest.mark.parametrize("first", ["0", pytest.param("1", marks=pytest.mark.slow)])
def test_upgrade_between_routing_loops_keeps_queue(socket_dir: Path, first: str) -> None:
    """Compiled to pure Python and back, with a full queue; the version on disk may
    differ too.
    """
    second = "1" if first == "0" else "0"
    with (
        Upgradable(socket_dir, CLIENTS, first=f"os.environ['BROKERD_PURE'] = '{first}'") as broker,
        broker.login("ops") as ops,
        broker.login("alice") as alice,
        broker.login("bob") as bob,
    ):
        broker.before_new_process(
            f"os.environ['BROKERD_PURE'] = '{second}'\nimport brokerd\nbrokerd.__version__ = '99.9'"
        )
        alice.write(packed(MESSAGE, "bob", bytes(1000)) * 1000)
        alice.ping()
        answer = broker.upgrade(ops)
        assert answer["version"] == "99.9"
        loops = [
            broker.wait(event)[0]["routing"] for event in ("daemon.started", "daemon.upgraded")
        ]
        if len(set(loops)) == 1:
            pytest.skip("the routing loop is not compiled here")
        alice.write(packed(MESSAGE, "bob", b"last"))
        for _ in range(1000):
            assert bob.recv().body == bytes(1000)
        assert bob.recv().body == b"last"
        assert ops.ask("stats").json["version"] == "99.9"


@pytest.mark.parametrize("kib", [300, 4000])
def test_upgrade_during_lingering_close_delivers_queue_and_error(
    socket_dir: Path, kib: int
) -> None:
    """The peer broke the protocol. After the upgrade it still gets all queued frames
    and the error, whether they were in the socket or in the outbox.
    """
    with (
        Upgradable(socket_dir, CLIENTS, listen=["127.0.0.1:0"], first=PATIENT) as broker,
        broker.login("ops") as ops,
        broker.login("alice") as alice,
    ):
        broker.before_new_process(PATIENT)
        bob = Raw.__new__(Raw)
        bob.sock = socket.socket()
        bob.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        bob.sock.settimeout(30)
        bob.sock.connect(broker.addresses()[1].sockaddr)
        with bob.log_in(key_of("bob"), b"bob"):
            alice.write(packed(MESSAGE, "bob", bytes(1000)) * kib)
            alice.ping()
            bob.write(b"\xff\xff\xff\xf0")
            ops.ping()
            assert broker.upgrade(ops)["upgraded"]
            for _ in range(kib):
                assert bob.recv().body == bytes(1000)
            assert bob.recv().code == "malformed"
            assert bob.is_closed()


@pytest.mark.slow
def test_upgrade_during_large_frame_delivers_it_whole(socket_dir: Path) -> None:
    """One part arrived before the upgrade, the rest after it. A complete large frame
    that waits for room is delivered too.
    """
    with (
        Upgradable(socket_dir, {**CLIENTS, "bob": {"queue": "1MiB"}}) as broker,
        broker.login("ops") as ops,
        broker.login("alice") as alice,
        broker.login("crowd") as crowd,
        broker.login("bob") as bob,
    ):
        frame = packed(MESSAGE, "bob", os.urandom(1 << 20))
        writer = threading.Thread(target=crowd.write, args=(frame * 3,))
        writer.start()
        alice.write(frame[:400_000])
        while not any(each["held"] for each in ops.ask("connections").json["connections"]):
            threading.Event().wait(0.01)
        assert broker.upgrade(ops)["upgraded"]
        rest = threading.Thread(target=alice.write, args=(frame[400_000:],))
        rest.start()
        for _ in range(4):
            assert bob.recv().body == frame[-(1 << 20) :]
        writer.join()
        rest.join()


def is_pid_holder(pid: int) -> bool:
    """Return whether the process only passes signals on."""
    return b"pid_holder.py" in Path(f"/proc/{pid}/cmdline").read_bytes()


def test_upgrade_first_process_stays_as_pid_holder(socket_dir: Path) -> None:
    """It passes signals on, uses little memory, and ends with the exit status of the
    serving process.
    """
    with Upgradable(socket_dir, CLIENTS) as broker, broker.login("ops") as ops:
        for _ in range(2):
            assert broker.upgrade(ops)["upgraded"]
        serving = broker.wait("daemon.upgraded", 2)[-1]["pid"]
        assert broker.popen.pid != serving
        assert broker.popen.poll() is None
        # A process leaves a moment after the new one serves.
        until(lambda: is_pid_holder(broker.popen.pid))
        # Of the processes in between, none is left.
        until(lambda: [pid for pid in broker.successors() if is_running(pid)] == [serving])
        broker.signal(signal.SIGHUP)
        broker.wait("daemon.reloaded")
        os.kill(serving, signal.SIGKILL)
        assert broker.exit_status() == 128 + signal.SIGKILL


@pytest.mark.skipif(
    os.name != "posix" or os.geteuid() != 0 or shutil.which("unshare") is None,
    reason="a process 1 of one's own takes root and unshare",
)
def test_upgrade_of_process_1_keeps_process_1(socket_dir: Path) -> None:
    """If process 1 ends, the container ends. So it passes signals on, reaps orphans,
    and ends as the broker does.
    """
    alone = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
    with Upgradable(socket_dir, CLIENTS, prefix=alone) as broker, broker.login("ops") as ops:
        first = int(Path(f"/proc/{broker.popen.pid}/task/{broker.popen.pid}/children").read_text())
        for _ in range(3):
            assert broker.upgrade(ops)["upgraded"]
        until(lambda: is_pid_holder(first))
        children = Path(f"/proc/{first}/task/{first}/children")
        until(lambda: len(children.read_text().split()) == 1)
        os.kill(first, signal.SIGHUP)
        broker.wait("daemon.reloaded")
        ops.ping()
        os.kill(first, signal.SIGTERM)
        assert broker.exit_status() == 0
        assert broker.events("daemon.stopped")


@pytest.mark.slow
def test_upgrade_pid_holder_passes_exit_status_on(socket_dir: Path) -> None:
    """After a second stop signal the broker exits with 1, and so does the process that
    was started.
    """
    with Upgradable(socket_dir, CLIENTS) as broker, broker.login("ops") as ops, broker.login("bob"):
        assert broker.upgrade(ops)["upgraded"]
        ops.write(packed(MESSAGE, "bob", bytes(1000)) * 1000)
        broker.signal(signal.SIGTERM)
        broker.wait("daemon.stopping")
        broker.signal(signal.SIGTERM)
        assert broker.exit_status() == 1


def test_upgrade_notifies_service_manager_of_new_process(socket_dir: Path) -> None:
    """The old process sends MAINPID and a barrier, and then ends. The new process sends
    its notifications after that.
    """
    with Manager(socket_dir / "notify") as manager, socket.socket(socket.AF_UNIX) as given:
        given.bind(str(socket_dir / "brokerd.sock"))
        given.listen()
        environ = {"WATCHDOG_USEC": "60000000"}
        with manager.start(
            socket_dir, CLIENTS, sockets=[given], names="brokerd.socket", environ=environ
        ) as broker:
            manager.wait("READY")
            with broker.login("ops") as ops:
                assert ops.ask("upgrade").json["upgraded"]
                new = broker.wait("daemon.upgrading")[0]["pid"]
                assert manager.wait("MAINPID") == {"MAINPID": str(new)}
                assert manager.next() == {"BARRIER": "1"}
                assert broker.popen.wait(30) == 0
                assert manager.wait("READY")["READY"] == "1"
                with broker.login("alice") as alice:
                    alice.ping()
                # And once more, by the new process.
                assert ops.ask("upgrade").json["upgraded"]
                newer = broker.wait("daemon.upgrading", 2)[1]["pid"]
                assert manager.wait("MAINPID") == {"MAINPID": str(newer)}
            os.kill(newer, signal.SIGTERM)
            broker.wait("daemon.stopped")
            # The manager's socket is not the broker's to remove.
            assert broker.socket.is_socket()
