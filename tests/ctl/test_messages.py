"""send, request, listen, publish and subscribe: what arrives, what is printed, and the
exit status.
"""

from __future__ import annotations

import json
import signal
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from brokerd.ctl.command import brokerctl
from brokerd.ctl.status import Status

TIMEOUT_S = 30
Begin = Callable[[subprocess.Popen[bytes]], subprocess.Popen[bytes]]


# -- send


def test_ctl_send_delivers_payload(ctl: Any) -> None:
    """The payload's bytes arrive as they were typed, from the client that the key
    belongs to.
    """
    bob = ctl.broker.connect("bob")

    result = ctl("alice", "send", "bob", "grüße")

    assert (result.exit_code, result.output) == (Status.DONE, "")
    message = bob.recv(timeout=TIMEOUT_S)
    assert (message.sender, message.body) == ("alice", "grüße".encode())


def test_ctl_send_with_receipt_option_prints_it(ctl: Any) -> None:
    """send always waits for the broker; with --receipt it also prints that the broker
    has accepted the message.
    """
    ctl.broker.connect("bob")

    assert (
        ctl("alice", "send", "bob", "x", "--receipt").output
        == "the broker has accepted 1 message for bob\n"
    )
    assert ctl("alice", "send", "bob", "--lines", "--receipt", stdin="1\n2\n").output.startswith(
        "the broker has accepted 2 messages"
    )


@pytest.mark.parametrize("arguments", [[], ["-"]], ids=["missing", "dash"])
def test_ctl_send_reads_payload_from_standard_input(ctl: Any, arguments: list[str]) -> None:
    """Any bytes can be piped in; none is added or lost."""
    bob = ctl.broker.connect("bob")

    result = ctl("alice", "send", "bob", *arguments, stdin=b"\x00\xff\r\n")

    assert result.exit_code == Status.DONE
    assert bob.recv(timeout=TIMEOUT_S).body == b"\x00\xff\r\n"


def test_ctl_send_json_is_received_as_value(ctl: Any) -> None:
    """With --codec json the recipient gets a value, not text."""
    bob = ctl.broker.connect("bob")

    assert ctl("alice", "send", "bob", '{"n": 7}', "--codec", "json").exit_code == Status.DONE

    assert bob.recv(timeout=TIMEOUT_S).payload == {"n": 7}


def test_ctl_send_invalid_json_is_usage_error(ctl: Any) -> None:
    """A payload that the recipient could not read is not sent."""
    result = ctl("alice", "send", "bob", "{n: 7}", "--codec", "json")

    assert result.exit_code == Status.USAGE
    assert "the payload is not valid JSON" in result.output


def test_ctl_send_lines_sends_message_per_line(ctl: Any) -> None:
    """With --lines the lines arrive in order, even more of them than fit in one batch."""
    bob = ctl.broker.connect("bob")
    lines = [f"line {number}" for number in range(600)]

    assert ctl("alice", "send", "bob", "--lines", stdin="\n".join(lines)).exit_code == Status.DONE

    assert [bob.recv(timeout=TIMEOUT_S).text() for _ in lines] == lines


def test_ctl_send_lines_refused_are_counted(ctl: Any) -> None:
    """One line that can't be delivered is enough for a failure."""
    ctl.broker.add("bob")

    result = ctl("alice", "send", "bob", "--lines", stdin="1\n2\n")

    assert result.exit_code == Status.REFUSED
    assert "2 of 2 not sent; the first: offline" in result.output


@pytest.mark.parametrize("arguments", [["--lines", "payload"], ["--lines", "--ttl", "1"]])
def test_ctl_send_lines_with_contradicting_option_is_usage_error(
    ctl: Any, arguments: list[str]
) -> None:
    """Contradicting options are a usage error, and nothing is sent."""
    assert ctl("alice", "send", "bob", *arguments).exit_code == Status.USAGE


@pytest.mark.parametrize(
    "option", ["--ttl=nan", "--ttl=inf", "--ttl=1e12", "--timeout=nan", "--timeout=-1"]
)
def test_ctl_send_time_out_of_range_is_usage_error(ctl: Any, option: str) -> None:
    """It says what is wrong with which option, and nothing is sent."""
    result = ctl("alice", "send", "bob", "x", option)
    assert result.exit_code == Status.USAGE
    assert f"Invalid value for '{option.partition('=')[0]}'" in result.output


def test_ctl_send_undeliverable_is_refused_with_code(ctl: Any) -> None:
    """An absent client, an unknown one and a forbidden one each have their code in the
    message.
    """
    ctl.broker.add("bob")
    ctl.broker.add("shy", send_to=["other.*"])

    absent, unknown = ctl("alice", "send", "bob", "x"), ctl("alice", "send", "nobody", "x")
    forbidden = ctl("shy", "send", "bob", "x")

    assert [result.exit_code for result in (absent, unknown, forbidden)] == [Status.REFUSED] * 3
    assert absent.output.startswith("brokerctl: offline: ")
    assert unknown.output.startswith("brokerctl: no_such_client: ")
    assert forbidden.output.startswith("brokerctl: denied: ")


# -- Connecting


def test_ctl_wrong_key_is_refused(ctl: Any, tmp_path: Path) -> None:
    """The status is that of a refusal; the message shows no key."""
    wrong = tmp_path / "wrong"
    wrong.write_text("not alice's key\n")

    result = ctl("alice", "send", "bob", "x", "--key-file", str(wrong))

    assert result.exit_code == Status.REFUSED
    assert result.output.startswith("brokerctl: not authenticated: ")
    assert "not alice's key" not in result.output


def test_ctl_name_connected_already_is_refused(ctl: Any) -> None:
    ctl.broker.connect("alice")

    result = ctl("alice", "send", "bob", "x")

    assert result.exit_code == Status.REFUSED
    assert result.output.startswith("brokerctl: the broker closes the connection (name_taken): ")


def test_ctl_address_without_broker_is_unreachable(ctl: Any, tmp_path: Path) -> None:
    """A script can tell a broker that is down from one that refuses."""
    result = ctl("alice", "ping", "--address", str(tmp_path / "nothing.sock"))

    assert result.exit_code == Status.UNREACHABLE
    assert result.output.startswith("brokerctl: no broker can be reached: ")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--address", "host:port", "ping"],
        ["--name", "no name", "ping"],
        ["--key-file", "/nowhere/key", "ping"],
        ["ping", "--count", "0"],
        ["send"],
        ["dance"],
    ],
)
def test_ctl_invalid_command_line_is_usage_error(ctl: Any, arguments: list[str]) -> None:
    """A mistake that is found before anything is sent has a status of its own."""
    assert ctl("alice", *arguments).exit_code == Status.USAGE


def test_ctl_environment_gives_address_name_and_key(
    ctl: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without options, BROKERD_ADDRESS, BROKERD_NAME and BROKERD_KEY_FILE count; an
    option overrides its variable.
    """
    monkeypatch.setenv("BROKERD_ADDRESS", ctl.broker.address)
    monkeypatch.setenv("BROKERD_NAME", "alice")
    monkeypatch.setenv("BROKERD_KEY_FILE", str(ctl.key_file("alice")))

    assert CliRunner().invoke(brokerctl, ["ping"]).output.startswith("alice: ")
    other = CliRunner().invoke(
        brokerctl, ["ping", "--name", "bob", "--key-file", str(ctl.key_file("bob"))]
    )
    assert other.output.startswith("bob: ")


def test_ctl_missing_key_is_usage_error(ctl: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message names the option and the variable."""
    monkeypatch.delenv("BROKERD_KEY_FILE", raising=False)

    result = CliRunner().invoke(brokerctl, ["--address", ctl.broker.address, "ping"])

    assert result.exit_code == Status.USAGE
    assert "BROKERD_KEY_FILE" in result.output


def test_ctl_options_may_follow_command(ctl: Any) -> None:
    """The options of the connection may stand before or behind the command."""
    result = CliRunner().invoke(brokerctl, ["ping", *ctl.access("alice")])

    assert (result.exit_code, result.output.partition(":")[0]) == (Status.DONE, "alice")


def test_ctl_without_name_learns_it_from_broker(ctl: Any) -> None:
    """A client that gives only its key is told its name by the broker."""
    arguments = ["--address", ctl.broker.address, "--key-file", str(ctl.key_file("alice")), "ping"]

    assert CliRunner().invoke(brokerctl, arguments).output.startswith("alice: ")


# -- request


def test_ctl_request_prints_reply(ctl: Any) -> None:
    """Only the reply's text and a line end are printed."""
    bob = ctl.broker.connect("bob")
    bob.on_request(lambda message: message.body.upper())

    result = ctl("alice", "request", "bob", "hello")

    assert (result.exit_code, result.stdout) == (Status.DONE, "HELLO\n")


def test_ctl_request_prints_reply_raw_or_as_json(ctl: Any) -> None:
    """--raw writes exactly the bytes. --json writes an object, with base64 if the bytes
    are not text.
    """
    bob = ctl.broker.connect("bob")
    bob.on_request(lambda message: b"\xff\x00" if message.body == b"bytes" else {"n": 7})

    raw, text = (
        ctl("alice", "request", "bob", "bytes", "--raw"),
        ctl("alice", "request", "bob", "value", "--json"),
    )
    binary = ctl("alice", "request", "bob", "bytes", "--json")

    assert raw.stdout_bytes == b"\xff\x00"
    assert json.loads(text.stdout)["payload"] == {"n": 7}
    assert json.loads(binary.stdout)["base64"] == "/wA="
    assert "payload" not in json.loads(binary.stdout)


def test_ctl_request_failed_by_recipient_is_refused(ctl: Any) -> None:
    """The other client's own code and words are shown."""
    bob = ctl.broker.connect("bob")
    answering = threading.Thread(
        target=lambda: bob.recv(timeout=TIMEOUT_S).fail("tray 2", code="out_of_paper")
    )
    answering.start()

    result = ctl("alice", "request", "bob", "print")
    answering.join(TIMEOUT_S)

    assert (result.exit_code, result.output) == (
        Status.REFUSED,
        "brokerctl: out_of_paper: tray 2\n",
    )


def test_ctl_request_without_answer_times_out(ctl: Any) -> None:
    """The status says that the time is over, not that the request was refused."""
    ctl.broker.connect("bob")

    result = ctl("alice", "request", "bob", "hello", "--timeout", "0.1")

    assert result.exit_code == Status.TIMED_OUT


def test_ctl_request_with_broken_connection_is_in_doubt(ctl: Any) -> None:
    """It is not known whether the request was carried out, and the status says so."""
    bob = ctl.broker.connect("bob")
    results: list[Result] = []
    asking = threading.Thread(
        target=lambda: results.append(ctl("alice", "request", "bob", "hello"))
    )
    asking.start()
    bob.recv(timeout=TIMEOUT_S)

    ctl.broker.disconnect("alice")
    asking.join(TIMEOUT_S)

    assert results[0].exit_code == Status.IN_DOUBT
    assert results[0].output.startswith("brokerctl: in doubt: ")


def test_ctl_request_abandoned_by_recipient_is_in_doubt(ctl: Any) -> None:
    """The recipient had read the request, so that a script must not simply repeat it."""
    bob = ctl.broker.connect("bob")
    leaving = threading.Thread(target=lambda: (bob.recv(timeout=TIMEOUT_S), bob.close()))
    leaving.start()

    result = ctl("alice", "request", "bob", "hello")
    leaving.join(TIMEOUT_S)

    assert (result.exit_code, result.output.startswith("brokerctl: abandoned: bob ")) == (
        Status.IN_DOUBT,
        True,
    )


# -- listen


def listening(ctl: Any, begin: Begin, *arguments: str) -> tuple[subprocess.Popen[bytes], Any]:
    """Start `listen` as bob and wait until it is connected; return it and a client that
    sends to it.
    """
    alice = ctl.broker.connect("alice")
    process = begin(ctl.start("bob", "listen", *arguments))
    ctl.wait_online(alice, "bob")
    return process, alice


def wait_presence(feed: Any, name: str, *, online: bool) -> None:
    """Wait for the presence event of a client."""
    while True:
        presence = feed.recv(timeout=TIMEOUT_S)
        if (presence.name, presence.online) == (name, online):
            return


def ended(process: subprocess.Popen[bytes]) -> tuple[int, str, str]:
    """Wait for the end of a process; return its status, output and error output."""
    out, err = process.communicate(timeout=TIMEOUT_S)
    return process.returncode, out.decode(), err.decode()


def test_ctl_listen_in_pipe_prints_sender_and_payload_per_line(ctl: Any, begin: Begin) -> None:
    """Sender and payload are separated by a tab; line ends and control characters are
    escaped.
    """
    process, alice = listening(ctl, begin, "--count", "3")

    alice.send("bob", b"one")
    alice.send("bob", b"two\nlines \x1b[31m")
    alice.send("bob", b"\xff\xfe")

    assert ended(process) == (
        Status.DONE,
        "alice\tone\nalice\ttwo\\nlines \\x1b[31m\nalice\t(2 bytes that are not text)\n",
        "",
    )


def test_ctl_listen_with_json_prints_object_per_line(ctl: Any, begin: Begin) -> None:
    """One object is printed per message, with every field that a script could need."""
    process, alice = listening(ctl, begin, "--count", "2", "--json")

    first = alice.send("bob", {"n": 7}, extension={"traceparent": "00"})
    second = alice.send("bob", b"text")

    status, out, _ = ended(process)
    assert status == Status.DONE
    assert [json.loads(line) for line in out.splitlines()] == [
        {
            "kind": "message",
            "sender": "alice",
            "id": first,
            "extension": {"traceparent": "00"},
            "payload": {"n": 7},
        },
        {"kind": "message", "sender": "alice", "id": second, "payload": "text"},
    ]


def test_ctl_listen_with_json_escapes_control_characters(ctl: Any, begin: Begin) -> None:
    """Escapes of one byte, of two, and those that change the text direction are printed
    as JSON escapes. A script reads the same text.
    """
    process, alice = listening(ctl, begin, "--count", "1", "--json")
    text = "grüße \x1b[31m \x7f \x9b31m \x85 \u202e \u2028 \U000e0041"

    alice.send("bob", text.encode())

    status, out, _ = ended(process)
    assert status == Status.DONE
    assert json.loads(out)["payload"] == text
    assert out.removesuffix("\n").isprintable()
    assert "grüße" in out


def test_ctl_listen_in_pipe_escapes_control_characters(ctl: Any, begin: Begin) -> None:
    """Line ends of every kind, and characters that change the text direction, are
    escaped. A message is one line for every reader.
    """
    process, alice = listening(ctl, begin, "--count", "1")

    alice.send("bob", "grüße \x9b31m \x85 \u202e \u2066 \u2028 \u2029 \U000e0041 end".encode())

    status, out, _ = ended(process)
    assert status == Status.DONE
    assert out == "alice\tgrüße \\x9b31m \\x85 \\u202e \\u2066 \\u2028 \\u2029 \\U000e0041 end\n"


def test_ctl_listen_with_raw_writes_payload_bytes(ctl: Any, begin: Begin) -> None:
    """With --raw the payloads are written as they are, one after another."""
    alice = ctl.broker.connect("alice")
    process = begin(ctl.start("bob", "listen", "--count", "2", "--raw"))
    ctl.wait_online(alice, "bob")

    alice.send("bob", b"\x00\xff")
    alice.send("bob", b"\n")

    out, _ = process.communicate(timeout=TIMEOUT_S)
    assert (process.returncode, out) == (Status.DONE, b"\x00\xff\n")


def test_ctl_listen_with_reply_answers_requests(ctl: Any, begin: Begin) -> None:
    """With --reply every requester gets the text, and the request is printed."""
    process, alice = listening(ctl, begin, "--count", "1", "--reply", "I am bob")

    assert alice.request("bob", b"who?", timeout=TIMEOUT_S).text() == "I am bob"

    assert ended(process)[:2] == (Status.DONE, "alice\twho?\n")


def test_ctl_listen_without_reply_refuses_requests(ctl: Any, begin: Begin) -> None:
    """The requester is told at once that the listener has no --reply."""
    from brokerd_client import RequestFailed

    process, alice = listening(ctl, begin, "--count", "1")

    with pytest.raises(RequestFailed, match="without --reply"):
        alice.request("bob", b"who?", timeout=TIMEOUT_S)
    assert ended(process)[0] == Status.DONE


def test_ctl_listen_with_count_times_out_if_too_few_arrive(ctl: Any) -> None:
    """With --count the timeout is a failure; without it, it is the normal end."""
    too_few = ctl("bob", "listen", "--count", "1", "--timeout", "0.1")
    enough = ctl("bob", "listen", "--timeout", "0.1")

    assert (too_few.exit_code, too_few.output) == (
        Status.TIMED_OUT,
        "brokerctl: timed out: 0 of 1 arrived in 0.1 s\n",
    )
    assert (enough.exit_code, enough.output) == (Status.DONE, "")


@pytest.mark.parametrize(
    ("arguments", "status"), [([], Status.DONE), (["--count", "5"], Status.INTERRUPTED)]
)
def test_ctl_listen_interrupted_by_ctrl_c_ends(
    ctl: Any, begin: Begin, arguments: list[str], status: Status
) -> None:
    """Ctrl-C is the normal end of listening without --count, and a failure when five
    messages are expected.
    """
    process, alice = listening(ctl, begin, *arguments)
    alice.send("bob", b"one")
    assert process.stdout is not None
    line = process.stdout.readline()

    process.send_signal(signal.SIGINT)

    code, _, err = ended(process)
    assert (line, code, err) == (b"alice\tone\n", status, "")


@pytest.mark.parametrize("arguments", [[], ["--count", "2"], ["--timeout", "60"]])
def test_ctl_listen_fails_when_broker_stops(ctl: Any, begin: Begin, arguments: list[str]) -> None:
    """A listener whose broker stops says so, and names the option that makes it wait.
    Its status is not that of a normal end.
    """
    process, alice = listening(ctl, begin, *arguments)
    # The broker publishes that bob is online before bob's own process knows it.
    alice.send("bob", b"are you there?")
    assert process.stdout is not None
    assert process.stdout.readline() == b"alice\tare you there?\n"

    ctl.broker.stop()

    code, _, err = ended(process)
    assert code == Status.UNREACHABLE
    assert err.startswith("brokerctl: the connection to the broker is gone: ")
    assert err.endswith("(--reconnect waits for it)\n")


def test_ctl_listen_with_reconnect_continues_after_disconnect(ctl: Any, begin: Begin) -> None:
    """With --reconnect it reconnects as the library does, and continues to count."""
    process, alice = listening(ctl, begin, "--reconnect", "--count", "2")
    alice.send("bob", "before")
    assert process.stdout is not None
    assert process.stdout.readline() == b"alice\tbefore\n"

    with alice.watch_presence() as feed:
        ctl.broker.disconnect("bob")
        wait_presence(feed, "bob", online=False)
        wait_presence(feed, "bob", online=True)
    alice.send("bob", "after")

    assert ended(process) == (Status.DONE, "alice\tafter\n", "")


# -- publish and subscribe


def test_ctl_publish_is_printed_by_subscribe(ctl: Any, begin: Begin) -> None:
    """An event shows its topic and its publisher."""
    process = begin(ctl.start("bob", "subscribe", "jobs.>", "--count", "1", "--json"))
    while process.poll() is None:
        assert ctl("alice", "publish", "jobs.new", "first").exit_code == Status.DONE
        if ctl.broker.stats()["subscriptions"]:
            break
    ctl("alice", "publish", "jobs.new", "second")

    status, out, _ = ended(process)

    event = json.loads(out)
    assert status == Status.DONE
    assert (event["kind"], event["topic"], event["sender"]) == ("event", "jobs.new", "alice")
    assert event["payload"] in ("first", "second")


def test_ctl_publish_on_forbidden_topic_is_refused(ctl: Any) -> None:
    """The message is that of the broker."""
    ctl.broker.add("shy", publish=["quiet.>"])

    assert ctl("shy", "publish", "loud", "x").output.startswith("brokerctl: denied: ")
    assert ctl("shy", "publish", "quiet.words", "x").exit_code == Status.DONE


@pytest.mark.parametrize("command", [["publish", "a..b", "x"], ["subscribe", "a.>.b"]])
def test_ctl_publish_or_subscribe_invalid_topic_is_usage_error(
    ctl: Any, command: list[str]
) -> None:
    """Nothing is sent for an invalid topic."""
    assert ctl("alice", *command).exit_code == Status.USAGE
