"""Runs a cluster on this machine: three brokers and a NATS server, for `make run-cluster`.

First it prints the commands for another terminal. It makes everything in
``.run/cluster``, beside the files of `make run`; the keys of the clients are shared with
that. Ctrl-C stops the brokers, and then the NATS server.
"""

from __future__ import annotations

import contextlib
import secrets
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from example_broker import CLIENTS, answers, choose_socket_path, make_keys

HOSTS = ("a", "b", "c")
#: Seconds until the brokers, which drain for 8 s at most, are killed.
PATIENCE_S = 15.0


def main() -> int:
    """Return 0 after Ctrl-C, or 1 if a process could not be started or ended by itself."""
    checkout = Path(__file__).resolve().parent.parent
    run = checkout / ".run" / "cluster"
    for folder in (run.parent, run):
        folder.mkdir(mode=0o700, exist_ok=True)
        folder.chmod(0o700)
    make_keys(run / "keys")
    sockets = {host: choose_socket_path(run).with_name(f"{host}.sock") for host in HOSTS}
    if any(map(answers, sockets.values())):
        print("A cluster is already running here: stop it first, with Ctrl-C in its terminal.")
        return 1
    passwords = {host: secrets.token_hex(16) for host in HOSTS}
    nats_port, *ports = free_ports(1 + len(HOSTS))
    write(run / "nats.conf", nats_configuration(nats_port, passwords))
    for host, port in zip(HOSTS, ports, strict=True):
        write(run / f"nats-{host}", passwords[host])
        write(run / f"{host}.yaml", configuration(run, host, sockets[host], port, nats_port))
    print(instructions(run, sockets))
    print("\nThis terminal is the cluster's; Ctrl-C stops it.\n", flush=True)
    programs = Path(sys.executable).parent
    commands = [
        [str(programs / "nats-server"), "-c", str(run / "nats.conf")],
        *([str(programs / "brokerd"), "--config", str(run / f"{host}.yaml")] for host in HOSTS),
    ]
    return run_all(commands, nats_port)


def free_ports(count: int) -> list[int]:
    """Return ports of 127.0.0.1 that no program uses now."""
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in opened:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in opened]


def write(path: Path, text: str) -> None:
    """Write a file that only its owner can read."""
    path.touch(mode=0o600)
    path.chmod(0o600)
    path.write_text(text, encoding="utf-8")


def nats_configuration(port: int, passwords: dict[str, str]) -> str:
    """Return the configuration of the NATS server, with the rights of each host."""
    users = "\n".join(
        f'    {{user: {host}, password: "{password}", permissions: {{'
        f'publish: ["brokerd.{host}.>"], subscribe: ["brokerd.*.{host}.>", "brokerd.*.all.>"]}}}}'
        for host, password in passwords.items()
    )
    return f'listen: "127.0.0.1:{port}"\nauthorization {{\n  users: [\n{users}\n  ]\n}}\n'


def configuration(run: Path, host: str, socket_path: Path, port: int, nats_port: int) -> str:
    """Return the YAML of one host; carol's mailbox is at host a."""
    store = f"store: {run / 'store'}\n" if host == "a" else ""
    return f"""\
# Written again by every `make run-cluster`; docs/cluster.md explains it.
listen:
  - {socket_path}
  - 127.0.0.1:{port}
cluster:
  host: {host}
  nats: ["nats://127.0.0.1:{nats_port}"]
  user: {host}
  password_file: nats-{host}
  advertise: ["127.0.0.1:{port}"]
clients:
  alice: {{key_file: keys/alice, admin: true}}
  bob: {{key_file: keys/bob}}
  carol: {{key_file: keys/carol, mailbox: true, home: a}}
{store}"""


def instructions(run: Path, sockets: dict[str, Path]) -> str:
    """Return what to type in another terminal."""
    brokerctl = shlex.quote(str(Path(sys.executable).parent / "brokerctl"))

    def command(name: str, host: str, words: str) -> str:
        key = shlex.quote(str(run / "keys" / name))
        address = shlex.quote(str(sockets[host]))
        return f"  {brokerctl} --address {address} --name {name} --key-file {key} {words}"

    assert CLIENTS == ("alice", "bob", "carol")
    return "\n".join(
        (
            "Three brokers share one name space: hosts a, b and c. In another terminal:\n",
            "  # bob listens at host b, and alice sends to bob from host a",
            command("bob", "b", "listen"),
            command("alice", "a", "send bob hello"),
            "",
            "  # the hosts, as host a sees them",
            command("alice", "a", "hosts"),
            "",
            "  # a mailbox at host a, from anywhere",
            command("alice", "c", "send carol later"),
            command("carol", "a", "listen"),
        )
    )


def run_all(commands: list[list[str]], nats_port: int) -> int:
    """Run the NATS server and the brokers until Ctrl-C, or until one of them ends."""
    stopping = False

    def stop(number: int, frame: object) -> None:
        nonlocal stopping
        stopping = True

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    running: list[subprocess.Popen[bytes]] = []
    try:
        for command in commands:
            # A session of its own: Ctrl-C reaches this process alone, which stops them in
            # order.
            running.append(subprocess.Popen(command, start_new_session=True))
            while len(running) == 1 and not stopping and running[0].poll() is None:
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", nats_port)) == 0:
                        break
                time.sleep(0.05)
        while not stopping and all(each.poll() is None for each in running):
            time.sleep(0.1)
    finally:
        for group in (running[1:], running[:1]):
            for each in group:
                each.terminate()
            end = time.monotonic() + PATIENCE_S
            for each in group:
                try:
                    each.wait(max(0.0, end - time.monotonic()))
                except subprocess.TimeoutExpired:
                    each.kill()
                    each.wait()
    return 0 if stopping else 1


if __name__ == "__main__":
    sys.exit(main())
