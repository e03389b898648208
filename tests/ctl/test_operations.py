"""clients, ping, stats, can, disconnect, reload, upgrade, drain, completion: output and
exit status.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from brokerd.ctl.command import brokerctl
from brokerd.ctl.status import Status
from brokerd.ctl.tap import _print_missed
from brokerd.ctl.why import _state_lines
from brokerd_client.errors import Offline

TIMEOUT_S = 30
Begin = Callable[[subprocess.Popen[bytes]], subprocess.Popen[bytes]]


def test_ctl_ping_prints_duration(ctl: Any) -> None:
    """It prints one line per ping, or a JSON object for scripts."""
    plain = ctl("alice", "ping", "--count", "2", "--interval", "0")
    as_json = ctl("alice", "ping", "--json")

    assert plain.exit_code == Status.DONE
    assert [line.split()[0] for line in plain.stdout.splitlines()] == ["alice:", "alice:"]
    assert 0 < json.loads(as_json.stdout)["seconds"] < TIMEOUT_S


def test_ctl_clients_lists_presence(ctl: Any) -> None:
    """In a pipe it prints one line per client, with fields separated by tabs; with
    --json a list of objects.
    """
    ctl.broker.connect("bob")
    ctl.broker.add("carol")

    plain, as_json = ctl("alice", "clients"), ctl("alice", "clients", "--json")

    assert [line.split("\t")[:2] for line in plain.stdout.splitlines()] == [
        ["alice", "online"],
        ["bob", "online"],
        ["carol", "offline"],
    ]
    assert {entry["name"]: entry["online"] for entry in json.loads(as_json.stdout)} == {
        "alice": True,
        "bob": True,
        "carol": False,
    }


def test_ctl_clients_with_watch_prints_changes(ctl: Any, begin: Begin) -> None:
    """A client that connects is printed at once; Ctrl-C is the normal end."""
    ctl.broker.add("bob")
    process = begin(ctl.start("alice", "clients", "--watch", "--json"))
    assert process.stdout is not None
    known = {json.loads(process.stdout.readline())["name"] for _ in range(2)}

    ctl.broker.connect("bob")
    line = json.loads(process.stdout.readline())
    process.send_signal(signal.SIGINT)

    assert known == {"alice", "bob"}
    assert line == {"name": "bob", "online": True}
    assert process.wait(TIMEOUT_S) == Status.DONE


@pytest.mark.parametrize(
    "command",
    [
        ["stats"],
        ["top", "--count", "1", "--interval", "0.1"],
        ["can", "alice", "send", "bob"],
        ["disconnect", "alice"],
        ["reload"],
        ["drain"],
    ],
    ids=lambda command: command[0],
)
def test_ctl_admin_command_without_admin_is_refused(ctl: Any, command: list[str]) -> None:
    """Every other client is refused, and the broker keeps running."""
    result = ctl("alice", *command)

    assert result.exit_code == Status.REFUSED
    assert result.output.startswith("brokerctl: denied: ")
    assert ctl("alice", "ping").exit_code == Status.DONE


def test_ctl_stats_prints_counters(ctl: Any) -> None:
    """They are an object for scripts, and a name and a value per line in a pipe."""
    ctl.broker.add("ops", admin=True)
    ctl.broker.connect("bob")

    plain, as_json = ctl("ops", "stats"), ctl("ops", "stats", "--json")

    assert json.loads(as_json.stdout)["online"] == 2
    assert dict(line.split("\t") for line in plain.stdout.splitlines())["online"] == "2"


def test_ctl_can_prints_deciding_rule(ctl: Any) -> None:
    """The status is 0 for yes and 1 for no; both answers name what decided."""
    ctl.broker.add("ops", admin=True)
    ctl.broker.add("bob")
    ctl.broker.add("shy", send_to=["b*"])

    yes, no = ctl("ops", "can", "shy", "send", "bob"), ctl("ops", "can", "shy", "send", "ops")
    as_json = ctl("ops", "can", "shy", "publish", "a.b", "--json")

    assert yes.exit_code == Status.DONE
    assert yes.stdout.startswith("yes: ")
    assert "b*" in yes.stdout
    assert no.exit_code == Status.REFUSED
    assert no.stdout.startswith("no: ")
    assert json.loads(as_json.stdout)["allowed"] is True


def test_ctl_can_of_unknown_client_is_refused(ctl: Any) -> None:
    """This is a failure, not the answer no: the message names the unknown client."""
    ctl.broker.add("ops", admin=True)

    result = ctl("ops", "can", "nobody", "send", "ops")

    assert result.exit_code == Status.REFUSED
    assert "no_such_client" in result.output


def test_ctl_channels_lists_and_disconnect_closes_them(ctl: Any) -> None:
    """Who with whom, and the bytes each way; `can` knows the verb open."""
    ctl.broker.add("ops", admin=True)
    alice, bob = ctl.broker.connect("alice"), ctl.broker.connect("bob")
    with bob.listen() as listener, ThreadPoolExecutor(1) as pool:
        accepting = pool.submit(listener.accept)
        one, other = alice.open("bob"), accepting.result(TIMEOUT_S)
        one.send_bytes(b"12345678")
        other.recv_bytes()

        plain, as_json = ctl("ops", "channels"), ctl("ops", "channels", "--json")
        allowed = ctl("ops", "can", "alice", "open", "bob")
        closed = ctl("ops", "disconnect", "alice")

        assert plain.stdout.split("\t")[:2] == ["alice", "bob"]
        assert plain.stdout.rstrip().split("\t")[3:] == ["12", "0", "0"]
        assert json.loads(as_json.stdout)[0]["bytes_to_recipient"] == 12
        assert allowed.exit_code == Status.DONE
        assert "closed channels: 1" in closed.stdout
        with pytest.raises((EOFError, OSError)):
            other.recv_bytes()


def test_ctl_disconnect_closes_connection(ctl: Any) -> None:
    """It names the addresses; a client that is unknown is refused."""
    from brokerd_client import Disconnected

    ctl.broker.add("ops", admin=True)
    bob = ctl.broker.connect("bob", reconnect=False)

    result = ctl("ops", "disconnect", "bob")

    assert (result.exit_code, result.stdout) == (Status.DONE, "disconnected bob\n")
    with pytest.raises(Disconnected):
        bob.recv(timeout=TIMEOUT_S)
    assert ctl("ops", "disconnect", "nobody").output.startswith("brokerctl: no_such_client: ")


def test_ctl_bench_reports_consistent_numbers(ctl: Any) -> None:
    """Every message arrived, and the numbers fit together."""
    result = ctl("alice", "bench", "--messages", "2000", "--pings", "10", "--size", "100", "--json")

    assert result.exit_code == Status.DONE
    measured = json.loads(result.stdout)
    assert (measured["messages"], measured["size"]) == (2000, 100)
    assert measured["messages_per_second"] == pytest.approx(2000 / measured["seconds"])
    assert 0 < measured["round_trip_median"] <= measured["round_trip_p99"]


def test_ctl_bench_of_client_denied_to_itself_is_refused(ctl: Any) -> None:
    """A client that may not send to itself measures nothing, and the message says why."""
    ctl.broker.add("shy", send_to=["other.*"])

    result = ctl("shy", "bench", "--messages", "10", "--pings", "1")

    assert result.exit_code == Status.REFUSED
    assert result.output.startswith("brokerctl: denied: ")


def test_ctl_bench_with_short_timeout_times_out(ctl: Any) -> None:
    """Messages that have not arrived in time are a failure, not a smaller number."""
    result = ctl("alice", "bench", "--messages", "1000000", "--pings", "1", "--timeout", "0.01")

    assert result.exit_code == Status.TIMED_OUT
    assert "of 1000000 messages arrived" in result.output


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_ctl_completion_prints_script_for_shell(shell: str) -> None:
    """The script calls this command by its name."""
    result = CliRunner().invoke(brokerctl, ["completion", shell])

    assert result.exit_code == Status.DONE
    assert f"_BROKERCTL_COMPLETE={shell}_complete" in result.stdout


def test_ctl_help_lists_every_exit_status() -> None:
    """The author of a script finds all statuses in --help."""
    result = CliRunner().invoke(brokerctl, ["--help"])

    assert result.exit_code == Status.DONE
    for status in Status:
        assert f"\n    {status.value}  " in result.output


def test_docs_list_every_ctl_command_and_status() -> None:
    """docs/brokerctl.md has a line for each, so that none is added without
    documentation.
    """
    page = (Path(__file__).resolve().parents[2] / "docs" / "brokerctl.md").read_text(
        encoding="utf-8"
    )

    assert set(re.findall(r"^\| `([\w-]+)", page, re.MULTILINE)) >= set(brokerctl.commands)
    assert {int(number) for number in re.findall(r"^\| (\d+) \|", page, re.MULTILINE)} == {
        int(each) for each in Status
    }


@pytest.mark.parametrize("command", sorted(brokerctl.commands))
def test_ctl_help_of_command_has_sentence_and_options(command: str) -> None:
    """Each command has a sentence. One that talks to a broker shows the options of the
    connection.
    """
    result = CliRunner().invoke(brokerctl, [command, "--help"])

    assert result.exit_code == Status.DONE
    assert brokerctl.commands[command].help
    assert ("--key-file" in result.output) == (command != "completion")


def test_ctl_reload_upgrade_and_drain_reach_daemon(begin: Begin, socket_dir: Path) -> None:
    """A valid configuration is applied, an invalid one is refused with its errors, and
    draining ends the process. This holds for a reload and for an upgrade.
    """
    key = socket_dir / "key"
    key.write_text("the key of ops\n")
    key.chmod(0o600)
    config = socket_dir / "brokerd.yaml"
    good = f"listen: [{socket_dir}/sock]\nclients:\n  ops: {{key_file: key, admin: true}}\n"
    config.write_text(good)
    daemon = begin(
        subprocess.Popen(
            [
                sys.executable,
                "-c",
                "from brokerd.cli.main import main; main()",
                "--config",
                str(config),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
    )
    assert daemon.stdout is not None
    while b"daemon.started" not in daemon.stdout.readline():
        assert daemon.poll() is None, "the daemon ended"

    def ctl(*arguments: str) -> Result:
        access = ["--address", f"{socket_dir}/sock", "--name", "ops", "--key-file", str(key)]
        return CliRunner().invoke(brokerctl, [*access, *arguments])

    assert ctl("reload").output == "reloaded\n"
    upgraded, as_json = ctl("upgrade"), ctl("upgrade", "--json")
    config.write_text(good + "nonsense: 1\n")
    refused = ctl("reload")
    not_upgraded = ctl("upgrade")
    drained = ctl("drain")

    assert upgraded.exit_code == Status.DONE
    assert re.match(
        r"upgraded to \S+, process \d+: 1 connection went on after \S+ ms\n", upgraded.output
    )
    assert json.loads(as_json.stdout)["upgraded"] is True
    assert refused.exit_code == Status.CONFIG
    assert "nonsense" in refused.output
    assert not_upgraded.exit_code == Status.REFUSED
    assert "nonsense" in not_upgraded.output
    assert (drained.exit_code, drained.output) == (Status.DONE, "draining\n")
    assert daemon.wait(TIMEOUT_S) == 0


def test_ctl_why_shows_refusal_with_rule_and_place(ctl: Any) -> None:
    """The state of the client comes first, then its incidents; --from and --id filter."""
    ctl.broker.add("bob")
    ctl.broker.add("ops", admin=True)
    alice = ctl.broker.connect("alice")
    with pytest.raises(Offline):
        alice.send_confirmed("bob", b"x")
    with pytest.raises(Offline):
        alice.send_confirmed("bob", b"x")

    plain = ctl("ops", "why", "bob")
    as_json = json.loads(ctl("ops", "why", "bob", "--from", "alice", "--json").stdout)
    other = ctl("ops", "why", "bob", "--from", "ops")

    state, line = plain.stdout.splitlines()
    assert state.startswith("bob is offline since ")
    assert line.split("\t")[1:6] == ["message.refused", "alice", "bob", "offline", "2"]
    assert as_json["incidents"][0]["ids"]
    assert other.stdout.splitlines()[1].startswith("no refusals")
    message_id = str(as_json["incidents"][0]["ids"][0])
    assert "offline" in ctl("ops", "why", "bob", "--id", message_id).stdout


def test_ctl_why_about_itself_needs_no_admin(ctl: Any) -> None:
    """A client may ask about itself, and about no other client."""
    ctl.broker.add("bob")

    own, other = ctl("carol", "why"), ctl("carol", "why", "bob")

    assert (own.exit_code, other.exit_code) == (Status.DONE, Status.REFUSED)
    assert own.stdout.startswith("carol is online since ")
    assert "denied" in other.stderr


def test_ctl_why_shows_connections_that_do_not_flow() -> None:
    """A slow and a held connection have a line each."""
    connection = {"address": "bob", "slow": True, "waiting_bytes": 2048, "queue": 4096}
    lines = list(
        _state_lines(
            {
                "name": "bob",
                "online": True,
                "since": 0,
                "connections": [
                    {**connection, "holds": 3, "held_by": None},
                    {"address": "alice", "slow": False, "held_by": "bob"},
                ],
            }
        )
    )

    assert lines[1:] == [
        "bob does not read: 2.0 KiB of 4.0 KiB wait, and 3 senders are held",
        "alice is held, because bob does not read",
    ]


def test_ctl_tap_prints_copies_until_count(ctl: Any, begin: Begin) -> None:
    """Each copy is a line with sender, recipient, kind, size and outcome."""
    ctl.broker.add("ops", admin=True)
    alice = ctl.broker.connect("alice")
    process = begin(ctl.start("ops", "tap", "alice", "--count", "3"))

    while process.poll() is None:
        alice.send("alice", b"hello", codec="raw")
        alice.recv(timeout=TIMEOUT_S)

    lines = process.stdout.read().decode().splitlines()
    assert process.returncode == Status.DONE
    assert [line.split("\t")[1:] for line in lines] == [
        ["alice", "alice", "message", "5", "accepted"]
    ] * 3


def test_ctl_tap_with_json_prints_objects(ctl: Any, begin: Begin) -> None:
    """Without permission of the configuration, --payload shows none; Ctrl-C ends it."""
    ctl.broker.add("ops", admin=True)
    alice = ctl.broker.connect("alice")
    process = begin(ctl.start("ops", "tap", "jobs.*", "--json", "--payload"))
    stop = threading.Event()

    def publish() -> None:
        while not stop.wait(0.01):
            alice.publish("jobs.new", b"secret")

    sender = threading.Thread(target=publish, daemon=True)
    sender.start()
    assert process.stdout is not None
    copy = json.loads(process.stdout.readline())
    process.send_signal(signal.SIGINT)
    rest = process.communicate(timeout=TIMEOUT_S)[0]
    stop.set()
    sender.join(TIMEOUT_S)

    assert (copy["topic"], copy["kind"], copy["recipient"]) == ("jobs.new", "event", None)
    assert b"secret" not in rest
    assert "payload" not in copy
    assert process.returncode == Status.DONE


@pytest.mark.parametrize(
    ("as_json", "line"),
    [(True, '{"dropped": 3, "unseen": 4}'), (False, "so far 3 copies were dropped, and 4")],
)
def test_ctl_tap_tells_what_it_missed(
    capsys: pytest.CaptureFixture[str], as_json: bool, line: str
) -> None:
    """Scripts get an object, and people a line on standard error."""
    _print_missed(3, 4, as_json=as_json)

    captured = capsys.readouterr()
    assert line in (captured.out if as_json else captured.err)
