"""What an administrator types to reload and to look after keys: output for people, for
scripts, and the exit status.
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
    """A daemon as a process, its configuration, and the commands typed beside it."""

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
    here = Site(socket_dir)
    command = [
        sys.executable,
        "-c",
        "from brokerd.cli.main import main; main()",
        "--config",
        str(here.config),
    ]
    daemon = begin(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE))
    assert daemon.stderr is not None
    assert b"daemon.started" in daemon.stderr.readline()
    return here


def test_a_dry_run_prints_the_plan(site: Site) -> None:
    """A line for each thing; the exit status is 0, as the reload would work, and
    nothing has changed.
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
    # Bob has left by himself.
    assert done.stdout.splitlines() == [
        *(line for line in plain.stdout.splitlines() if "bob (" not in line),
        "reloaded",
    ]


def test_nothing_to_change_is_said(site: Site) -> None:
    """An empty plan is a line too."""
    assert site.ctl("reload", "--dry-run").stdout == "nothing changes\n"
    assert site.check().stdout == "nothing changes\n"
    assert site.ctl("reload").stdout == "reloaded\n"


def test_a_bad_file_is_78_with_its_mistakes(site: Site) -> None:
    """For a dry run, a check and a reload alike."""
    site.write(GOOD + "nonsense: 1\n")

    for result in (site.ctl("reload", "--dry-run"), site.ctl("reload"), site.check()):
        assert result.exit_code == 78
        assert "unknown key 'nonsense'" in result.stderr


def test_a_key_pasted_for_a_file_is_in_no_output(site: Site) -> None:
    """None of the commands repeats it, as text or as JSON."""
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


def test_an_address_in_the_way_is_1(site: Site) -> None:
    """The files are right, and it can't be done: another status, and the reason."""
    (site.home / "plain").write_text("no socket")
    site.write(GOOD.replace("[b.sock]", "[b.sock, ./plain]"))

    for result in (site.ctl("reload", "--dry-run"), site.ctl("reload"), site.check()):
        assert result.exit_code == Status.REFUSED
        assert "a file that is not a socket is there" in result.stderr


def test_check_finds_an_administrator_by_itself(site: Site) -> None:
    """Without an environment it is one of the configuration; with one, that client; one
    without rights is refused.
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


def test_check_says_if_the_broker_reads_another_file(site: Site) -> None:
    """What it would say of its own file would be no answer."""
    other = site.home / "other.yaml"
    other.write_text(GOOD)
    other.chmod(0o600)

    result = site.brokerd("check", "--against-running", str(other))

    assert result.exit_code == Status.USAGE
    assert f"the running broker reads {site.config}, not {other}" in result.stderr


def test_check_says_if_nobody_answers(tmp_path: Path) -> None:
    """No broker, and a configuration without an administrator, are told apart."""
    file = tmp_path / "b.yaml"
    for text, status, says in (
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
        assert says in result.stderr


def test_keys_are_listed_by_their_ids(site: Site) -> None:
    """Id, state, time, last use and source of each; no key."""
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


def test_only_administrators_see_the_keys(ctl: Any) -> None:
    """Even ids and times are no business of others."""
    assert ctl("alice", "clients", "--keys").exit_code == Status.REFUSED


def test_a_client_is_added_while_the_broker_runs(site: Site) -> None:
    """The command, the reload it names, and the command it gives for the client: each
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


def test_a_client_is_not_added_twice(site: Site) -> None:
    """The second time nothing changes, and the exit status is 1; a bad configuration is
    78; a bad name 2.
    """
    options = ("key", "--config", str(site.config), "--add")

    assert site.brokerd(*options, "carol").exit_code == 0
    again = site.brokerd(*options, "carol")
    assert (again.exit_code, again.stdout) == (1, "")
    assert "client 'carol' is configured already" in again.stderr
    assert site.brokerd(*options, "no name").exit_code == 2
    assert site.brokerd(*options).exit_code == 2
    site.write("nonsense: 1\n")
    assert site.brokerd(*options, "dave").exit_code == 78
    assert not (site.home / "keys" / "dave").exists()


def test_a_plan_for_people_is_harmless() -> None:
    """What moves a cursor is shown and not sent; every kind of change has its line."""
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
