"""`brokerctl mailbox`: list, show, kick, drop, purge, export and import."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator

import pytest
from click.testing import CliRunner, Result
from support.broker_process import BrokerProcess
from support.raw_client import ACK, EXTENSION, JSON, MESSAGE, RECEIPT, WANT_RECEIPT

from brokerd.ctl import mailbox as mailbox_module
from brokerd.ctl import top as top_module
from brokerd.ctl.command import brokerctl
from brokerd.ctl.status import Status

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="mailboxes need POSIX locks")

Run = Callable[..., Result]


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BrokerProcess]:
    """A broker with some mailboxes; the tests use one each."""
    clients = {
        "alice": {},
        "bob": {"mailbox": True},
        "carl": {"mailbox": True},
        "dora": {"mailbox": True},
        "emil": {"mailbox": True},
        "fred": {"mailbox": True},
        "gina": {"mailbox": {"window": 2}},
        "ops": {"admin": "payload"},
        "half": {"admin": True},
    }
    store = {"path": "store", "min_free": 0}
    with BrokerProcess(tmp_path_factory.mktemp("ctl"), clients, store=store) as running:
        running.wait("daemon.started")
        yield running


@pytest.fixture
def run(broker: BrokerProcess) -> Run:
    """Run `brokerctl` as a client."""

    def run(name: str, *arguments: str, stdin: str | None = None) -> Result:
        identity = ["--name", name, "--key-file", str(broker.directory / f"{name}.key")]
        return CliRunner().invoke(
            brokerctl, ["--address", str(broker.socket), *identity, *arguments], input=stdin
        )

    return run


def fill(broker: BrokerProcess, name: str) -> None:
    """Store three messages, of which the first becomes a dead letter."""
    with broker.login("alice") as alice, broker.login(name) as owner:
        for number in (1, 2, 3):
            alice.send(MESSAGE, name, b"m%d" % number, message_id=number, flags=WANT_RECEIPT)
            assert alice.recv().kind == RECEIPT
        owner.ask("open_mailbox", window=1)
        owner.recv()
        verb = json.dumps({"verb": "dead", "reason": "no good"}).encode()
        owner.send(ACK, "", verb, message_id=1, flags=WANT_RECEIPT, codec=JSON)
        while owner.recv().kind != RECEIPT:
            pass
        assert owner.ask("close_mailbox").json == {}


def test_ctl_mailbox_lists_shows_kicks_drops_and_purges(broker: BrokerProcess, run: Run) -> None:
    fill(broker, "bob")
    listed = json.loads(run("bob", "mailbox", "list", "--json").stdout)
    assert [(each["name"], each["ready"], each["dead"]) for each in listed] == [("bob", 2, 1)]
    plain = run("ops", "mailbox", "list").stdout
    assert "bob\t2\t0\t0\t1\t" in plain
    shown = run("bob", "mailbox", "show", "bob", "--state", "dead")
    assert shown.exit_code == 0, (shown.output, shown.exception)
    dead = shown.stdout
    assert dead.split("\t")[:2] == ["1", "alice"]
    assert "no good\tm1" in dead
    assert run("half", "mailbox", "show", "bob").stdout.count("m2") == 0
    shown = json.loads(run("ops", "mailbox", "show", "bob", "--json", "--limit", "1").stdout)
    assert [(each["seq"], each["payload"]) for each in shown] == [(2, "m2")]
    assert run("bob", "mailbox", "kick", "bob").exit_code == Status.USAGE
    assert run("bob", "mailbox", "kick", "bob", "1").stdout == "kicked 1\n"
    assert run("bob", "mailbox", "kick", "bob", "--all").stdout == "kicked 0\n"
    assert run("bob", "mailbox", "drop", "bob", "2").stdout == "dropped 2\n"
    assert run("bob", "mailbox", "drop", "bob", "2").exit_code == Status.REFUSED
    assert run("bob", "mailbox", "purge", "bob", stdin="n\n").exit_code == 1
    assert run("bob", "mailbox", "purge", "bob", "--state", "dead", "--yes").stdout == "purged 0\n"
    assert run("bob", "mailbox", "purge", "bob", "--yes").stdout == "purged 2\n"


def rows(run: Run, name: str) -> list[tuple[object, ...]]:
    """Return the messages of a mailbox as an export has them, without their seqs."""
    lines = map(json.loads, run("ops", "mailbox", "export", name).stdout.splitlines())
    fields = ("sender", "state", "attempts", "reason", "error", "key", "payload", "topic", "codec")
    return [tuple(line[field] for field in fields) for line in lines]


def test_ctl_mailbox_export_and_import_copy_messages(broker: BrokerProcess, run: Run) -> None:
    """Sender, state, key, attempts and order go with them; a second import adds nothing."""
    fill(broker, "carl")
    with broker.login("alice") as alice, broker.login("carl") as carl:
        text = b'{"key":"order-1","traceparent":"x"}'
        alice.send(
            MESSAGE,
            "carl",
            len(text).to_bytes(2, "big") + text + b"\xff4",
            message_id=4,
            flags=WANT_RECEIPT | EXTENSION,
        )
        assert alice.recv().kind == RECEIPT
        carl.ask("open_mailbox", window=1)
        carl.recv()
        failed = json.dumps({"verb": "failed", "reason": "not now"}).encode()
        carl.send(ACK, "", failed, message_id=2, flags=WANT_RECEIPT, codec=JSON)
        while carl.recv().kind != RECEIPT:
            pass
        assert carl.recv().kind == MESSAGE
        assert carl.ask("close_mailbox").json == {}
    exported = run("ops", "mailbox", "export", "carl").stdout
    before = rows(run, "carl")
    assert [row[:6] for row in before] == [
        ("alice", "dead", 0, "no good", "no good", None),
        ("alice", "ready", 1, "", "not now", None),
        ("alice", "ready", 0, "", "", None),
        ("alice", "ready", 0, "", "", "order-1"),
    ]
    assert "admin: payload" in run("half", "mailbox", "export", "carl").stderr
    assert run("carl", "mailbox", "import", "carl", stdin=exported).exit_code == Status.REFUSED
    for count in (4, 0):
        stored = run("ops", "mailbox", "import", "dora", stdin=exported)
        assert stored.stdout == f"stored {count}\n", stored.output
    assert "left out 4: their keys are known" in stored.stderr
    assert rows(run, "dora") == before
    with broker.login("alice") as alice, broker.login("dora") as dora:
        # The key goes with its message: a resend is a duplicate.
        alice.send(
            MESSAGE,
            "dora",
            len(text).to_bytes(2, "big") + text + b"\xff4",
            message_id=4,
            flags=WANT_RECEIPT | EXTENSION,
        )
        assert alice.recv().kind == RECEIPT
        reply = dora.ask("open_mailbox", window=10).json
        assert (reply["ready"], reply["dead"]) == (3, 1)
        assert dora.recv().name == "alice"
    foreign = run("ops", "mailbox", "import", "dora", stdin="{}\n")
    assert foreign.exit_code == Status.USAGE
    assert "line 1 is not a message of an export: it has no 'mailbox'" in foreign.stderr


def test_ctl_mailbox_import_is_sent_in_groups() -> None:
    """Their bytes are limited, but for a single message."""
    small = [({"seq": number}, 1000) for number in range(150)]
    groups = mailbox_module._groups([*small, ({"seq": 150}, 200_000), ({"seq": 151}, 1)])
    assert [len(group) for group in groups] == [98, 52, 1, 1]


def test_ctl_mailbox_import_of_a_long_text_is_shorter_in_base64(
    broker: BrokerProcess, run: Run
) -> None:
    """A mebibyte of zeros is text, and has 6 MiB in JSON."""
    line = {"mailbox": "x", "seq": 1, "stored_at": 1.0, "sender": "alice", "codec": 0}
    lines = json.dumps({**line, "encoding": "text", "payload": "\0" * (1 << 20)})
    assert run("ops", "mailbox", "import", "fred", stdin=lines).stdout == "stored 1\n"
    (shown,) = json.loads(run("fred", "mailbox", "show", "fred", "--json", "--full").stdout)
    assert shown["payload"] == "\0" * (1 << 20)


def test_ctl_mailbox_import_leaves_out_damaged_and_expired_messages(
    broker: BrokerProcess, run: Run
) -> None:
    line = {"mailbox": "x", "seq": 1, "stored_at": 1.0, "sender": "alice", "payload": "a"}
    lines = [{**line, "codec": 0, "expires_at": 1.0}, {**line, "reason": "damaged"}]
    stored = run("ops", "mailbox", "import", "bob", stdin="\n".join(map(json.dumps, lines)) + "\n")
    assert stored.stdout == "stored 0\n", stored.output
    assert "left out 1: their ttl is over" in stored.stderr
    assert "left out 1: they are damaged" in stored.stderr


def test_ctl_json_before_mailbox_is_that_of_the_command(broker: BrokerProcess, run: Run) -> None:
    assert json.loads(run("ops", "--json", "mailbox", "list").stdout)
    assert json.loads(run("ops", "--json", "mailbox", "kick", "bob", "--all").stdout) == {
        "kicked": 0
    }
    assert json.loads(run("ops", "--json", "mailbox", "purge", "bob", "--yes").stdout) == {
        "purged": 0
    }
    assert json.loads(run("ops", "--json", "mailbox", "import", "bob", stdin="").stdout) == {
        "imported": 0,
        "known": 0,
        "expired": 0,
        "damaged": 0,
    }
    with broker.login("alice") as alice:
        alice.send(MESSAGE, "bob", b"x", message_id=1, flags=WANT_RECEIPT)
        assert alice.recv().kind == RECEIPT
    (shown,) = json.loads(run("ops", "--json", "mailbox", "show", "bob").stdout)
    dropped = run("ops", "--json", "mailbox", "drop", "bob", str(shown["seq"]))
    assert json.loads(dropped.stdout) == {"dropped": 1}
    assert run("ops", "--json", "mailbox", "export", "bob").stdout == ""


def test_ctl_why_and_top_tell_what_a_connection_holds(broker: BrokerProcess, run: Run) -> None:
    fill(broker, "emil")
    waits = run("ops", "why", "emil").stdout
    assert "its mailbox has 2 ready, 0 held, 0 delayed, 1 dead" in waits
    assert "no connection has opened the mailbox" in waits
    assert "mailbox.dead\talice\temil\tdead\t1\t1\temil: no good" in waits
    with broker.login("emil") as emil:
        emil.ask("open_mailbox", window=1)
        assert emil.recv().kind == MESSAGE
        held = run("ops", "why", "emil").stdout
        assert "emil holds 1 of 1, the oldest for 0 s: its window is full" in held
        table = run("ops", "top", "--count", "1", "--interval", "0.1").stdout
        (row,) = [line for line in table.splitlines() if line.startswith("emil\t")]
        assert "\t1 of 1\t" in row
        looks = json.loads(run("ops", "top", "--count", "1", "--interval", "0.1", "--json").stdout)
        (emils,) = [each for each in looks["connections"] if each["address"] == "emil"]
        assert (emils["mailbox_held"], emils["mailbox_window"]) == (1, 1)
        emil.ask("close_mailbox")


def test_ctl_top_heading_counts_messages_in_mailboxes() -> None:
    assert top_module._in_mailboxes({}) == ""
    assert top_module._in_mailboxes({"ready": 5, "held": 0, "dead": 1}) == (
        ", mailboxes: 5 ready, 1 dead"
    )


def test_ctl_mailbox_ages_are_readable() -> None:
    assert [mailbox_module._age(each) for each in (5, 90, 7200, 200000)] == [
        "5 s",
        "2 min",
        "2 h",
        "2 d",
    ]


def test_ctl_listen_acknowledges_messages_of_mailbox(broker: BrokerProcess, run: Run) -> None:
    """All messages come, although there are more than the window, and none comes twice."""
    for number in range(5):
        assert run("alice", "send", "gina", f"m{number}").exit_code == 0
    first = run("gina", "listen", "--count", "1", "--json", "--timeout", "30")
    shown = json.loads(first.stdout)
    assert (shown["payload"], shown["seq"], shown["attempt"]) == ("m0", 1, 1)
    rest = run("gina", "listen", "--count", "4", "--timeout", "30")
    assert rest.stdout.splitlines() == [f"alice\tm{number}" for number in range(1, 5)]
    (listed,) = json.loads(run("gina", "mailbox", "list", "--json").stdout)
    assert [listed[state] for state in ("ready", "held", "delayed", "dead")] == [0, 0, 0, 0]
