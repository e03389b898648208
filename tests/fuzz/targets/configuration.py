"""The configuration file, and a program's values: the result is a Config or whole lines
of problems, in bounded time.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from brokerd.config import load as loading
from brokerd.config.load import ConfigError, build_config, load_text

ROOT = Path(__file__).resolve().parents[3]
#: Seconds of computing for one input; an instrumented run takes some ten times as long
#: as an ordinary one.
PATIENCE_S = 10.0


def target(data: bytes) -> None:
    """Load the bytes as a file; if they are JSON of the right form, build from the
    values too.
    """
    begin = time.process_time()
    # What a fuzzer makes up must lead to no other file than its own.
    with mock.patch.object(loading, "matching", return_value=[]):
        try:
            load_text(data, "f", {})
        except ConfigError as error:
            check(error)
        program(data)
    assert time.process_time() - begin < PATIENCE_S


def program(data: bytes) -> None:
    """Build from the values, if they have the types that ``build_config`` allows."""
    try:
        root = json.loads(data)
    except (ValueError, RecursionError):
        return
    if not isinstance(root, dict) or not isinstance(root.get("clients"), dict):
        return
    sections = {name: root.get(name) for name in ("limits", "log")}
    if not all(isinstance(entry, (str, dict)) for entry in root["clients"].values()):
        return
    if not all(section is None or isinstance(section, dict) for section in sections.values()):
        return
    try:
        build_config(root.get("listen"), root["clients"], **sections, monitor=root.get("monitor"))
    except ConfigError as error:
        check(error)


def check(error: ConfigError) -> None:
    """Check an error's form: a line for each problem, each with a place, printable and
    of limited length.
    """
    lines = str(error).split("\n")
    assert len(lines) == len(error.problems) > 0
    for line in lines:
        assert line.isprintable(), line
        assert line.startswith(("f:", "(program)")), line
        assert line.count(": ") >= 2, line
        assert len(line) < 2000, line


def seeds() -> Iterator[tuple[str, bytes]]:
    """Yield the project's examples, and small files that each use another feature."""
    for path in (ROOT / "config" / "examples" / "team.yaml", ROOT / "config" / "brokerd.yaml"):
        lines = [
            line
            for line in path.read_text(encoding="utf-8").split("\n")
            if not line.lstrip().startswith("#")
        ]
        yield path.stem, "\n".join(lines).replace("key_file:", "key:").encode()
    head = "listen: [/run/b.sock]\nclients: {a: {key: aaaaaaaaaaaaaaaaaaaaaaaa}}\n"
    for name, text in {
        "least": head,
        "tcp": "listen:\n  - 127.0.0.1:7000\n  - address: '[::1]:7001'\n    allow_md5: true\nclients: {a: {key: 0123456789abcdef}}\n",
        "limits": head + "limits: {max_message: 8MiB, handshake_timeout: 5s, handshakes: 100}\n",
        "log": head + "log: {level: debug, areas: {net: info}}\n",
        "rules": "listen: [/x]\nclients:\n  a:\n    key: k1234567890123456\n    send_to: [b, 'team.*']\n    publish: ['a.>']\n"
        "    subscribe: ['*.b']\n    rate: {messages: 5/s, bytes: 1MiB}\n    connections: 3\n    when_full: drop_oldest\n",
        "keys": "listen: [/x]\nclients:\n  a:\n    keys:\n      - {key: aaaaaaaaaaaaaaaa, not_after: 2030-01-01}\n      - {key_env: K}\n",
        "tls": "listen:\n  - address: 0.0.0.0:7000\n    tls: {certificate: c.pem, key: k.pem, minimum: '1.3'}\nclients: {}\n",
        "monitor": head + "monitor: 127.0.0.1:9000\n",
        "anchors": "x: &a [1, 2]\ny: [*a, *a]\n<<: {listen: [/z]}\n" + head,
        "bomb": "a: &a [x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b]\nd: [*c,*c,*c,*c,*c]\n",
        "deep": "[" * 60,
        "tags": "listen: !!set {a, b}\nclients: !!python/object:os.system {}\nn: !!binary aGk=\nt: 2026-01-01\ni: 0x_\n",
        "twice": "listen: [/x]\nlisten: [/y]\n",
        "tab": "listen:\n\t- x\n",
        "two": "a: 1\n---\nb: 2\n",
        "control": 'listen: [\'a\\0b\', "\\x07"]\nclients: {"\\u2028": {key: x}}\n',
        "numbers": head
        + "limits: {max_message: 1e999, handshakes: -1, queue: 0x10, max_clients: 1:30}\n",
        "include": head + "include: [clients.d/*.yaml, /etc/passwd]\n",
    }.items():
        yield name, text.encode()
    values = {
        "listen": ["/run/b.sock", ["127.0.0.1", 7000], 5, None, {"address": "x", "mode": 384}],
        "clients": {
            "a": "0123456789abcdef",
            "b": {"key": "fedcba9876543210", "queue": "1MiB", "admin": True},
            "": "x",
        },
        "limits": {"max_message": 1.5, "handshakes": None},
        "log": {"level": ["x"]},
        "monitor": ["127.0.0.1", 0],
    }
    yield "program", json.dumps(values).encode()
    yield "bytes", b"\xff\xfe\x00listen"
    yield "bom", b"\xef\xbb\xbf" + head.encode()
