"""The commands for reloads and keys: output for people and scripts, and the exit
status.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import brokerd_client
from brokerd.cli.main import main
from brokerd.config.load import load
from brokerd.ctl.command import brokerctl
from brokerd.ctl.plan import plan_lines
from brokerd.ctl.status import Status

Begin = Callable[[subprocess.Popen[bytes]], subprocess.Popen[bytes]]
GOOD = (
    "listen: [b.sock]\n"
    'include: ["clients.d/*.yaml"]\n'
    "clients:\n"
    "  ops: {key: the key of ops, admin: true, connections: 4}\n"
    "  bob: {keys: [{key: the key of bob, not_after: 2999-01-01}]}\n"
)


class Site:
    """A daemon as a process, its configuration, and commands that talk to it."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.config = home / "brokerd.yaml"
        (home / "ops.key").write_text("the key of ops\n")
        (home / "clients.d").mkdir()
        self.write(GOOD)

    def write(self, text: str) -> None:
        self.config.write_text(text)
        self.config.chmod(0o600)

    def ctl(self, *arguments: str) -> Result:
        access = [
            "--address",
            f"{self.home}/b.sock",
            "--name",
            "ops",
            "--key-file",
            f"{self.home}/ops.key",
        ]
        return CliRunner().invoke(brokerctl, [*access, *arguments])

    def brokerd(self, *arguments: str, **environ: str) -> Result:
        names = ("BROKERD_CONFIG", "BROKERD_ADDRESS", "BROKERD_NAME", "BROKERD_KEY_FILE")
        return CliRunner().invoke(main, list(arguments), env={**dict.fromkeys(names), **environ})

    def check(self, *arguments: str, **environ: str) -> Result:
        return self.brokerd(
            "--config", str(self.config), "check", "--against-running", *arguments, **environ
        )


@pytest.fixture
def site(begin: Begin, socket_dir: Path) -> Site:
    running_site = Site(socket_dir)
    command = [
        sys.executable,
        "-c",
        "from brokerd.cli.main import main; main()",
        "--config",
        str(running_site.config),
    ]
    daemon = begin(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE))
    assert daemon.stderr is not None
    assert b"daemon.started" in daemon.stderr.readline()
    return running_site


def test_ctl_reload_dry_run_prints_plan(site: Site) -> None:
    """It prints a line for each change. The exit status is 0, as the reload would work,
    and nothing has changed.
    """
    with brokerd_client.connect(
        f"{site.home}/b.sock", name="bob", key="the key of bob", reconnect=False
    ) as bob:
        site.write(
            GOOD.replace("[b.sock]", "[b.sock, second.sock]").replace(
                "connections: 4", "connections: 5"
            )
            + "  carol: {key: c}\n"
        )
        text = site.config.read_text()
        site.write("".join(line for line in text.splitlines(keepends=True) if "bob" not in line))

        plain, as_json = site.ctl("reload", "--dry-run"), site.ctl("reload", "--dry-run", "--json")
        checked = site.check()

        assert plain.exit_code == as_json.exit_code == checked.exit_code == Status.DONE
        assert plain.stdout.splitlines() == [
            "+ client carol",
            "~ client ops: connections: 4 -> 5",
            "- client bob",
            (f"! disconnected: bob (unix uid={os.getuid()}): name removed from the configuration"),
            f"+ listener {site.home}/second.sock",
        ]
        assert checked.stdout == plain.stdout
        assert json.loads(as_json.stdout)["plan"]["added"] == ["carol"]
        assert bob.ping() > 0

    done = site.ctl("reload")
    # bob has disconnected in the meantime.
    assert done.stdout.splitlines() == [
        *(line for line in plain.stdout.splitlines() if "bob (" not in line),
        "reloaded",
    ]


def test_ctl_reload_dry_run_without_changes_says_so(site: Site) -> None:
    """An empty plan is a line too."""
    assert site.ctl("reload", "--dry-run").stdout == "nothing changes\n"
    assert site.check().stdout == "nothing changes\n"
    assert site.ctl("reload").stdout == "reloaded\n"


def test_ctl_reload_invalid_configuration_has_status_78(site: Site) -> None:
    """This holds for a dry run, a check and a reload."""
    site.write(GOOD + "nonsense: 1\n")

    for result in (site.ctl("reload", "--dry-run"), site.ctl("reload"), site.check()):
        assert result.exit_code == 78
        assert "unknown key 'nonsense'" in result.stderr


def test_ctl_reload_key_in_place_of_file_name_is_not_printed(site: Site) -> None:
    """None of the commands prints it, as text or as JSON."""
    key = "pV8k3Jz-0aQ_9dFhXw2mTtE7yLrUuNcB4sGiK1oZvIA"
    for field in ("key_file", "key_env", "key_credential"):
        site.write(GOOD + f"  carol: {{{field}: {key}}}\n")

        results = [
            site.ctl("reload"),
            site.ctl("reload", "--json"),
            site.ctl("reload", "--dry-run"),
            site.check(),
        ]
        results += [site.check("--json"), site.brokerd("--config", str(site.config), "check")]

        assert {each.exit_code for each in results} == {78}
        assert f"clients.carol.{field}: " in results[0].stderr
        assert all(key not in each.output for each in results)


def test_ctl_reload_with_unusable_address_has_status_1(site: Site) -> None:
    """The files are valid, but the listener can't be opened: the status differs, and
    the reason is printed.
    """
    (site.home / "plain").write_text("no socket")
    site.write(GOOD.replace("[b.sock]", "[b.sock, ./plain]"))

    for result in (site.ctl("reload", "--dry-run"), site.ctl("reload"), site.check()):
        assert result.exit_code == Status.REFUSED
        assert "a file that is not a socket is there" in result.stderr


def test_check_against_running_finds_administrator(site: Site) -> None:
    """Without variables it is one of the configuration; with them, the client they
    name. A client without the right is refused.
    """
    key = site.home / "bob.key"
    key.write_text("the key of bob\n")
    ops = {"BROKERD_NAME": "ops", "BROKERD_KEY_FILE": f"{site.home}/ops.key"}

    assert site.check().exit_code == Status.DONE
    assert site.check(**ops).exit_code == Status.DONE
    assert site.check(**ops, BROKERD_ADDRESS=f"{site.home}/b.sock").exit_code == Status.DONE
    denied = site.check(BROKERD_NAME="bob", BROKERD_KEY_FILE=str(key))
    assert (denied.exit_code, "denied" in denied.stderr) == (Status.REFUSED, True)
    assert json.loads(site.check("--json").stdout)["dry_run"] is True


def test_check_against_running_with_other_file_is_usage_error(site: Site) -> None:
    """The plan of another file would be wrong for the running broker."""
    other = site.home / "other.yaml"
    other.write_text(GOOD)
    other.chmod(0o600)

    result = site.brokerd("check", "--against-running", str(other))

    assert result.exit_code == Status.USAGE
    assert f"the running broker reads {site.config}, not {other}" in result.stderr


def test_check_against_running_without_broker_or_admin_fails(tmp_path: Path) -> None:
    """A missing broker and a configuration without an administrator have different
    messages.
    """
    file = tmp_path / "b.yaml"
    for text, status, message in (
        (
            "listen: [b.sock]\nclients: {ops: {key: k, admin: true}}\n",
            Status.UNREACHABLE,
            "ops at ",
        ),
        (
            "listen: [b.sock]\nclients: {ops: {key: k}}\n",
            Status.USAGE,
            "set BROKERD_NAME and BROKERD_KEY_FILE",
        ),
    ):
        file.write_text(text)
        file.chmod(0o600)
        result = CliRunner().invoke(
            main, ["check", "--against-running", str(file)], env={"BROKERD_NAME": None}
        )
        assert result.exit_code == status
        assert message in result.stderr


def test_ctl_clients_with_keys_lists_key_ids(site: Site) -> None:
    """Id, state, time, last use and source of each key are listed, but no key."""
    key = load(site.config).clients["bob"].keys[0].key_id
    plain, as_json = site.ctl("clients", "--keys"), site.ctl("clients", "--keys", "--json")

    bob, ops = (line.split("\t") for line in plain.stdout.splitlines())
    assert bob[:3] == ["bob", key, "valid"]
    assert bob[3].startswith("until 299")
    assert bob[4:] == ["not used", "0", "key"]
    assert (ops[0], ops[3], ops[5]) == ("ops", "always", "1")
    answer = json.loads(as_json.stdout)
    assert [each["name"] for each in answer["clients"]] == ["ops", "bob"]
    assert answer["since"] > 0
    assert "the key of" not in plain.output + as_json.output
    assert site.ctl("clients", "--keys", "--watch").exit_code == Status.USAGE


def test_ctl_clients_with_keys_without_admin_is_refused(ctl: Any) -> None:
    """Even ids and times are only for administrators."""
    assert ctl("alice", "clients", "--keys").exit_code == Status.REFUSED


def test_key_add_client_to_running_broker_works_as_printed(site: Site) -> None:
    """The command, the reload it names, and the command it prints for the client: each
    works as it is printed.
    """
    added = site.brokerd("--config", str(site.config), "key", "--add", "carol")

    assert added.exit_code == 0, added.stderr
    first, next_, then, command = added.stdout.splitlines()
    assert (
        first == f"added client carol: {site.home}/clients.d/carol.yaml, with its key in"
        f" {site.home}/keys/carol"
    )
    assert next_ == "Next: brokerctl reload"
    assert site.ctl("reload").stdout.splitlines() == ["+ client carol", "reloaded"]
    assert "name and the key" in then
    assert (site.home / "keys" / "carol").read_text().strip() not in added.output
    scripts = Path(sys.executable).parent
    pinged = subprocess.run(
        ["sh", "-c", command],
        env={"PATH": f"{scripts}:{os.environ['PATH']}", "BROKERD_ADDRESS": f"{site.home}/b.sock"},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert pinged.stdout.startswith("carol: ")


def test_key_add_client_twice_has_status_1(site: Site) -> None:
    """The second time nothing changes, and the exit status is 1. An invalid
    configuration has 78, an invalid name 2.
    """
    options = ("key", "--config", str(site.config), "--add")

    assert site.brokerd(*options, "carol").exit_code == 0
    second = site.brokerd(*options, "carol")
    assert (second.exit_code, second.stdout) == (1, "")
    assert "client 'carol' is configured already" in second.stderr
    assert site.brokerd(*options, "no name").exit_code == 2
    assert site.brokerd(*options).exit_code == 2
    site.write("nonsense: 1\n")
    assert site.brokerd(*options, "dave").exit_code == 78
    assert not (site.home / "keys" / "dave").exists()


def test_ctl_plan_as_text_escapes_control_characters() -> None:
    """Characters that move a cursor are printed as escapes; every kind of change has
    its line.
    """
    answer = {
        "plan": {
            "altered": {"/run/\x1b[2J": ["mode: 0600 -> 0660"]},
            "closed": ["/run/old"],
            "limits": ["connections: 1 -> 2"],
            "log": ["level: info -> debug"],
            "restart": ["monitor changes only with a restart"],
        },
        "warnings": ["f:1: odd"],
    }

    assert list(plan_lines(answer)) == [
        "~ listener /run/\\x1b[2J: mode: 0600 -> 0660",
        "- listener /run/old",
        "~ limits.connections: 1 -> 2",
        "~ log.level: info -> debug",
        "! needs a restart: monitor changes only with a restart",
        "! f:1: odd",
    ]
