"""What is to be seen of the daemon on Windows; runs in a Windows Python and prints a
line for each.

python windows_daemon.py DIRECTORY, an empty one, which gets the configuration and the
keys
"""

import asyncio
import json
import os
import struct
import subprocess
import sys
import threading
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client
from pathlib import Path

from windows_cases import TIMEOUT_S, aside, case, raised, run_cases

import brokerd_client
from brokerd_client import aio

HOME = Path(sys.argv[1])
PIPE = rf"\\.\pipe\brokerd-{os.getpid()}"
SECOND = PIPE + "-second"
NAMES = ("alice", "bob", "carol", "ops")
MESSAGE, REQUEST, REPLY, ERROR = 1, 2, 3, 4
BIG = os.urandom(5 * 2**20)


def key(name):
    return f"{name}'s key".encode()


def configure(*pipes):
    listen = "".join(f"  - {{address: '{pipe}', allow_md5: true}}\n" for pipe in pipes)
    clients = "".join(
        f"  {name}: {{key_file: {name}.key, connections: 20, admin:"
        f" {'true' if name == 'ops' else 'false'}}}\n"
        for name in NAMES
    )
    text = f"listen:\n{listen}  - {{address: '127.0.0.1:0', allow_md5: true}}\nclients:\n{clients}"
    (HOME / "brokerd.yaml").write_text(text)


class Daemon:
    """The command brokerd in a process of its own, with its log."""

    def __init__(self):
        for name in NAMES:
            (HOME / f"{name}.key").write_bytes(key(name) + b"\r\n")
        configure(PIPE)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "brokerd.cli.main", "--config", str(HOME / "brokerd.yaml")],
            stderr=subprocess.PIPE,
            text=True,
        )
        self.events = []
        self._news = threading.Condition()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self):
        for line in self.process.stderr:
            with self._news:
                try:
                    self.events.append(json.loads(line))
                except ValueError:
                    self.events.append({"event": "no event", "line": line})
                self._news.notify_all()

    def named(self, event):
        return [each for each in self.events if each["event"] == event]

    def wait(self, event, count=1):
        """Return the ``count``-th event of this name."""
        with self._news:
            assert self._news.wait_for(lambda: len(self.named(event)) >= count, TIMEOUT_S), (
                self.events
            )
        return self.named(event)[count - 1]

    def goodbye_to(self, address):
        """Return the event for the end of this connection."""

        def found():
            return [
                each for each in self.named("client.disconnected") if each["address"] == address
            ]

        with self._news:
            assert self._news.wait_for(found, TIMEOUT_S), self.events
        return found()[0]

    def tcp(self):
        host, _, port = self.wait("daemon.started")["listeners"][-1].rpartition(":")
        return host, int(port)


DAEMON = Daemon()


def broker_frame(kind, to, payload=b"", message_id=0):
    return (
        struct.pack("!BBBBQ", kind, 0, 2 if to == "$broker" else 0, len(to), message_id)
        + to.encode()
        + payload
    )


def body_of(frame):
    return frame[12 + frame[3] :]


def stock(name, address=PIPE):
    """Return a connection of the standard library, accepted by the broker."""
    connection = Client(address, authkey=key(name))
    connection.send_bytes(broker_frame(REQUEST, "$broker", b'{"op": "whoami"}'))
    answer = connection.recv_bytes()
    assert answer[0] == REPLY, answer
    connection.me = json.loads(body_of(answer))["address"]
    return connection


COMMAND = (sys.executable, "-c", "from brokerd.ctl import main; main()")


def brokerctl(*arguments, key_file="ops.key", name="ops"):
    """Return brokerctl's exit status and output."""
    done = subprocess.run(
        [
            *COMMAND,
            "--address",
            PIPE,
            "--name",
            name,
            "--key-file",
            str(HOME / key_file),
            *arguments,
        ],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    return done.returncode, done.stdout + done.stderr


@case
def listener_at_pipe_and_port_starts():
    started = DAEMON.wait("daemon.started")
    assert started["listeners"][0] == PIPE, started
    assert DAEMON.tcp()[1] > 0


@case
def stock_clients_at_pipe_and_port_exchange_messages():
    for address in (PIPE, DAEMON.tcp()):
        with stock("alice", address) as alice, stock("bob") as bob:
            for body in (b"hello", BIG, b"behind it"):
                sent = aside(alice.send_bytes, broker_frame(MESSAGE, bob.me, body))
                assert body_of(bob.recv_bytes()) == body
                sent()
                sent = aside(bob.send_bytes, broker_frame(MESSAGE, alice.me, body))
                assert body_of(alice.recv_bytes()) == body
                sent()


@case
def messages_small_and_many_keep_order():
    with stock("alice") as alice, stock("bob") as bob:
        sent = aside(
            lambda: [
                alice.send_bytes(broker_frame(MESSAGE, bob.me, b"%d" % number))
                for number in range(500)
            ]
        )
        assert [body_of(bob.recv_bytes()) for _ in range(500)] == [
            b"%d" % number for number in range(500)
        ]
        sent()


@case
def daemon_handshake_with_wrong_key_is_refused():
    for address in (PIPE, DAEMON.tcp()):
        raised(AuthenticationError, Client, address, authkey=b"wrong")
    assert DAEMON.wait("client.refused")["reason"] == "unknown key"


@case
def message_too_large_is_answered():
    with stock("alice") as alice:
        alice.send_bytes(broker_frame(MESSAGE, "bob", bytes(17 * 2**20), message_id=5))
        refusal = alice.recv_bytes()
        assert (refusal[0], json.loads(body_of(refusal))["code"]) == (ERROR, "too_large")
        alice.send_bytes(broker_frame(REQUEST, "$broker", b'{"op": "ping"}'))
        assert alice.recv_bytes()[0] == REPLY


@case
def handshake_garbage_ends_connection():
    with Client(PIPE) as peer:
        peer.recv_bytes()
        raised(
            (EOFError, ConnectionError),
            lambda: [peer.send_bytes(os.urandom(100_000)) for _ in range(3)],
        )


@case
def client_after_close_is_offline():
    with stock("alice") as alice:
        bob = stock("bob")
        bob.send_bytes(broker_frame(MESSAGE, alice.me, b"last words"))
        bob.close()
        assert body_of(alice.recv_bytes()) == b"last words"
        assert DAEMON.goodbye_to(bob.me)["reason"] == "connection closed by the client"
        alice.send_bytes(broker_frame(MESSAGE, bob.me, b"?"))
        assert json.loads(body_of(alice.recv_bytes()))["code"] == "offline"


@case
def library_clients_at_pipe_exchange_messages():
    async def ask():
        async with await aio.connect(
            PIPE, name="carol", key=key("carol"), timeout=TIMEOUT_S
        ) as carol:
            await carol.send("alice", BIG)
            return (await carol.request("bob", 21, timeout=TIMEOUT_S)).payload

    def connect(name):
        return brokerd_client.connect(PIPE, name=name, key=key(name), timeout=TIMEOUT_S)

    with connect("alice") as alice, connect("bob") as bob:
        bob.on_request(lambda message: message.payload * 2)
        alice.send("carol", "offline", timeout=TIMEOUT_S)
        assert asyncio.run(ask()) == 42
        assert alice.recv(timeout=TIMEOUT_S).payload == BIG
        with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
            assert runner.run(ask()) == 42
        assert alice.recv(timeout=TIMEOUT_S).payload == BIG


@case
def connect_to_missing_pipe_names_it():
    error_text = raised(
        brokerd_client.Disconnected, brokerd_client.connect, PIPE + "-none", name="alice", key="k"
    )
    assert PIPE + "-none" in error_text


@case
def brokerctl_at_pipe_works():
    assert brokerctl("ping")[0] == 0
    status, printed = brokerctl("clients", "--json")
    assert status == 0, printed
    assert "alice" in printed
    assert brokerctl("stats", key_file="alice.key", name="alice")[0] != 0


@case
def reload_opens_and_closes_pipes():
    with stock("alice") as alice:
        configure(PIPE, SECOND)
        status, printed = brokerctl("reload")
        assert status == 0, printed
        with stock("bob", SECOND) as bob:
            configure(PIPE)
            assert brokerctl("reload")[0] == 0
            raised(OSError, Client, SECOND, authkey=key("bob"))
            bob.send_bytes(broker_frame(MESSAGE, alice.me, b"still here"))
            assert body_of(alice.recv_bytes()) == b"still here"


def ends_with(code, connection):
    """Assert that the broker's last word is an ERROR with this code, and that it closes."""
    last = connection.recv_bytes()
    assert last[0] == ERROR, last
    assert json.loads(body_of(last))["code"] == code, last
    raised((EOFError, ConnectionError), connection.recv_bytes)


@case
def clients_at_connection_limit_are_refused():
    for _ in range(2):
        connections = [stock("carol") for _ in range(20)]
        # It might become a channel, so the broker does not refuse it before a second is over.
        with Client(PIPE, authkey=key("carol")) as surplus:
            ends_with("name_taken", surplus)
        for each in connections:
            each.close()
        for each in connections:
            DAEMON.goodbye_to(each.me)


@case
def commands_demo_and_check_run():
    done = subprocess.run(
        [sys.executable, "-m", "brokerd.cli.main", "demo"],
        capture_output=True,
        timeout=TIMEOUT_S * 2,
    )
    assert done.returncode == 0, done
    done = subprocess.run(
        [sys.executable, "-m", "brokerd.cli.main", "check", str(HOME / "brokerd.yaml")],
        capture_output=True,
        timeout=TIMEOUT_S,
    )
    assert b"ok, 4 clients, 2 listeners" in done.stdout, done


@case
def testing_running_broker_works():
    from brokerd.testing import running

    with running() as broker:
        alice, bob = broker.connect("alice"), broker.connect("bob")
        alice.send("bob", "hello")
        assert bob.recv(timeout=TIMEOUT_S).payload == "hello"


@case
def drain_delivers_queue():
    with stock("alice") as alice, stock("bob") as bob, stock("bob", DAEMON.tcp()) as at_port:
        for to in (bob, at_port):
            for _ in range(20):
                alice.send_bytes(broker_frame(MESSAGE, to.me, BIG[:100_000]))
        alice.send_bytes(broker_frame(REQUEST, "$broker", b'{"op": "ping"}'))
        assert alice.recv_bytes()[0] == REPLY
        assert brokerctl("drain")[0] == 0
        for to in (bob, at_port):
            for _ in range(20):
                assert body_of(to.recv_bytes()) == BIG[:100_000]
            ends_with("shutting_down", to)
    assert DAEMON.process.wait(TIMEOUT_S) == 0
    assert DAEMON.wait("daemon.stopped")["cut_off"] == 0
    assert not DAEMON.named("no event"), DAEMON.named("no event")


run_cases(DAEMON.process.kill)
