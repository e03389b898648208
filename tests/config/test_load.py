"""Loading: the values of a valid file, and each mistake of an invalid one."""

from __future__ import annotations

import errno
import os
import socket
import stat
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest

from brokerd.config import load as load_module
from brokerd.config import yaml_reader
from brokerd.config.load import ConfigError, build_config, load, load_text
from brokerd.config.marked_values import Map
from brokerd.config.model import LogFormat, LogLevel, Rule, Source, WhenConnected, WhenFull
from brokerd.config.problems import one_line
from brokerd.config.yaml_reader import Document
from brokerd_client.address import Address


def lines_of(text: str, path: str = "f") -> list[str]:
    """Return the error lines of an invalid text."""
    with pytest.raises(ConfigError) as refused:
        load_text(text, path)
    return str(refused.value).splitlines()


def lines_of_file(path: Path) -> list[str]:
    """Return the error lines of an invalid file, relative to its directory."""
    with pytest.raises(ConfigError) as refused:
        load(path)
    return [line.replace(f"{path.parent}{os.sep}", "") for line in str(refused.value).splitlines()]


def write(path: Path, text: str, mode: int = 0o600) -> Path:
    """Write a file that only its owner can read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    path.chmod(mode)
    return path


EVERYTHING = """\
listen:
  - /run/b.sock
  - {address: 0.0.0.0:6000, allow_md5: true}
  - {address: /run/c.sock, mode: "0660", group: 7}
  - [localhost, 6001]
  - "[::1]:6002"
  - "@abstract"
clients:
  alice: {key: a}
  worker:
    keys:
      - {key: old, not_before: 2025-01-01, not_after: 2026-12-31T00:00:00Z}
      - {key: new, not_before: "2026-12-30T12:00:00+02:00"}
    connections: 8
    send_to: [alice, "report.*"]
    publish: ["jobs.>"]
    subscribe:
      - jobs.>
      - $broker.>
    queue: 64KiB
    when_full: drop_oldest
    when_connected: replace
    rate: {messages: 600/m, bytes: 50MiB/s}
    allow_md5: true
    peer_uid: [0, 1000]
    admin: true
  ops: {peer_uid: [0]}
limits:
  max_message: 1MB
  connections: 5
  handshake_timeout: 500ms
  handshakes: 6
  identify_by_key: 0
  wait_timeout: 1m
  drain_timeout: 0
log: {level: debug, format: json}
"""


def test_config_with_every_key_gives_every_value() -> None:
    """A file with every key gives a configuration with every value. Durations are in
    seconds, sizes in bytes.
    """
    config = load_text(EVERYTHING, "f")

    assert [
        (str(entry.address), entry.mode, entry.group, entry.allow_md5) for entry in config.listen
    ] == [
        ("/run/b.sock", 0o600, None, False),
        ("0.0.0.0:6000", None, None, True),
        ("/run/c.sock", 0o660, 7, False),
        ("localhost:6001", None, None, False),
        ("[::1]:6002", None, None, False),
        ("@abstract", None, None, False),
    ]
    worker = config.clients["worker"]
    assert [(key.value, key.not_before, key.not_after) for key in worker.keys] == [
        (b"old", datetime(2025, 1, 1, tzinfo=UTC), datetime(2026, 12, 31, tzinfo=UTC)),
        (b"new", datetime(2026, 12, 30, 10, tzinfo=UTC), None),
    ]
    assert worker.connections == 8
    assert [str(rule) for rule in worker.send_to] == ["alice", "report.*"]
    assert [str(rule.source) for rule in worker.subscribe] == ["f:18", "f:19"]
    assert worker.queue == 65536
    assert (worker.when_full, worker.when_connected) == (
        WhenFull.DROP_OLDEST,
        WhenConnected.REPLACE,
    )
    assert (worker.rate.messages, worker.rate.bytes) == (10, 50 * 2**20)
    assert worker.allow_md5
    assert worker.admin
    assert worker.peer_uid == (0, 1000)
    assert str(worker.source) == "f:10"
    assert config.clients["ops"].keys == ()
    limits = config.limits
    assert (limits.max_message, limits.connections, limits.handshake_timeout) == (10**6, 5, 0.5)
    assert (limits.handshakes, limits.identify_by_key) == (6, 0)
    assert (limits.wait_timeout, limits.drain_timeout) == (60, 0)
    assert (config.log.level, config.log.format) == (LogLevel.DEBUG, LogFormat.JSON)


def test_config_key_left_out_has_documented_default() -> None:
    """A key that is left out has the default of docs/configuration.md."""
    config = load_text("listen: [/run/b.sock]\nclients: {a: {key: k}}\n", "f")

    client = config.clients["a"]
    assert (client.connections, client.queue, client.allow_md5, client.admin) == (
        1,
        8 * 2**20,
        False,
        False,
    )
    assert client.send_to == (Rule("*"),)
    assert client.publish == (Rule(">"),)
    assert client.subscribe == (Rule(">"), Rule("$broker.>"))
    assert client.send_to[0].source is None
    assert (client.when_full, client.when_connected) == (WhenFull.WAIT, WhenConnected.REFUSE)
    assert (client.rate.messages, client.rate.bytes, client.peer_uid) == (None, None, None)
    limits = config.limits
    assert (limits.max_message, limits.connections, limits.handshakes) == (16 * 2**20, 10_000, 256)
    assert (limits.identify_by_key, limits.handshake_timeout) == (1000, 5)
    assert (limits.wait_timeout, limits.drain_timeout) == (30, 8)
    assert (config.log.level, config.log.format) == (LogLevel.INFO, LogFormat.AUTO)


def test_config_six_mistakes_are_six_error_lines() -> None:
    """Six different mistakes in one file give six lines, in the order of the file. Each
    line has its own line number and column.
    """
    text = """\
listen: [/run/b.sock]
clients:
  alice:
    key: a
    conections: 3
  bob:
    key: a
    queue: 8 parsecs
    send_to: [alcie]
  carol: {}
limits:
  max_message: -1
"""

    assert lines_of(text) == [
        "f:5:5: clients.alice.conections: unknown key 'conections' (did you mean 'connections'?)",
        (
            "f:7:10: clients.bob.key: has the same key as client 'alice' at f:4:10 "
            "(give each client a key of its own: brokerd key)"
        ),
        (
            "f:8:12: clients.bob.queue: '8 parsecs' is not a valid size "
            "(give bytes, or a number with kB, MB, GB, KiB, MiB or GiB, such as 8MiB)"
        ),
        "f:9:15: clients.bob.send_to[0]: there is no client 'alcie' (did you mean 'alice'?)",
        (
            "f:10:3: clients.carol: has no way to authenticate "
            "(give one of key, key_file, key_env, key_credential and keys, or peer_uid)"
        ),
        (
            "f:12:16: limits.max_message: this number is not a valid size "
            "(give bytes, or a number with kB, MB, GB, KiB, MiB or GiB, such as 8MiB)"
        ),
    ]


GOOD = "listen: [/run/b.sock]\n"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        # The file as a whole.
        ("", "f:1:1: (file): is empty (a configuration has listen: and clients:)"),
        ("# only a comment\n", "f:1:1: (file): is empty (a configuration has listen: and clients:)"),
        ("--- \n", "f:1:1: (file): is empty (a configuration has listen: and clients:)"),
        ("- a\n", "f:1:1: (file): is not a mapping (a configuration begins with keys such as listen: and clients:)"),
        ("just text\n", "f:1:1: (file): is not a mapping (a configuration begins with keys such as listen: and clients:)"),
        ("clients: {}\n", "f:1:1: listen: is missing (give at least one address, such as /run/brokerd/brokerd.sock)"),
        # Unknown keys, and the monitor.
        (GOOD + "client: {}\n", "f:2:1: client: unknown key 'client' (did you mean 'clients'?)"),
        (GOOD + "zzz: 1\n", ("f:2:1: zzz: unknown key 'zzz' (known here: clients, cluster, include, limits, listen, log, "
         "monitor, store)")),
        (GOOD + "monitor: 6060\n", ("f:2:10: monitor: 6060 is a port without a host (give HOST:6060, "
         "such as localhost:6060)")),
        (GOOD + "monitor: {address: 'h:1', per_clent: 1}\n", ("f:2:27: monitor.per_clent: unknown key 'per_clent' "
         "(did you mean 'per_client'?)")),
        (GOOD + "monitor: {per_client: true}\n", "f:2:1: monitor.address: is missing (give it)"),
        (GOOD + "monitor: {address: 'h:1', per_client: 1}\n", ("f:2:39: monitor.per_client: is a number, not true or "
         "false (give true or false)")),
        (GOOD + "monitor: {address: 'h:1', hosts: ['b:80']}\n", ("f:2:35: monitor.hosts[0]: is not a valid host name "
         "(give a name without a port, such as broker.example)")),
        ("monitor: /run/b.sock\n" + GOOD, ("f:1:10: monitor: /run/b.sock is given twice, first at f:2:10 "
         "(keep one of them)")),
        (GOOD + "monitor: []\n", "f:2:1: monitor: a list of 0 is not a valid address (give a host and a port number)"),
        ("listen:\n- {address: a:1, tls: {key: k}}\n", "f:2:18: listen[0].tls.certificate: is missing (give it)"),
        # listen
        ("listen: []\n", "f:1:1: listen: is an empty list (give at least one address)"),
        ("listen: /run/b\n", "f:1:9: listen: is text, not a list (give a list: [one, other], or one '- item' a line)"),
        ("listen: [5]\n", "f:1:10: listen[0]: 5 is a port without a host (give HOST:5, such as localhost:5)"),
        ("listen: [[h, 70000]]\n", "f:1:10: listen[0]: 70000 is not a valid port (give a number from 0 to 65535)"),
        ("listen: [[h, 1, 2]]\n", "f:1:10: listen[0]: a list of 3 is not a valid address (give a host and a port number)"),
        ("listen: [{mode: '0600'}]\n", "f:1:10: listen[0].address: is missing (give it)"),
        ("listen: [{address: /b, mode: 0600}]\n", ("f:1:30: listen[0].mode: is not a valid file mode "
         '(give three octal digits in quotes, such as "0600" or "0660")')),
        ("listen: [{address: /b, group: [a]}]\n",
         "f:1:24: listen[0].group: is not a valid group (give a group's name or number)"),
        ("listen: [{address: 'h:1', mode: '0600'}]\n", ("f:1:27: listen[0].mode: applies to Unix sockets only "
         "(take it out)")),
        ("listen: [{address: '@h', group: g}]\n", ("f:1:26: listen[0].group: applies to Unix sockets only "
         "(take it out)")),
        ("listen: [/b, {address: /b}]\n", ("f:1:24: listen[1].address: /b is given twice, first at f:1:10 "
         "(keep one of them)")),
        ("listen: [/" + "x" * 107 + "]\n", ("f:1:10: listen[0]: a Unix socket's path has at most 107 bytes; this has "
         "108 (give a shorter one)")),
        # clients
        (GOOD + "clients: [a]\n", "f:2:1: clients: is a list, not a mapping (give keys with values)"),
        (GOOD + "clients: {a b: {key: k}}\n", ("f:2:11: clients.a b: 'a b' is not a valid client name (1 to 64 letters, digits, "
         "'_', '.' and '-', not beginning with '.' or '-')")),
        (GOOD + "clients: {a: secret}\n", "f:2:14: clients.a: is text, not a mapping (give keys with values)"),
        (GOOD + "clients: {a: {key: 5}}\n", "f:2:20: clients.a.key: is not text (put the key in quotes)"),
        (GOOD + "clients: {a: {key: ''}}\n", ("f:2:20: clients.a.key: is empty "
         "(give at least one byte; brokerd key makes a good one)")),
        (GOOD + "clients: {a: {key: k, key_env: E}}\n", ("f:2:23: clients.a.key_env: key is given too, at f:2:15 "
         "(keep one of key, key_env)")),
        (GOOD + "clients: {a: {keys: []}}\n", ("f:2:15: clients.a.keys: is an empty list (give at least one item, or "
         "take the key out)")),
        (GOOD + "clients: {a: {keys: [{}]}}\n", ("f:2:22: clients.a.keys[0]: has no key "
         "(give one of file, key, env and credential)")),
        (GOOD + "clients: {a: {keys: [{key: k, env: E}]}}\n", ("f:2:22: clients.a.keys[0]: has key and env "
         "(give one of file, key, env and credential)")),
        (GOOD + "clients: {a: {keys: [{key: k, not_after: soon}]}}\n", ("f:2:42: clients.a.keys[0].not_after: is not a "
         "valid date and time (give a date and time such as 2026-12-31T00:00:00Z)")),
        (GOOD + "clients: {a: {keys: [{key: k, not_before: 2026-01-02, not_after: 2026-01-01}]}}\n",
         ("f:2:66: clients.a.keys[0].not_after: is not after not_before: the key would never be accepted "
         "(give a later time)")),
        (GOOD + "clients: {a: {kye: k}}\n", "f:2:15: clients.a.kye: unknown key 'kye' (did you mean 'key'?)"),
        (GOOD + "clients: {a: {key: k, connections: '8'}}\n", ("f:2:36: clients.a.connections: is text, not a whole "
         "number (give a whole number)")),
        (GOOD + "clients: {a: {key: k, connections: 0}}\n", ("f:2:36: clients.a.connections: is too small "
         "(give 1 or more)")),
        (GOOD + "clients: {a: {key: k, admin: 1}}\n", ("f:2:30: clients.a.admin: is neither true nor false "
         "(give true, false or payload)")),
        (GOOD + "clients: {a: {key: k, when_full: wiat}}\n", ("f:2:34: clients.a.when_full: is not one of wait, refuse, "
         "drop_oldest, disconnect (did you mean 'wait'?)")),
        (GOOD + "clients: {a: {key: k, send_to: b}}\n", ("f:2:32: clients.a.send_to: is text, not a list "
         "(give a list: [one, other], or one '- item' a line)")),
        (GOOD + "clients: {a: {key: k, send_to: [$broker]}}\n", ("f:2:33: clients.a.send_to[0]: is the broker itself "
         "(take it out: every client may send to $broker)")),
        (GOOD + "clients: {a: {key: k, send_to: ['b c*']}}\n", ("f:2:33: clients.a.send_to[0]: can't match any client "
         "(give a client's name, or a pattern such as report.*)")),
        (GOOD + "clients: {a: {key: k, send_to: [zzz]}}\n", ("f:2:33: clients.a.send_to[0]: there is no client 'zzz' "
         "(give a name from clients:, or a pattern with '*')")),
        (GOOD + "clients: {a: {key: k, publish: [$x]}}\n", ("f:2:33: clients.a.publish[0]: is reserved for the "
         "broker (only the broker publishes below '$')")),
        (GOOD + "clients: {a: {key: k, subscribe: [a..b]}}\n", ("f:2:35: clients.a.subscribe[0]: 'a..b' is not a valid topic "
         "pattern (its tokens are joined by single dots)")),
        (GOOD + "clients: {a: {key: k, subscribe: ['>.a']}}\n", ("f:2:35: clients.a.subscribe[0]: '>.a' is not a valid topic "
         "pattern ('>' may only be its last token)")),
        (GOOD + "clients: {a: {key: k, rate: 5}}\n", ("f:2:29: clients.a.rate: is a number, not a mapping "
         "(give keys with values)")),
        (GOOD + "clients: {a: {key: k, rate: {message: 5}}}\n", ("f:2:30: clients.a.rate.message: unknown key "
         "'message' (did you mean 'messages'?)")),
        (GOOD + "clients: {a: {peer_uid: [-1]}}\n", "f:2:26: clients.a.peer_uid[0]: is too small (give 0 or more)"),
        (GOOD + "clients: {a: {peer_uid: [root]}}\n", ("f:2:26: clients.a.peer_uid[0]: is text, not a whole number "
         "(give a whole number)")),
        # The rest.
        (GOOD + "limits: {handshake_timeout: 0}\n", ("f:2:29: limits.handshake_timeout: is not a valid time limit "
         "(give more than 0, such as 5s)")),
        (GOOD + "limits: [a]\n", "f:2:1: limits: is a list, not a mapping (give keys with values)"),
        (GOOD + "limits:\n", "f:2:1: limits: is empty (give a value, or take the key out)"),
        (GOOD + "log: {level: loud}\n", ("f:2:14: log.level: is not one of debug, info, warning, error "
         "(give one of these words)")),
        (GOOD + "clients:\n  a: {key: k, allow_md5: 1}\n", ("f:3:26: clients.a.allow_md5: is a number, not true or false "
         "(give true or false)")),
        (GOOD + "clients:\n  a: {key: k, <<: 5}\n", ("f:3:19: clients.a.<<: only a mapping can be merged (give an alias "
         "to one, or a list of them)")),
        (GOOD + "include: a\n", ("f:2:10: include: is text, not a list (give a list: [one, other], or one '- item' a "
         "line)")),
        (GOOD + "include: [5]\n", "f:2:11: include[0]: is a number, not text (put it in quotes)"),
        (GOOD + "include: ['']\n", "f:2:11: include[0]: is empty (give a value, or take the key out)"),
        (GOOD + 'include: ["a\\0b"]\n', "f:2:11: include[0]: is not a valid path (give a file or a pattern)"),
        (GOOD + "include: [no/such.yaml]\n", ("f:2:11: include[0]: there is no file no/such.yaml (make it, or give "
         "another)")),
    ],
)  # fmt: skip
def test_config_mistake_is_one_error_line_with_place(text: str, line: str) -> None:
    """Each mistake is one line: file, line, column and path, the mistake, and how to
    correct it.
    """
    assert lines_of(text) == [line]


def test_config_entry_with_mistake_is_checked_further() -> None:
    """An entry with an invalid value is still checked for missing key files, shared
    keys and unknown names.
    """
    text = (
        GOOD + "clients:\n"
        "  a: {key: k, queue: [], send_to: [zz, 5]}\n"
        "  b: {keys: [{kee: 1}, {file: none}, {key: k}], admin: 7}\n"
    )

    assert [line.split(": ")[:2] for line in lines_of(text)] == [
        ["f:3:15", "clients.a.queue"],
        ["f:3:36", "clients.a.send_to[0]"],
        ["f:3:40", "clients.a.send_to[1]"],
        ["f:4:15", "clients.b.keys[0].kee"],
        ["f:4:31", "clients.b.keys[1].file"],
        ["f:4:44", "clients.b.keys[2].key"],
        ["f:4:56", "clients.b.admin"],
    ]


def test_config_many_unknown_names_get_limited_suggestions() -> None:
    """Each of thousands of unknown names is reported. Only the first have a suggestion,
    so that the check ends soon.
    """
    count = 3000
    entries = "".join(f"  client-{n}: {{key: k{n}, send_to: [klient-{n}]}}\n" for n in range(count))

    lines = lines_of(GOOD + "clients:\n" + entries)

    assert len(lines) == count
    assert lines[0].endswith("(did you mean 'client-0'?)")
    assert 0 < sum("did you mean" in line for line in lines) <= 200_000 // count


def test_config_anchor_mistake_is_reported_once() -> None:
    """A mistake in an anchor is one line, however many entries merge it."""
    text = (
        GOOD
        + "clients:\n  a: &a {key: k, qeue: 1}\n"
        + "".join(f"  b{n}: {{<<: *a, key: k{n}}}\n" for n in range(9))
    )

    assert lines_of(text) == ["f:3:18: clients.a.qeue: unknown key 'qeue' (did you mean 'queue'?)"]


def test_config_anchor_rules_keep_their_place() -> None:
    """Rules that come through an anchor keep the place where they are written. The
    entries that merge the anchor share them.
    """
    text = GOOD + "clients:\n  a: &a {key: k, send_to: [b]}\n  b: {<<: *a, key: l}\n"

    clients = load_text(text, "f").clients

    assert str(clients["b"].send_to[0].source) == "f:3"
    assert clients["a"].send_to is clients["b"].send_to


def test_config_entries_of_one_form_keep_their_own_values() -> None:
    """Entries that differ only in their key share their settings, not key and place."""
    config = load_text(
        "listen: ['@x']\n"
        "clients:\n"
        "  a: {key: a-key, connections: 2}\n"
        "  b: {key: b-key, connections: 2}\n"
        "  c: {connections: 2, key: c-key}\n"
        "  d: {key: d-key, send_to: [a]}\n"
        "  e: {key: e-key, send_to: [a]}\n",
        "f",
    )

    clients = config.clients.values()
    assert [client.keys[0].value for client in clients] == [
        *(b"a-key", b"b-key", b"c-key", b"d-key", b"e-key")
    ]
    assert [client.connections for client in clients] == [2, 2, 2, 1, 1]
    assert [client.source.line for client in clients] == [3, 4, 5, 6, 7]
    assert [str(client.send_to[0].source) for client in clients] == [*["None"] * 3, "f:6", "f:7"]


def test_config_entry_like_a_valid_one_is_refused() -> None:
    """True and 1.0 equal 1 in Python, and are no whole numbers in a file."""
    lines = lines_of(
        "listen: ['@x']\n"
        "clients:\n"
        "  a: {key: a, connections: 1}\n"
        "  b: {key: b, connections: true}\n"
        "  c: {key: c, connections: 1.0}\n"
        "  d: {key: 4, connections: 1}\n"
        "  e: {key: '', connections: 1}\n"
        "  f: {connections: 1}\n"
    )

    assert lines == [
        "f:4:28: clients.b.connections: is true or false, not a whole number (give a whole number)",
        "f:5:28: clients.c.connections: is a number, not a whole number (give a whole number)",
        "f:6:12: clients.d.key: is not text (put the key in quotes)",
        "f:7:12: clients.e.key: is empty (give at least one byte; brokerd key makes a good one)",
        (
            "f:8:3: clients.f: has no way to authenticate"
            " (give one of key, key_file, key_env, key_credential and keys, or peer_uid)"
        ),
    ]


def test_config_send_to_pattern_without_match_is_accepted() -> None:
    """A pattern may match no client yet. Only a plain name has to exist."""
    config = load_text(GOOD + "clients: {a: {key: k, send_to: ['b*', 'c?', '[de]', '[!f]g']}}\n")

    assert [rule.pattern for rule in config.clients["a"].send_to] == ["b*", "c?", "[de]", "[!f]g"]


def test_config_port_0_twice_gives_two_listeners() -> None:
    """Port 0 given twice is not a duplicate: the system chooses two different ports."""
    config = load_text("listen: ['127.0.0.1:0', '127.0.0.1:0']\n")

    assert len(config.listen) == 2


def test_config_error_with_line_breaks_in_names_stays_one_line() -> None:
    """Line breaks and escapes in names, patterns and file names can't add a second line
    to an error.
    """
    lines = lines_of(
        GOOD
        + 'clients: {"a\\nb\\e[31m": {key: k, "x\\ny": 1, send_to: ["q\\nr"], queue: "1\\n"}}\n',
        "f\ng",
    )

    assert len(lines) == 4
    assert all(line.startswith(r"f\ng:2:") and line.isprintable() for line in lines)


def test_one_line_unprintable_characters_are_escaped() -> None:
    """Letters of any script stay unchanged. Control characters and lone surrogates
    become escapes.
    """
    assert one_line("é ü 日本 a\tb\udcff") == "é ü 日本 a\\tb\\udcff"


# Files.


def test_config_relative_paths_start_from_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Key files and sockets are found beside the configuration, wherever the broker is
    started.
    """
    write(tmp_path / "etc" / "keys" / "a", "k\n")
    file = write(
        tmp_path / "etc" / "b.yaml", "listen: [b.sock]\nclients: {a: {key_file: keys/a}}\n"
    )
    monkeypatch.chdir(tmp_path)

    config = load(file)

    assert config.clients["a"].keys[0].value == b"k"
    assert config.listen[0].address == Address("AF_UNIX", path=str(tmp_path / "etc" / "b.sock"))
    assert load("etc/b.yaml").listen[0].address.path == str(Path("etc", "b.sock"))


def test_include_nested_adds_listeners_and_clients(tmp_path: Path) -> None:
    """Included files, and the files that these include, add to listen and clients. They
    come in sorted order, once each.
    """
    file = write(
        tmp_path / "b.yaml",
        "listen: [b.sock]\nclients: {a: {key: a}}\ninclude: ['d/*.yaml', more.yaml]\n",
    )
    write(tmp_path / "d" / "20.yaml", "clients: {c: {key: c, send_to: [a]}}\n")
    write(
        tmp_path / "d" / "10.yaml",
        "clients: {b: {key_file: key-b}}\ninclude: [sub/x.yml, ../b.yaml]\n",
    )
    write(tmp_path / "d" / "key-b", "b")
    write(tmp_path / "d" / "sub" / "x.yml", "listen: [x.sock]\nclients: {x: {key: x}}\n")
    write(tmp_path / "d" / "30.yaml", "# nothing here yet\n")
    write(
        tmp_path / "more.yaml", "clients: {m: {key: m}}\ninclude: ['no-such-*.yaml', d/10.yaml]\n"
    )

    config = load(file)

    assert list(config.clients) == ["a", "b", "x", "c", "m"]
    assert [entry.address.path for entry in config.listen] == [
        str(tmp_path / "b.sock"),
        str(tmp_path / "d" / "sub" / "x.sock"),
    ]
    assert str(config.clients["c"].send_to[0].source) == f"{tmp_path / 'd' / '20.yaml'}:1"
    assert [Path(name).name for name in config.files] == [
        "b.yaml",
        "10.yaml",
        "x.yml",
        "20.yaml",
        "30.yaml",
        "more.yaml",
    ]


def test_include_wildcards_in_directory_name_are_literal(tmp_path: Path) -> None:
    """Only the include is a pattern, not the directory of the file that holds it."""
    file = write(tmp_path / "[ab]*" / "b.yaml", "listen: [b.sock]\ninclude: ['c*.yaml']\n")
    write(tmp_path / "[ab]*" / "c1.yaml", "clients: {c: {key: c}}\n")

    assert list(load(file).clients) == ["c"]


def test_include_duplicate_client_error_names_both_places(tmp_path: Path) -> None:
    """A client in two files is an error at the second place, and the error names the
    first.
    """
    file = write(
        tmp_path / "b.yaml", "listen: [b.sock]\nclients:\n  a: {key: a}\ninclude: [c.yaml]\n"
    )
    write(tmp_path / "c.yaml", "listen: [b.sock]\nclients:\n  b: {key: b}\n  a: {key: other}\n")

    assert lines_of_file(file) == [
        "c.yaml:1:10: listen[0]: b.sock is given twice, first at b.yaml:1:10 (keep one of them)",
        "c.yaml:4:3: clients.a: client 'a' is given twice, first at b.yaml:3:3 (keep one of them)",
    ]


def test_include_errors_are_sorted_by_file_and_line(tmp_path: Path) -> None:
    """All errors come at once: those of the main file first, then those of each
    included file under its own name.
    """
    file = write(
        tmp_path / "b.yaml",
        "include: [c.yaml, d.yaml, bad.yaml]\nlisten: [b.sock]\nclients:\n  a: {kye: a}\n",
    )
    write(tmp_path / "c.yaml", "limits: {}\nclients:\n  b:\n    key: b\n    send_to: [dd, bob]\n")
    write(tmp_path / "d.yaml", "clients:\n  d: {key: [d}\n  e: {}\n")
    (tmp_path / "bad.yaml").write_bytes(b"clients:\n  \xff\xfe: 1\n")

    lines = lines_of_file(file)

    assert [line.split(": ")[:2] for line in lines] == [
        ["b.yaml:4:7", "clients.a.kye"],
        ["c.yaml:1:1", "limits"],
        # 'bob' may be in the file that can't be read, and 'dd' resembles no other name.
        ["d.yaml:2:14", "clients.d.key"],
        ["bad.yaml:2:3", "(file)"],
    ]
    assert "belongs in the main file only (move it to" in lines[1]
    assert "not YAML" in lines[2]
    assert lines[3] == "bad.yaml:2:3: (file): is not UTF-8 (save it as UTF-8)"


def test_include_missing_file_keeps_suggestion_for_unknown_name(tmp_path: Path) -> None:
    """A name much like an existing one is still called a mistake when an included file
    can't be read.
    """
    file = write(
        tmp_path / "b.yaml",
        "listen: [b.sock]\ninclude: [c.yaml]\nclients: {alice: {key: a, send_to: [alcie]}}\n",
    )

    assert lines_of_file(file) == [
        "b.yaml:2:11: include[0]: there is no file c.yaml (make it, or give another)",
        "b.yaml:3:37: clients.alice.send_to[0]: there is no client 'alcie' (did you mean 'alice'?)",
    ]


def test_config_path_not_regular_file_is_refused(tmp_path: Path) -> None:
    """A missing file, a directory, a device and an invalid path are one line each."""
    assert lines_of_file(tmp_path / "no.yaml") == [
        "no.yaml:1:1: (file): there is no file no.yaml (make it, or give another)"
    ]
    (tmp_path / "dir").mkdir()
    assert lines_of_file(tmp_path / "dir") == ["dir:1:1: (file): dir is a directory (give a file)"]
    with pytest.raises(ConfigError, match="is not a regular file"):
        load("/dev/zero" if os.path.exists("/dev/zero") else tmp_path / "no.yaml")  # noqa: PTH110
    with pytest.raises(ConfigError, match="is not a valid path"):
        load("a\0b")


def test_include_pattern_matching_directory_is_refused(tmp_path: Path) -> None:
    """A pattern that matches a directory is an error of the file that holds the
    pattern.
    """
    file = write(tmp_path / "b.yaml", "listen: [b.sock]\ninclude: ['d*']\n")
    (tmp_path / "dir").mkdir()

    assert lines_of_file(file) == ["b.yaml:2:11: include[0]: dir is a directory (give a file)"]


@pytest.mark.parametrize(
    ("pattern", "wrong"),
    [
        ("gone/*.yaml", "there is no directory gone (make it, or take gone/*.yaml out)"),
        ("gone*/../gone/*.yaml", None),
        ("d/gone/*.yaml", "there is no directory d/gone (make it, or take d/gone/*.yaml out)"),
        ("gone/*/x.yaml", "there is no directory gone (make it, or take gone/* out)"),
        ("b.yaml/*", "b.yaml is not a directory (give a pattern of files in a directory)"),
        (
            "link/*.yaml",
            (
                "there is no directory link, where the link link leads: nowhere (make it, or take"
                " link/*.yaml out)"
            ),
        ),
        (
            "li*/*.yaml",
            "link does not exist, where the link link leads: nowhere (make that, or remove the link)",
        ),
        (
            "li*",
            "there is no file link, where the link link leads: nowhere (make it, or give another)",
        ),
        (
            "loop/*",
            (
                "the directory loop can't be listed: Too many levels of symbolic links (check the"
                " file system)"
            ),
        ),
        ("d/*.yaml", None),
        ("d/*/*.yaml", None),
        (
            "*/no-such.yaml",
            "link does not exist, where the link link leads: nowhere (make that, or remove the link)",
        ),
        ("[dx]/no-such.yaml", None),
        ("[dx]/k*", None),
        (".*", None),
    ],
)
@pytest.mark.skipif(sys.platform == "win32", reason="links need a privilege here")
def test_include_directory_missing_is_refused(
    tmp_path: Path, pattern: str, wrong: str | None
) -> None:
    """A pattern may match nothing, but only in a directory that exists."""
    file = write(
        tmp_path / "b.yaml",
        f"listen: [b.sock]\ninclude: ['{pattern}']\nclients: {{a: {{key: k}}}}\n",
    )
    write(tmp_path / "d" / "notes.txt", "not a directory")
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")

    if wrong is None:
        assert list(load(file).clients) == ["a"]
    else:
        assert lines_of_file(file) == [f"b.yaml:2:11: include[0]: {wrong}"]


@pytest.mark.parametrize(
    ("pattern", "function", "path", "wrong"),
    [
        ("d/*.yaml", "listdir", "d", "the directory d can't be listed"),
        ("*/*.yaml", "listdir", "d", "the directory d can't be listed"),
        ("*.yaml", "listdir", ".", "the directory . can't be listed"),
        ("*/*.yaml", "stat", "d", "d can't be read"),
        ("*/x.yaml", "lstat", "d/x.yaml", "d/x.yaml can't be read"),
    ],
)
@pytest.mark.parametrize(
    ("number", "right"),
    [
        (errno.EACCES, "let this user read and search every directory on the way"),
        (errno.EIO, "check the file system"),
        (errno.ESTALE, "check the file system"),
    ],
)
def test_include_directory_unreadable_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    pattern: str,
    function: str,
    path: str,
    wrong: str,
    number: int,
    right: str,
) -> None:
    """A failure to list a directory or to look up a file is always reported. It is
    never taken for an empty directory.
    """
    file = write(
        tmp_path / "b.yaml",
        f"listen: [b.sock]\ninclude: ['{pattern}']\nclients: {{a: {{key: k}}}}\n",
    )
    write(tmp_path / "d" / "x.yaml", "clients: {x: {key: x}}\n")
    monkeypatch.chdir(tmp_path)
    real = getattr(os, function)

    def fails(at: object, *args: object, **kwargs: object) -> object:
        if at == path:
            raise OSError(number, os.strerror(number))
        return real(at, *args, **kwargs)

    monkeypatch.setattr(os, function, fails)

    with pytest.raises(ConfigError) as refused:
        load(file.name)
    assert (
        str(refused.value) == f"b.yaml:2:11: include[0]: {wrong}: {os.strerror(number)} ({right})"
    )


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
def test_config_fifo_without_writer_is_refused_at_once(tmp_path: Path) -> None:
    """A FIFO without a writer is refused at once: as a configuration, in an include and
    as a key.
    """
    os.mkfifo(tmp_path / "fifo", 0o600)

    assert lines_of_file(tmp_path / "fifo") == [
        "fifo:1:1: (file): fifo is a FIFO that no process writes to (give a file)"
    ]
    file = write(tmp_path / "b.yaml", "listen: [b.sock]\nclients: {a: {key_file: fifo}}\n")
    assert lines_of_file(file) == [
        "b.yaml:2:25: clients.a.key_file: fifo is not a regular file (give the file that holds the key)"
    ]
    file = write(tmp_path / "c.yaml", "listen: [b.sock]\ninclude: [fifo]\nclients: {a: {key: k}}\n")
    assert lines_of_file(file) == [
        "c.yaml:2:11: include[0]: fifo is a FIFO that no process writes to (give a file)"
    ]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
def test_include_fifo_with_writer_is_read(tmp_path: Path) -> None:
    """The FIFO of a shell's process substitution is a configuration, and may be
    included like any file.
    """
    os.mkfifo(tmp_path / "fifo", 0o600)
    writer = os.open(tmp_path / "fifo", os.O_RDWR)
    os.write(writer, b"clients: {a: {key: k}}\n")
    reader = os.open(tmp_path / "fifo", os.O_RDONLY)
    os.close(writer)
    try:
        file = write(tmp_path / "b.yaml", "listen: [b.sock]\ninclude: [fifo]\n")
        assert set(load(file).clients) == {"a"}
    finally:
        os.close(reader)


@pytest.mark.parametrize("other", ["socket", "/dev/null"])
@pytest.mark.skipif(sys.platform == "win32", reason="no such files here")
def test_include_device_or_socket_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: str
) -> None:
    """A device or a socket is not a configuration, not even an empty one."""
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind("socket")
        file = write(
            tmp_path / "b.yaml",
            f"listen: [b.sock]\ninclude: [{other}]\nclients: {{a: {{key: k}}}}\n",
        )
        (line,) = lines_of_file(file)
    assert line.startswith(f"b.yaml:2:11: include[0]: {other} ")
    assert line.endswith("(give a file)")


@pytest.mark.skipif(
    not hasattr(os, "getuid") or os.getuid() == 0, reason="root can read every file"
)
def test_config_file_unreadable_is_one_error_line(tmp_path: Path) -> None:
    """A file that this user can't read gives one error that says so."""
    file = write(tmp_path / "b.yaml", GOOD, mode=0)

    assert lines_of_file(file) == [
        "b.yaml:1:1: (file): b.yaml can't be read: Permission denied (let this user read it)"
    ]


def test_config_with_byte_order_mark_is_accepted(tmp_path: Path) -> None:
    """A file saved with a byte order mark is read. Its columns count from the text."""
    file = write(tmp_path / "b.yaml", "")
    file.write_bytes(b"\xef\xbb\xbflisten: [b.sock]\r\nclients: {}\r\n")

    assert len(load(file).listen) == 1
    assert lines_of("\ufeffx: 1\nlisten: [/b]\n")[0].startswith("f:1:1: x:")


def test_config_load_changes_no_files(tmp_path: Path) -> None:
    """Reading a configuration creates, changes and removes no files."""
    write(tmp_path / "key", "k\n")
    file = write(tmp_path / "b.yaml", "listen: [b.sock]\nclients: {a: {key_file: key}}\n")
    before = {
        path: (path.stat().st_mtime_ns, stat.S_IMODE(path.stat().st_mode))
        for path in tmp_path.iterdir()
    }

    load(file)

    assert {
        path: (path.stat().st_mtime_ns, stat.S_IMODE(path.stat().st_mode))
        for path in tmp_path.iterdir()
    } == before


# Built by a program.


def test_build_config_with_address_keys_and_mappings_gives_config() -> None:
    """build_config takes an address, keys as text or bytes, and mappings as in the
    file.
    """
    config = build_config(
        ("localhost", 0),
        {"a": b"\xff\x00", "b": "text", "c": {"key": b"c", "send_to": ["a"], "queue": "1KiB"}},
        limits={"max_message": "1MiB"},
        log={"level": "error"},
    )

    assert str(config.listen[0].address) == "localhost:0"
    assert [client.keys[0].value for client in config.clients.values()] == [
        b"\xff\x00",
        b"text",
        b"c",
    ]
    assert config.clients["c"].queue == 1024
    assert config.limits.max_message == 2**20
    assert config.log.level is LogLevel.ERROR


def test_build_config_mistakes_are_reported_by_path() -> None:
    """build_config refuses the same mistakes as the loader of a file. Its errors name
    the path, as there are no lines.
    """
    with pytest.raises(ConfigError) as refused:
        build_config(
            ["/run/b.sock", {"adress": 1}],
            {"a": b"", "b": {"key": "k", "send_to": ["c"]}, "d": {"keys": 5}},
        )

    assert [line.split(": ")[:2] for line in str(refused.value).splitlines()] == [
        ["(program)", "listen[1].address"],
        ["(program)", "listen[1].adress"],
        ["(program)", "clients.a.key"],
        ["(program)", "clients.d.keys"],
        ["(program)", "clients.b.send_to[0]"],
    ]


def test_config_object_is_read_only() -> None:
    """The configuration that the daemon holds is read-only."""
    config = load_text(GOOD + "clients: {a: {key: k}}\n")

    with pytest.raises(TypeError):
        config.clients["b"] = config.clients["a"]  # type: ignore[index]
    with pytest.raises(AttributeError):
        config.clients["a"].admin = True  # type: ignore[misc]
    with pytest.raises(ValueError, match="frozen"):
        config.limits.connections = 1


def test_config_client_moved_in_file_is_equal() -> None:
    """The place of an entry doesn't count when two entries are compared."""
    text = "clients: {a: {key: k, send_to: [a]}}\n"
    before, after = load_text(GOOD + text), load_text("# moved\n\n" + GOOD + text, "elsewhere")

    assert before.clients["a"] == after.clients["a"]
    assert before.clients["a"].source == Source("brokerd.yaml", 2)
    assert after.clients["a"].source == Source("elsewhere", 4)
    assert before.clients["a"] != load_text(GOOD + text.replace("key: k", "key: l")).clients["a"]


def test_listener_socket_name_is_kept_unique_and_valid(tmp_path: Path) -> None:
    """The name of an activated socket is kept. A name given twice, or one that systemd
    wouldn't accept, is an error.
    """
    config = load_text("listen: [{address: 127.0.0.1:1, name: team}]\nclients: {a: {key: k}}\n")
    assert config.listen[0].name == "team"
    twice = (
        "listen:\n  - {address: 127.0.0.1:1, name: team}\n  - {address: 127.0.0.1:2, name: team}\n"
    )
    assert lines_of(twice + "clients: {a: {key: k}}\n") == [
        (
            "f:3:34: listen[1].name: the socket 'team' is given twice, first at f:2:34 "
            "(keep one of them)"
        )
    ]
    (line,) = lines_of('listen: [{address: "127.0.0.1:1", name: "a:b"}]\nclients: {a: {key: k}}\n')
    assert "is not a valid socket name (give FileDescriptorName= of the .socket unit" in line


def test_load_frees_what_was_read_entry_by_entry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Freed all at once, a hundred thousand entries would keep other threads waiting."""
    documents: list[Document] = []

    def noting(text: str, file: str) -> Document:
        documents.append(yaml_reader.read(text, file))
        return documents[-1]

    monkeypatch.setattr(load_module, "read", noting)
    (tmp_path / "more.yaml").write_text("clients: {c: {key: c}}")
    (tmp_path / "list.yaml").write_text("[]")
    main = tmp_path / "main.yaml"
    main.write_text("listen: ['@x']\ninclude: [more.yaml]\nclients: {a: {key: a}, b: {key: b}}")
    for file in tmp_path.iterdir():
        file.chmod(0o600)

    assert [*load(main).clients] == ["a", "b", "c"]
    with pytest.raises(ConfigError):
        load(tmp_path / "list.yaml")

    *freed, bad = (document.root for document in documents)
    for root in freed:
        assert isinstance(root, Map)
        clients = root["clients"]
        assert isinstance(clients, Map)
        assert not clients
        assert not clients.marks
    assert bad == []
