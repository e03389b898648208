"""Which client brokerctl is, and the options and names that it knows."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner, Result
from support.broker_process import BrokerProcess

import brokerd_client
from brokerd.ctl.command import brokerctl
from brokerd.ctl.status import OPTIONS, Status

pytestmark = pytest.mark.skipif(os.name == "nt", reason="users and sockets of POSIX")

VARIABLES = ("BROKERD_CONFIG_YAML", "BROKERD_ADDRESS", "BROKERD_NAME", "BROKERD_KEY_FILE")


def run(config: Path, *arguments: str) -> Result:
    """Run brokerctl with no more than a configuration in the environment."""
    environ = {**dict.fromkeys(VARIABLES), "BROKERD_CONFIG": str(config)}
    return CliRunner().invoke(brokerctl, list(arguments), env=environ)


def test_ctl_without_identity_is_administrator_without_key(socket_dir: Path) -> None:
    """Its name and its socket come from the broker's configuration."""
    clients = {"bob": {}, "ops": {"peer_uid": [os.geteuid()], "admin": True}}
    with BrokerProcess(socket_dir, clients) as broker:
        broker.wait("daemon.started")

        pinged = run(broker.config, "ping")

        assert pinged.exit_code == 0, pinged.output
        assert pinged.stdout.startswith("ops: ")
        assert run(broker.config, "stats").exit_code == 0


def test_ctl_without_identity_and_administrator_needs_key(tmp_path: Path) -> None:
    """The error is that of a missing key."""
    config = tmp_path / "b.yaml"
    config.write_text("listen: [b.sock]\nclients: {ops: {peer_uid: [4711], admin: true}}\n")

    result = run(config, "ping")

    assert result.exit_code == Status.USAGE
    assert "no key: give --key-file" in result.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--address", "/tmp/none.sock", "--name", "alice", "ping"], "give --address, or"),
        (["--address", "/tmp/none.sock", "ping"], "give --key-file or the environment"),
    ],
)
def test_ctl_error_names_its_own_options(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: list[str], words: str
) -> None:
    """The library's arguments have other names than the options."""
    monkeypatch.setenv("BROKERD_CONFIG", str(tmp_path / "none.yaml"))
    for name in ("BROKERD_NAME", "BROKERD_KEY_FILE", "BROKERD_ADDRESS"):
        monkeypatch.delenv(name, raising=False)

    result = CliRunner().invoke(brokerctl, arguments)

    assert words in result.output
    assert "key_file" not in result.output


def test_ctl_texts_of_library_that_are_replaced_exist() -> None:
    """Each text that the command replaces stands in the library's source."""
    package = Path(brokerd_client.__file__).parent
    sources = "".join(path.read_text(encoding="utf-8") for path in package.rglob("*.py"))
    joined = re.sub(r'"\s*\n\s*f?"', "", sources)

    assert [argument for argument, _ in OPTIONS if argument not in joined] == []


def test_ctl_json_before_command_is_its_own(ctl: Any) -> None:
    """--json may stand before every command; one that prints a script refuses it."""
    before, after = ctl("alice", "--json", "ping"), ctl("alice", "ping", "--json")
    none = ctl("alice", "--json", "completion", "bash")
    sent = ctl("alice", "--json", "publish", "news", "x")

    assert json.loads(before.stdout).keys() == json.loads(after.stdout).keys()
    assert (sent.exit_code, sent.stdout) == (0, "")
    assert none.exit_code == Status.USAGE
    assert "completion prints no JSON: omit --json" in none.output


def test_ctl_name_is_completed_from_broker(ctl: Any) -> None:
    """The names are those that the client may send to; without a broker there are none."""
    for name in ("bob", "bert", "carol"):
        ctl.broker.add(name)
    access = ctl.access("alice")

    def completed(*words: str) -> list[str]:
        complete = ShellComplete(brokerctl, {}, "brokerctl", "_BROKERCTL_COMPLETE")
        return [item.value for item in complete.get_completions([*words[:-1]], words[-1])]

    assert completed(*access, "send", "b") == ["bert", "bob"]
    assert completed(*access, "why", "--from", "c") == ["carol"]
    assert completed("--address", "/tmp/none.sock", "--name", "x", "send", "b") == []


def test_ctl_drain_beside_socket_unit_tells_of_restart(
    ctl: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The service manager listens on, and would start the broker again."""
    monkeypatch.setattr(
        brokerd_client.Client,
        "control",
        lambda *_, **__: {"draining": True, "activated": ["/run/b.sock"]},
    )

    result = ctl("alice", "drain")

    assert "still listens at /run/b.sock" in result.stdout
    assert "systemctl stop brokerd.socket" in result.stdout
