"""Runs a broker with three example clients in the foreground, and first prints the
commands for another terminal.

Makes, in ``.run`` beside this checkout's files (mode 0700, ignored by git):

- ``keys/alice``, ``keys/bob``, ``keys/carol``: a fresh key each, mode 0600; kept when
  run again;
- ``brokerd.yaml``: the configuration, written again by every run;
- ``brokerd.sock``: where the broker listens. In a folder whose path is too long for a
  Unix socket, it is in a temporary directory. A note says so.

It never runs two brokers in one place.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shlex
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

CLIENTS = ("alice", "bob", "carol")
#: A Unix socket's path has at most 107 bytes on Linux and 103 on macOS.
LONGEST_SOCKET_PATH = 100


def main() -> int:
    """Return the broker's exit status, or 1 where one runs already."""
    checkout = Path(__file__).resolve().parent.parent
    run = checkout / ".run"
    run.mkdir(mode=0o700, exist_ok=True)
    run.chmod(0o700)
    make_keys(run / "keys")
    socket_path = choose_socket_path(run)
    if answers(socket_path):
        print(f"A broker is already running here, at {socket_path}.")
        print("Stop it first, with Ctrl-C in its terminal. Or talk to it:\n")
        print(instructions(run, socket_path))
        return 1
    configuration = run / "brokerd.yaml"
    configuration.write_text(configuration_text(run, socket_path), encoding="utf-8")
    configuration.chmod(0o600)
    print(instructions(run, socket_path))
    print("\nThis terminal is the broker's; Ctrl-C stops it.\n", flush=True)
    return run_in_foreground(
        [str(Path(sys.executable).parent / "brokerd"), "--config", str(configuration)]
    )


def make_keys(folder: Path) -> None:
    """Give every example client a key file that only its owner can read; those that
    exist stay.
    """
    folder.mkdir(mode=0o700, exist_ok=True)
    for name in CLIENTS:
        path = folder / name
        with (
            contextlib.suppress(FileExistsError),
            os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file,
        ):
            # The form that `brokerd key` prints.
            file.write(secrets.token_urlsafe(32) + "\n")


def choose_socket_path(run: Path) -> Path:
    """Return where to listen: in ``run``, or in a short directory of our own that
    ``run`` remembers.
    """
    path = run / "brokerd.sock"
    if len(os.fsencode(path)) <= LONGEST_SOCKET_PATH:
        return path
    memory = run / "socket_directory"
    if not (memory.exists() and is_private(Path(memory.read_text(encoding="utf-8")))):
        memory.write_text(tempfile.mkdtemp(prefix="brokerd-"), encoding="utf-8")
    path = Path(memory.read_text(encoding="utf-8")) / "brokerd.sock"
    if len(os.fsencode(path)) > LONGEST_SOCKET_PATH:
        sys.exit(
            f"{path} is too long for a Unix socket: set TMPDIR to a shorter directory, such as /tmp"
        )
    print(
        f"Note: {run} is too long a path for a Unix socket; the broker listens at {path} instead.\n"
    )
    return path


def is_private(folder: Path) -> bool:
    """Return whether only we can reach what is in the folder."""
    try:
        status = folder.lstat()
    except OSError:
        return False
    return (
        stat.S_ISDIR(status.st_mode)
        and status.st_uid == os.getuid()
        and stat.S_IMODE(status.st_mode) == 0o700
    )


def answers(socket_path: Path) -> bool:
    """Return whether a process listens there, not only whether the socket file exists."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(5)
        return probe.connect_ex(str(socket_path)) == 0


def configuration_text(run: Path, socket_path: Path) -> str:
    """Return the YAML of the example: alice and bob as they should be, carol for a
    Python of any age.
    """
    return f"""\
# Written again by every `make run`; config/brokerd.yaml explains every key.
listen:
  - {quoted(socket_path)}

clients:
  alice:
    key_file: {quoted(run / "keys" / "alice")}
  bob:
    key_file: {quoted(run / "keys" / "bob")}
  carol:
    key_file: {quoted(run / "keys" / "carol")}
    allow_md5: true     # so that Python 3.11 and older can be carol with no package installed
"""


def quoted(path: Path) -> str:
    """Return the path as a YAML string; JSON's strings are YAML's."""
    return json.dumps(str(path))


def instructions(run: Path, socket_path: Path) -> str:
    """Return what to type in another terminal, ready to paste there from any directory."""
    brokerctl = shlex.quote(str(Path(sys.executable).parent / "brokerctl"))
    address = shlex.quote(str(socket_path))
    keys = run / "keys"
    bob_key = shlex.quote(str(keys / "bob"))
    return f"""\
In another terminal, be bob, who answers every request:

    export BROKERD_ADDRESS={address}
    {brokerctl} --name bob --key-file {bob_key} listen --reply "hello, I am bob"

In a third one, be alice:

    export BROKERD_ADDRESS={address}
    export BROKERD_NAME=alice BROKERD_KEY_FILE={shlex.quote(str(keys / "alice"))}
    {brokerctl} send bob "hello from alice"
    {brokerctl} request bob "who are you?"
    {brokerctl} clients

Or be carol, with any Python and nothing installed:

python3 - <<'END'
import struct
from multiprocessing.connection import Client

key = open({str(keys / "carol")!r}, "rb").read().rstrip(b"\\n")
conn = Client({str(socket_path)!r}, authkey=key)
conn.send_bytes(struct.pack("!BBBBQ", 1, 0, 0, 3, 0) + b"bob" + b"hello from a stock Python")
END"""


def run_in_foreground(command: list[str]) -> int:
    """Run the command as a shell would, so that Ctrl-C reaches it alone, and return its
    exit status.

    In one group with make, the same Ctrl-C would also end make. It would call a regular
    stop of the broker a failure.
    """
    if not sys.stdin.isatty():
        os.execv(command[0], command)
    terminal = sys.stdin.fileno()
    # Changing the terminal's foreground group from the background would stop us.
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)
    ours = os.tcgetpgrp(terminal)
    broker = subprocess.Popen(command, process_group=0)
    with contextlib.suppress(OSError):
        os.tcsetpgrp(terminal, broker.pid)
    # A terminal that is closed ends the broker too; to the broker itself SIGHUP means
    # something else.
    for number, forwarded in (
        (signal.SIGINT, signal.SIGINT),
        (signal.SIGTERM,) * 2,
        (signal.SIGHUP, signal.SIGTERM),
    ):
        signal.signal(number, lambda _number, _frame, send=forwarded: broker.send_signal(send))
    try:
        return broker.wait()
    finally:
        with contextlib.suppress(OSError):
            os.tcsetpgrp(terminal, ours)


if __name__ == "__main__":
    sys.exit(main())
