"""The commands that are printed after a client was added work as they are printed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from brokerd.cli.client_commands import command_of, reload_command
from brokerd.config.load import load
from brokerd.config.model import Config

POSIX = pytest.mark.skipif(os.name == "nt", reason="users and sockets of POSIX")


def config(directory: Path, clients: str, listen: str = "b.sock") -> Config:
    (directory / "ops.key").write_text("ops's key")
    (directory / "ops.key").chmod(0o600)
    file = directory / "b.yaml"
    file.write_text(f"listen: ['{listen}']\nclients: {clients}\n")
    file.chmod(0o600)
    return load(file)


@POSIX
@pytest.mark.parametrize(
    ("clients", "environ", "command"),
    [
        ("{ops: {peer_uid: [%(me)d], admin: true}}", {}, "BROKERD_CONFIG=%(dir)s/b.yaml brokerctl"),
        (
            "{ops: {peer_uid: [%(me)d], admin: true}}",
            {"BROKERD_CONFIG": "%(dir)s/b.yaml"},
            "brokerctl",
        ),
        (
            "{ops: {key_file: ops.key, admin: true}}",
            {},
            (
                "BROKERD_ADDRESS=%(dir)s/b.sock BROKERD_NAME=ops BROKERD_KEY_FILE=%(dir)s/ops.key"
                " brokerctl"
            ),
        ),
        ("{ops: {key_file: ops.key, admin: true}}", {"BROKERD_NAME": "ops"}, "brokerctl"),
        ("{ops: {key: k, admin: true}}", {}, "brokerctl"),
        ("{new: {key: k, admin: true}}", {}, "systemctl"),
        ("{ops: {key: k}}", {}, "systemctl"),
    ],
)
def test_reload_command_names_an_administrator_that_works(
    tmp_path: Path, clients: str, environ: dict[str, str], command: str
) -> None:
    """Without an administrator besides the new client, the service manager reloads."""
    values = {"me": os.geteuid(), "dir": str(tmp_path)}
    given = {name: value % values for name, value in environ.items()}

    found = reload_command(config(tmp_path, clients % values), "new", given)

    assert found.partition(" reload")[0] == command % values


@POSIX
@pytest.mark.parametrize(
    ("listen", "address"),
    [
        ("/run/brokerd/brokerd.sock", ""),
        ("127.0.0.1:6000", "BROKERD_ADDRESS=127.0.0.1:6000 "),
        ("127.0.0.1:0", ""),
    ],
)
def test_command_of_client_has_address_unless_it_is_the_default(
    tmp_path: Path, listen: str, address: str
) -> None:
    """A port that the system chooses is unknown."""
    found = command_of(config(tmp_path, "{a: {key: k}}", listen), "a", Path("/k/a"), "ping")

    assert found == f"{address}BROKERD_NAME=a BROKERD_KEY_FILE=/k/a brokerctl ping"
