"""The service under a booted systemd: its units as shipped, and the project as pip
installs it.
"""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme
from support.system import machine as machines
from support.system.machine import Machine, boot

pytestmark = [pytest.mark.system, pytest.mark.timeout(900)]

UNIX = "/run/brokerd/brokerd.sock"
TCP = "127.0.0.1:6000"
DROP_INS = "/etc/systemd/system/brokerd.service.d"
SHIPPED = "/usr/share/doc/brokerd/systemd"
CONFIG = "/etc/brokerd/brokerd.yaml"
CONFIGURATION = f"""\
listen:
  - {{address: {UNIX}, mode: "0660", group: brokerd}}
  - {TCP}
clients:
  alice: {{key_file: keys/alice}}
  bob: {{key_file: keys/bob}}
"""

ACCESS_OF_BOB = ("--address", UNIX, "--name", "bob", "--key-file", "/etc/brokerd/keys/bob")


@pytest.fixture(scope="module", params=list(machines.PYTHONS))
def booted(request: pytest.FixtureRequest) -> Iterator[Machine]:
    """A booted Debian, for all tests of the module."""
    with boot(request.param) as machine:
        yield machine


@pytest.fixture
def machine(booted: Machine) -> Iterator[Machine]:
    """The booted machine with a configuration of two clients, and nothing started. The
    test's changes are undone afterwards.
    """
    for name in ("alice", "bob"):
        booted.write(f"/etc/brokerd/keys/{name}", f"{name}'s key", owner="brokerd:brokerd")
    booted.write(CONFIG, CONFIGURATION, owner="root:brokerd", mode=0o640)
    booted.run("systemctl", "daemon-reload")
    yield booted
    booted.run("systemctl", "stop", "brokerd.socket", "brokerd.service", status=None)
    booted.run("systemctl", "reset-failed", status=None)
    booted.run(
        "sh",
        "-c",
        f"rm -rf {DROP_INS} /etc/systemd/system/brokerd.socket.d /etc/brokerd/*/* /run/brokerd",
    )
    booted.run("journalctl", "--rotate")
    booted.run("journalctl", "--vacuum-time=1us")


def drop_in(machine: Machine, unit: str, text: str) -> None:
    """Add a drop-in to a unit."""
    machine.write(
        f"/etc/systemd/system/{unit}.d/test-{len(text)}.conf", textwrap.dedent(text), mode=0o644
    )
    machine.run("systemctl", "daemon-reload")


def install(machine: Machine, shipped: str) -> None:
    """Install one of the project's drop-ins."""
    machine.run("mkdir", "-p", DROP_INS)
    machine.run("cp", f"{SHIPPED}/{shipped}", f"{DROP_INS}/{shipped}")
    machine.run("systemctl", "daemon-reload")


def brokerctl(
    machine: Machine, *command: str, address: str = UNIX, name: str = "alice", **how: Any
) -> str:
    """Run brokerctl as root in the machine; return its output."""
    key = f"/etc/brokerd/keys/{name}"
    return machine.run(
        "brokerctl", "--address", address, "--name", name, "--key-file", key, *command, **how
    )


def properties(machine: Machine) -> dict[str, str]:
    names = (
        "ActiveState",
        "SubState",
        "Result",
        "ExecMainStatus",
        "NRestarts",
        "StatusText",
        "MainPID",
    )
    return machine.show("brokerd.service", *names)


def messages(machine: Machine, unit: str = "brokerd.service") -> str:
    """Return the text of a unit's journal."""
    return "\n".join(str(entry.get("MESSAGE")) for entry in machine.journal(unit))


#: Inside: stays connected as alice, and answers each line on its standard input with
#: the broker's address for it.
STAYS = """
import sys, brokerd_client
options = {"name": "alice", "key_file": "/etc/brokerd/keys/alice", "reconnect": False}
with brokerd_client.connect(sys.argv[1], **options) as alice:
    for line in sys.stdin:
        print(alice.request("$broker", {"op": "whoami"}, timeout=10).payload["address"], flush=True)
"""


@contextlib.contextmanager
def staying(machine: Machine) -> Iterator[Any]:
    """Yield a function that returns the address of one client that stays connected."""
    command = machine.command("/usr/bin/python3", "-c", STAYS, UNIX)
    client = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd="/"
    )
    assert client.stdin is not None
    assert client.stdout is not None
    stdin, stdout = client.stdin, client.stdout

    def ask() -> str:
        stdin.write("\n")
        stdin.flush()
        return stdout.readline().strip()

    with client:
        try:
            yield ask
        finally:
            client.kill()


def test_systemd_units_pass_verify(machine: Machine) -> None:
    """systemd-analyze verify reports nothing for the units, alone and with each
    drop-in.
    """
    for unit in ("brokerd.service", "brokerd.socket"):
        assert (
            machine.run("systemd-analyze", "verify", "--man=no", f"/etc/systemd/system/{unit}")
            == ""
        )
    shipped = {"brokerd-unix-only.conf", "brokerd-peer-uid.conf", "brokerd-credentials.conf"}
    if machine.systemd_version >= 253:
        shipped.add("brokerd-notify-reload.conf")
    for each in shipped:
        install(machine, each)
        assert machine.run("systemd-analyze", "verify", "--man=no", "brokerd.service") == "", each
        machine.run("rm", f"{DROP_INS}/{each}")


def exposure(machine: Machine, *arguments: str) -> str:
    text = machine.run("systemd-analyze", "security", "--no-pager", *arguments)
    found = re.search(r"Overall exposure level for brokerd.service: ([0-9.]+)", text)
    assert found, text
    print(machine.suite, *arguments, found[1])
    return found[1]


def test_systemd_unit_exposure_is_small(machine: Machine) -> None:
    """By systemd's own measure at most 1.0 of 10, and at most 0.5 without a network;
    offline and as loaded.
    """
    unit = "/etc/systemd/system/brokerd.service"
    assert float(exposure(machine, "--offline=true", "--threshold=10", unit)) <= 1.0
    assert float(exposure(machine, "--threshold=10", "brokerd.service")) <= 1.0
    install(machine, "brokerd-unix-only.conf")
    assert float(exposure(machine, "--threshold=5", "brokerd.service")) <= 0.5


def test_systemd_start_serves_clients_and_shows_status(machine: Machine) -> None:
    """The broker serves Unix and TCP clients when `systemctl start` returns, and its
    status has the counts.
    """
    machine.run("systemctl", "start", "brokerd")
    for address in (UNIX, TCP):
        brokerctl(machine, "ping", address=address)
    with staying(machine) as ask:
        assert ask() == "alice"
        status = machine.wait("1 connections", "systemctl", "status", "brokerd")
    assert re.search(r'Status: "1 connections, 0 handshakes under way, [0-9]+ messages"', status)
    (started,) = [line for line in messages(machine).splitlines() if "daemon.started" in line]
    # The sandbox leaves the fast ways working.
    assert "compiled" in started
    assert "uvloop" in started


def test_systemd_restart_keeps_messages_of_mailboxes(machine: Machine) -> None:
    """The store is in the service's StateDirectory; also a killed broker leaves it whole."""
    machine.write(
        CONFIG,
        CONFIGURATION.replace("keys/bob}", "keys/bob, mailbox: true}") + "store: {min_free: 0}\n",
        owner="root:brokerd",
        mode=0o640,
    )
    machine.run("systemctl", "start", "brokerd")
    brokerctl(machine, "send", "bob", "one", "--receipt")
    machine.run("systemctl", "restart", "brokerd")
    brokerctl(machine, "send", "bob", "two", "--receipt")
    machine.run("systemctl", "kill", "--signal=KILL", "brokerd")
    machine.wait("active", "systemctl", "is-active", "brokerd")
    machine.wait("two", "brokerctl", *ACCESS_OF_BOB, "mailbox", "show", "bob")
    shown = json.loads(brokerctl(machine, "mailbox", "show", "bob", "--json", name="bob"))
    assert [message["payload"] for message in shown] == ["one", "two"]
    owner = machine.run("stat", "-c", "%U %a", "/var/lib/brokerd/mailboxes.db")
    assert owner.startswith("brokerd 6")


def test_systemd_service_writes_no_core_dump(machine: Machine) -> None:
    """Otherwise keys could reach the disk. The process may write no core dump, and its
    memory would not be in one.
    """
    machine.run("systemctl", "start", "brokerd")
    pid = properties(machine)["MainPID"]
    assert re.search(r"Max core file size\s+0\s+0", machine.run("cat", f"/proc/{pid}/limits"))
    assert machine.run("cat", f"/proc/{pid}/coredump_filter").strip() == "00000000"


def test_systemd_socket_is_usable_by_group_only(machine: Machine) -> None:
    """Members of the group brokerd can connect, whether the broker or systemd binds the
    socket. Other users can't.
    """
    machine.write("/tmp/key", "alice's key", owner="4711:4711")
    ping = ["brokerctl", "--address", UNIX, "--name", "alice", "--key-file", "/tmp/key", "ping"]
    member = ["setpriv", "--reuid=4711", "--regid=4711", "--groups=brokerd", *ping]
    other = ["setpriv", "--reuid=4711", "--regid=4711", "--clear-groups", *ping]
    for unit in ("brokerd.service", "brokerd.socket"):
        if unit == "brokerd.socket":
            machine.write(
                CONFIG, CONFIGURATION.replace(f"  - {TCP}\n", ""), owner="root:brokerd", mode=0o640
            )
        machine.run("systemctl", "start", unit)
        machine.run(*member)
        refused = machine.run(*other, status=None)
        assert "ermission denied" in refused
        assert machine.run("stat", "-c", "%U:%G %a", UNIX).strip() == "brokerd:brokerd 660"
        machine.run("systemctl", "stop", "brokerd.service")


def test_systemd_reload_adds_client_and_keeps_connections(machine: Machine) -> None:
    """After `systemctl reload` an added client can connect, and connected clients still
    are.
    """
    if machine.systemd_version >= 253:
        install(machine, "brokerd-notify-reload.conf")
    machine.run("systemctl", "start", "brokerd")
    machine.write("/etc/brokerd/keys/carol", "carol's key", owner="brokerd:brokerd")
    with staying(machine) as ask:
        before = ask()
        machine.write(
            CONFIG,
            CONFIGURATION + "  carol: {key_file: keys/carol}\n",
            owner="root:brokerd",
            mode=0o640,
        )
        machine.run("systemctl", "reload", "brokerd")
        if machine.systemd_version < 253:
            machine.wait("daemon.reloaded", "journalctl", "-u", "brokerd", "--no-pager")
        # With notify-reload the manager has waited for it.
        brokerctl(machine, "ping", name="carol")
        assert ask() == before == "alice"
    assert properties(machine)["NRestarts"] == "0"


def test_systemd_reload_of_invalid_file_fails_and_changes_nothing(machine: Machine) -> None:
    """`systemctl reload` fails, the journal gives the place of the mistake, and the
    broker goes on as before.
    """
    if machine.systemd_version >= 253:
        install(machine, "brokerd-notify-reload.conf")
    machine.run("systemctl", "start", "brokerd")
    with staying(machine) as ask:
        before = ask()
        machine.write(
            CONFIG, CONFIGURATION.replace("alice:", "al ice:"), owner="root:brokerd", mode=0o640
        )
        machine.run("systemctl", "reload", "brokerd", status=1)
        assert f"{CONFIG}:5:3: clients.al ice" in messages(machine)
        assert ask() == before
    assert properties(machine)["ActiveState"] == "active"
    brokerctl(machine, "ping")


#: Inside: connects again and again, by turns to each address, until its standard input
#: ends; then says what it met.
CONNECTS = """
import json, select, socket, sys, time
from brokerd_client.address import parse
addresses = [parse(each) for each in sys.argv[1:]]
seen = {"answered": 0, "turned away": 0, "refused": [], "silent": 0}
began, number, longest = time.monotonic(), 0, 0.0
print("ready", flush=True)
while not select.select([sys.stdin], [], [], 0)[0]:
    address = addresses[number % len(addresses)]
    number += 1
    at = time.monotonic()
    with socket.socket(socket.AF_UNIX if address.path else socket.AF_INET) as sock:
        sock.settimeout(20)
        try:
            sock.connect(address.sockaddr)
        except OSError as error:
            seen["refused"].append(f"{address}: {error}")
            continue
        try:
            # The broker speaks first: the length of its challenge.
            seen["answered" if sock.recv(4) else "turned away"] += 1
        except ConnectionResetError:
            seen["turned away"] += 1
        except TimeoutError:
            seen["silent"] += 1
    longest = max(longest, time.monotonic() - at)
print(json.dumps(dict(seen, seconds=time.monotonic() - began, longest=longest)), flush=True)
"""


def test_systemd_restart_with_socket_unit_refuses_no_client(machine: Machine) -> None:
    """With brokerd.socket a client that connects all the time, by Unix socket and TCP,
    waits and is never refused.
    """
    drop_in(machine, "brokerd.socket", f"[Socket]\nListenStream={TCP}\n")
    machine.run("systemctl", "start", "brokerd.socket", "brokerd.service")
    command = machine.command("/usr/bin/python3", "-c", CONNECTS, UNIX, TCP)
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd="/"
    ) as connecting:
        assert connecting.stdout is not None
        assert connecting.stdout.readline() == "ready\n"
        pids = set()
        for _ in range(5):
            machine.run("systemctl", "restart", "brokerd.service")
            pids.add(properties(machine)["MainPID"])
            brokerctl(machine, "ping", address=TCP)
        account = json.loads(connecting.communicate("", timeout=60)[0])
    print(machine.suite, account)
    assert len(pids) == 5
    assert account["refused"] == []
    assert account["silent"] == 0
    assert account["answered"] > 50


def test_systemd_socket_unit_starts_broker_on_connection(machine: Machine) -> None:
    """With brokerd.socket alone a connection starts the broker, which answers it. The
    socket outlives a stop.
    """
    machine.write(
        CONFIG, CONFIGURATION.replace(f"  - {TCP}\n", ""), owner="root:brokerd", mode=0o640
    )
    machine.run("systemctl", "start", "brokerd.socket")
    assert properties(machine)["ActiveState"] == "inactive"
    brokerctl(machine, "ping")
    assert properties(machine)["ActiveState"] == "active"
    # It listens at the manager's socket and at no other.
    pid = properties(machine)["MainPID"]
    assert "brokerd.sock" in machine.run("ss", "-xlp")
    assert machine.run("ss", "-xlH").count(UNIX) == 1, pid
    machine.run("systemctl", "stop", "brokerd.service")
    brokerctl(machine, "ping")
    machine.run("systemctl", "stop", "brokerd.socket", "brokerd.service")
    assert not machine.host_path(UNIX).exists()


def test_systemd_socket_is_matched_by_name(machine: Machine) -> None:
    """An entry listens at the socket with its name, wherever that socket is bound."""
    machine.write(
        CONFIG,
        CONFIGURATION.replace(f"address: {UNIX}", f"name: brokerd, address: {UNIX}").replace(
            f"  - {TCP}\n", ""
        ),
        owner="root:brokerd",
        mode=0o640,
    )
    drop_in(
        machine, "brokerd.socket", "[Socket]\nListenStream=\nListenStream=/run/elsewhere.sock\n"
    )
    machine.run("systemctl", "start", "brokerd.socket")
    brokerctl(machine, "ping", address="/run/elsewhere.sock")


def test_systemd_socket_without_entry_prevents_start(machine: Machine) -> None:
    """The broker does not start, says what to add, and is not restarted."""
    drop_in(machine, "brokerd.socket", "[Socket]\nListenStream=127.0.0.1:6001\n")
    machine.run("systemctl", "start", "brokerd.socket")
    machine.run("systemctl", "start", "brokerd.service", status=1)
    assert "add `- 127.0.0.1:6001` to listen" in messages(machine)
    state = properties(machine)
    assert (state["ExecMainStatus"], state["NRestarts"]) == ("78", "0")


def test_watchdog_restarts_frozen_broker(machine: Machine) -> None:
    """A frozen broker is ended and started again, and then serves clients."""
    drop_in(machine, "brokerd.service", "[Service]\nWatchdogSec=1\n")
    machine.run("systemctl", "start", "brokerd")
    first = properties(machine)["MainPID"]
    # It lives as long as it turns: three times what the watchdog allows.
    time.sleep(3)
    assert properties(machine)["MainPID"] == first
    machine.run("kill", "-STOP", first)
    machine.wait("NRestarts=1", "systemctl", "show", "brokerd", "--property=NRestarts")
    machine.wait("^active", "systemctl", "is-active", "brokerd")
    brokerctl(machine, "ping")
    assert properties(machine)["MainPID"] != first
    text = messages(machine)
    assert "Watchdog timeout" in text
    # Where it stood, which is what one wants to know.
    assert "Fatal Python error: Aborted" in text


def test_systemd_stop_drains(machine: Machine) -> None:
    """`systemctl stop` delivers what is queued, ends with status 0, and leaves no
    socket file.
    """
    machine.run("systemctl", "start", "brokerd")
    text = machine.python(
        """
        import subprocess, sys, brokerd_client
        keys = "/etc/brokerd/keys/"
        with brokerd_client.connect(sys.argv[1], name="alice", key_file=keys + "alice") as alice, \\
                brokerd_client.connect(
                    sys.argv[1], name="bob", key_file=keys + "bob", reconnect=False
                ) as bob:
            for number in range(1000):
                alice.send("bob", number)
            alice.request("$broker", {"op": "ping"}, timeout=10)
            stop = subprocess.Popen(["systemctl", "stop", "brokerd"])
            received = [bob.recv(timeout=20).payload for _ in range(1000)]
            print(received == list(range(1000)), stop.wait(60))
        """.replace("\n        ", "\n"),
        UNIX,
    )
    # Before it, the clients log that the broker goes.
    assert text.splitlines()[-1] == "True 0", text
    state = properties(machine)
    assert (state["ActiveState"], state["Result"], state["ExecMainStatus"]) == (
        "inactive",
        "success",
        "0",
    )
    assert not machine.host_path(UNIX).exists()


def upgrade(machine: Machine) -> str:
    """Upgrade the broker; return the id of the new main process, once the manager knows
    it.
    """
    before = properties(machine)["MainPID"]
    machine.run("kill", "-USR2", before)
    shown = machine.wait(
        f"MainPID=(?!{before}$)", "systemctl", "show", "brokerd", "--property=MainPID"
    )
    return shown.partition("=")[2].strip()


def test_systemd_upgrade_keeps_clients_and_supervision(machine: Machine) -> None:
    """The new process feeds the watchdog, is stopped with a drain, and is restarted
    when it is killed.
    """
    drop_in(machine, "brokerd.service", "[Service]\nWatchdogSec=5\n")
    machine.run("systemctl", "start", "brokerd")
    with staying(machine) as ask:
        first = ask()
        for _ in range(2):
            pid = upgrade(machine)
            assert ask() == first
        # Longer than the watchdog waits: the new process feeds it.
        time.sleep(7)
        assert ask() == first, messages(machine)
    state = properties(machine)
    assert (state["ActiveState"], state["MainPID"], state["NRestarts"]) == ("active", pid, "0")
    machine.run("systemctl", "stop", "brokerd")
    state = properties(machine)
    assert (state["ActiveState"], state["Result"]) == ("inactive", "success")
    text = messages(machine)
    assert "daemon.stopped" in text
    assert "SIGKILL" not in text
    assert "left-over process" not in text
    machine.run("systemctl", "start", "brokerd")
    pid = upgrade(machine)
    machine.run("kill", "-KILL", pid)
    machine.wait("NRestarts=1", "systemctl", "show", "brokerd", "--property=NRestarts")
    machine.wait("^active", "systemctl", "is-active", "brokerd")
    brokerctl(machine, "ping")


def test_systemd_invalid_configuration_is_not_restarted(machine: Machine) -> None:
    """The broker exits with status 78 and is not restarted; the journal gives the place
    of the mistake.
    """
    machine.write(CONFIG, CONFIGURATION + "  bob: {key_fil: x}\n", owner="root:brokerd", mode=0o640)
    machine.run("systemctl", "start", "brokerd", status=1)
    state = properties(machine)
    assert (state["ActiveState"], state["ExecMainStatus"], state["NRestarts"]) == (
        "failed",
        "78",
        "0",
    )
    assert f"{CONFIG}:7:" in messages(machine)


def test_systemd_credentials_pass_keys_of_root(machine: Machine) -> None:
    """LoadCredential= gives the broker a copy of a file that it can't read itself."""
    for name in ("alice", "bob"):
        machine.write(f"/etc/brokerd/keys/{name}", f"{name}'s key", owner="root:root")
    machine.run("systemctl", "start", "brokerd", status=1)
    assert "can't be read" in messages(machine)
    install(machine, "brokerd-credentials.conf")
    text = CONFIGURATION.replace("key_file: keys/", "key_credential: ")
    machine.write(CONFIG, text, owner="root:brokerd", mode=0o640)
    machine.run("systemctl", "start", "brokerd")
    brokerctl(machine, "ping")


def test_systemd_socket_with_certificate_as_credential_serves_tls(machine: Machine) -> None:
    """systemd listens, and passes the certificate and private key of root as
    credentials: a client connects over TLS.
    """
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1")
    machine.write("/etc/brokerd/tls/cert.pem", certificate.cert_chain_pems[0].bytes().decode())
    machine.write("/etc/brokerd/tls/key.pem", certificate.private_key_pem.bytes().decode())
    machine.write("/tmp/ca.pem", authority.cert_pem.bytes().decode())
    given = "/run/credentials/brokerd.service"
    tls = f"{{certificate: {given}/cert.pem, key: {given}/key.pem}}"
    text = CONFIGURATION.replace(f"  - {TCP}\n", f"  - {{address: {TCP}, tls: {tls}}}\n")
    machine.write(CONFIG, text, owner="root:brokerd", mode=0o640)
    drop_in(machine, "brokerd.socket", f"[Socket]\nListenStream={TCP}\n")
    loads = "".join(
        f"LoadCredential={name}:/etc/brokerd/tls/{name}\n" for name in ("cert.pem", "key.pem")
    )
    drop_in(machine, "brokerd.service", f"[Service]\n{loads}")
    machine.run("systemctl", "start", "brokerd.socket")
    brokerctl(machine, "--ca", "/tmp/ca.pem", "ping", address=f"tls://{TCP}")


def test_systemd_key_added_by_root_is_readable(machine: Machine) -> None:
    """After `brokerd key --add` and `systemctl reload`, both by root, the new client
    can connect.
    """
    machine.write(
        CONFIG, CONFIGURATION + 'include: ["clients.d/*.yaml"]\n', owner="root:brokerd", mode=0o640
    )
    machine.run("systemctl", "start", "brokerd")
    machine.run("brokerd", "key", "--add", "carol")
    machine.run("systemctl", "reload", "brokerd")
    machine.wait(
        "carol.*daemon.reloaded|daemon.reloaded.*carol", "journalctl", "-u", "brokerd", "--no-pager"
    )
    brokerctl(machine, "ping", name="carol")


def test_systemd_unix_only_drop_in_serves_without_network(machine: Machine) -> None:
    """With the Unix-only drop-in the broker has no access to the machine's network, and
    its Unix socket works as before.
    """
    install(machine, "brokerd-unix-only.conf")
    machine.write(
        CONFIG, CONFIGURATION.replace(f"  - {TCP}\n", ""), owner="root:brokerd", mode=0o640
    )
    machine.run("systemctl", "start", "brokerd")
    brokerctl(machine, "ping")
    own, pid1 = (
        machine.run("readlink", f"/proc/{pid}/ns/net")
        for pid in (properties(machine)["MainPID"], 1)
    )
    assert own != pid1


def test_systemd_peer_uid_drop_in_identifies_users(machine: Machine) -> None:
    """In the sandbox, a peer_uid of a user other than root gives a warning. With the
    drop-in, such a user can connect.
    """
    text = CONFIGURATION + "  team: {peer_uid: [4711]}\n"
    machine.write(CONFIG, text, owner="root:brokerd", mode=0o640)
    program = (
        "import sys, brokerd_client\nwith brokerd_client.connect(sys.argv[1], name='team') as c:"
        " print(c.name)"
    )
    as_team = [
        "setpriv",
        "--reuid=4711",
        "--regid=4711",
        "--groups=brokerd",
        "/usr/bin/python3",
        "-c",
        program,
        UNIX,
    ]
    machine.run("systemctl", "start", "brokerd")
    assert "client.users_unseen" in messages(machine)
    machine.run(*as_team, status=1)
    machine.run("systemctl", "stop", "brokerd")
    install(machine, "brokerd-peer-uid.conf")
    machine.run("systemctl", "start", "brokerd")
    assert machine.run(*as_team).strip() == "team"


def test_systemd_accepts_main_pid_of_other_process(machine: Machine) -> None:
    """The manager accepts MAINPID from the main process, and then reads the
    notifications of the new one.
    """
    machine.write(
        "/usr/local/lib/child.py",
        textwrap.dedent("""
            import os, signal, sys, time
            from brokerd.daemon.systemd import Supervisor
            supervisor = Supervisor.from_environ()
            supervisor.notify(READY=1, STATUS="old")
            child = os.fork()
            if child:
                supervisor.notify(MAINPID=child)
                os._exit(0)
            # Orphaned: the old one has ended.
            while os.getppid() != 1:
                time.sleep(0.01)
            supervisor.notify(READY=1, STATUS="new")
            signal.pause()
            """),
        mode=0o644,
    )
    drop_in(
        machine,
        "brokerd.service",
        "[Service]\nExecStart=\nExecStart=/usr/bin/python3 /usr/local/lib/child.py\n",
    )
    machine.run("systemctl", "start", "brokerd")
    machine.wait("StatusText=new", "systemctl", "show", "brokerd", "--property=StatusText")
    state = properties(machine)
    assert (state["ActiveState"], state["NRestarts"]) == ("active", "0")


def test_systemd_journal_has_priorities_and_fields(machine: Machine) -> None:
    """A warning has PRIORITY 4 in the journal, and the log's own fields can be searched
    for.
    """
    machine.run("systemctl", "start", "brokerd")
    machine.write("/tmp/wrong", "not the key")
    machine.run(
        "brokerctl",
        "--address",
        UNIX,
        "--name",
        "alice",
        "--key-file",
        "/tmp/wrong",
        "ping",
        status=None,
    )
    (refused,) = machine.journal("brokerd.service", "BROKERD_EVENT=client.refused")
    assert refused["PRIORITY"] == "4"
    (started,) = machine.journal("brokerd.service", "BROKERD_EVENT=daemon.started")
    assert started["PRIORITY"] == "6"


def test_operations_page_systemd_commands_work_in_order() -> None:
    """Every command of docs/operations.md, "systemd", works, in order, on a machine
    that has only the program.
    """
    page = (machines.ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    section = page.partition("\n## systemd\n")[2].partition("\n## ")[0]
    blocks = re.findall(r"```sh\n(.*?)```", section, re.DOTALL)
    commands = [line for block in blocks for line in block.splitlines()]
    assert len(commands) > 10
    # The newer of the two has everything that the page speaks of.
    with boot("trixie", units=False) as machine:
        for command in commands:
            printed = machine.run("sh", "-c", f"cd /usr/share/doc/brokerd && {command}")
            if "ping" in command:
                assert "alice: " in printed
            if "verify" in command:
                assert printed == ""
        brokerctl(machine, "ping")
        assert properties(machine)["ActiveState"] == "active"


def test_machine_stopped_leaves_nothing_behind() -> None:
    """A stopped container leaves no process, no cgroup and no mount."""
    with boot("bookworm") as machine:
        name, pid = machine.name, machine.pid
        machine.run("systemctl", "start", "brokerd.socket")
    assert not Path(f"/proc/{pid}").exists()
    assert not list(Path("/sys/fs/cgroup").glob(f"*/{name}"))
    assert name not in Path("/proc/self/mountinfo").read_text()
