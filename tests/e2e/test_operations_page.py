"""docs/operations.md: the commands of "Reload", "Keys and rotation" and "Upgrade",
typed in order, do what the page says.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.broker_process import TIMEOUT_S, BrokerProcess

from brokerd_client import connect

PAGE = Path(__file__).resolve().parents[2] / "docs" / "operations.md"
#: What the two commands are here, whatever else is installed on this machine.
COMMANDS = {"brokerd": "brokerd.cli.main", "brokerctl": "brokerd.ctl"}


def blocks(section: str) -> list[str]:
    """Return the commands of one section of the page."""
    text = PAGE.read_text(encoding="utf-8").partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    return re.findall(r"(?s)```sh\n(.*?)```", text)


class Shell:
    """The shell of an administrator."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.bin = home / "bin"
        self.bin.mkdir()
        for command, module in COMMANDS.items():
            script = self.bin / command
            script.write_text(f"#!{sys.executable}\nfrom {module} import main\nmain()\n")
            script.chmod(0o755)

    def type(self, text: str) -> str:
        """Return what the commands print; each of them must succeed."""
        done = subprocess.run(
            ["sh", "-e", "-c", text.replace("/etc/brokerd", str(self.home))],
            env={
                **os.environ,
                "PATH": f"{self.bin}:{os.environ['PATH']}",
                "BROKERD_CONFIG": str(self.home / "brokerd.yaml"),
                "BROKERD_ADDRESS": str(self.home / "brokerd.sock"),
                "BROKERD_NAME": "ops",
                "BROKERD_KEY_FILE": str(self.home / "ops.key"),
            },
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
        assert done.returncode == 0, done
        return done.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="chown --reference is GNU's")
def test_operations_page_commands_work_in_order(socket_dir: Path) -> None:
    """A dry run, a reload, a new client, a key rotation while it is connected, and an
    upgrade: no connection is lost.
    """
    clients = {"ops": {"admin": True, "connections": 4}}
    (socket_dir / "clients.d").mkdir()
    with BrokerProcess(socket_dir, clients, include=["clients.d/*.yaml"]) as broker:
        broker.wait("daemon.started")
        shell = Shell(socket_dir)
        dry_run, reload = blocks("Reload")
        assert shell.type(dry_run) == "nothing changes\nnothing changes\n"
        assert shell.type(reload) == "reloaded\n"

        add, begin, watch, end = blocks("Keys and rotation")
        assert "+ client bob\nreloaded\n" in shell.type(add)
        first = (socket_dir / "keys" / "bob").read_bytes().strip()
        with connect(str(broker.socket), "bob", first, reconnect=False) as bob:
            added = shell.type(begin)
            assert re.search(r"~ client bob: key \w{8} added \(key_file .*bob\.2\)", added)
            assert "disconnected" not in added
            assert bob.ping() > 0
        second = (socket_dir / "keys" / "bob.2").read_bytes().strip()
        with connect(str(broker.socket), "bob", second, reconnect=False) as bob:
            rows = [
                line.split("\t")
                for line in shell.type(watch).splitlines()
                if line.startswith("bob")
            ]
            assert [(row[-1].endswith("bob.2"), row[5]) for row in rows] == [
                (True, "1"),
                (False, "0"),
            ]
            assert "disconnected" not in shell.type(end)
            assert bob.ping() > 0
        (upgrade,) = blocks("Upgrade")
        with connect(str(broker.socket), "bob", second, reconnect=False) as bob:
            output = shell.type(upgrade)
            assert re.match(
                r"upgraded to [\w.]+, process \d+: 2 connections went on after [\d.]+ ms\n", output
            )
            assert bob.ping() > 0
        assert not broker.events("client.refused")
        assert first.decode() not in "".join(broker.lines)
