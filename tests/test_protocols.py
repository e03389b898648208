"""The daemon's Protocols: each has several implementations, or a stand-in in tests.

A Protocol with one implementation costs every reader a jump. Take the class itself, or
a callable, in its place.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parent.parent

#: (file, Protocol) and its implementations.
PROTOCOLS: Final = {
    ("brokerd/config/yaml_reader.py", "_Mark"): "a class of PyYAML, and another of its C parser",
    ("brokerd/core/cluster/seam.py", "Remotes"): "the core's remote sessions, and a test's records",
    ("brokerd/core/deferred.py", "Job"): "the broker's events, and requests with long answers",
    ("brokerd/core/mailboxes/journal.py", "Journal"): "the store process, and a test's store",
    ("brokerd/daemon/key_expiry.py", "Timer"): "an event loop's handle, and the clock of a test",
    ("brokerd/log/sinks.py", "Target"): "a descriptor, a text stream and the journal",
    ("brokerd/net/byte_stream.py", "ByteStream"): "a socket, and TLS over a socket",
    ("brokerd/net/connection/liveness.py", "Watched"): "a connection, and an end of a channel",
    ("brokerd/net/listen/named_pipes.py", "_PipePeer"): "a pipe of Windows, and a test's pipe",
    ("brokerd/net/listen/named_pipes.py", "_PipeServer"): "Windows's pipes, and a test's pipes",
    ("brokerd/store/connection.py", "Answers"): "the broker's mailboxes, and a test's records",
    ("brokerd/store/request_poll.py", "Waiting"): "select.poll, and a test's requests",
}


def test_protocol_of_daemon_has_several_implementations() -> None:
    """Every Protocol in brokerd/ is on the list, and every entry of the list exists."""
    found = {
        (path.relative_to(ROOT).as_posix(), node.name)
        for path in (ROOT / "brokerd").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef)
        if any(ast.unparse(base).partition("[")[0] == "Protocol" for base in node.bases)
    }

    assert found == set(PROTOCOLS)
