"""Removing a client by a command: its entry and its keys go, or nothing does."""

from __future__ import annotations

from pathlib import Path

import pytest

from brokerd.cli.add_client import add_client
from brokerd.cli.remove_client import NotRemoved, remove_client
from brokerd.config.load import ConfigError, load

MAIN = 'listen: [b.sock]\nclients: {ops: {key: k}}\ninclude: ["clients.d/*.yaml"]\n'


@pytest.fixture
def main(tmp_path: Path) -> Path:
    """A configuration to which alice and bob were added."""
    file = tmp_path / "brokerd.yaml"
    file.write_text(MAIN)
    file.chmod(0o600)
    for name in ("alice", "bob"):
        add_client(name, file)
    return file


def files(main: Path) -> set[str]:
    paths = (path for path in main.parent.rglob("*") if path.is_file())
    return {path.relative_to(main.parent).as_posix() for path in paths}


def test_remove_client_removes_entry_and_key(main: Path) -> None:
    """Nothing of it is left; the other client stays."""
    removed = remove_client("bob", main)

    home = main.parent
    assert removed.files == (home / "clients.d" / "bob.yaml", home / "keys" / "bob")
    assert files(main) == {"brokerd.yaml", "clients.d/alice.yaml", "keys/alice"}
    assert "bob" not in load(main).clients


def test_remove_client_after_rotation_removes_every_key_below_keys(
    main: Path, tmp_path: Path
) -> None:
    """A key elsewhere may have another purpose, and stays."""
    for name in ("keys/bob.2", "other"):
        (tmp_path / name).write_text(f"{name}\n")
        (tmp_path / name).chmod(0o600)
    listed = "[{file: ../keys/bob}, {file: ../keys/bob.2}, {file: ../other}]"
    (tmp_path / "clients.d/bob.yaml").write_text(f"clients: {{bob: {{keys: {listed}}}}}\n")

    remove_client("bob", main)

    assert files(main) == {"brokerd.yaml", "clients.d/alice.yaml", "keys/alice", "other"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("carol", "has no client 'carol'"),
        ("ops", "is configured at {home}/brokerd.yaml:2 (remove it there)"),
        ("bob", "has other clients too"),
    ],
)
def test_remove_client_not_possible_says_reason(main: Path, name: str, message: str) -> None:
    """No file is changed."""
    entry = main.parent / "clients.d" / "bob.yaml"
    entry.write_text(entry.read_text() + "  dave: {peer_uid: [1]}\n")
    before = files(main)

    with pytest.raises(NotRemoved) as refused:
        remove_client(name, main)

    assert message.format(home=main.parent) in str(refused.value)
    assert files(main) == before


def test_remove_client_that_rules_name_changes_nothing(main: Path) -> None:
    """The configuration would have a mistake: alice may send to bob alone."""
    entry = main.parent / "clients.d" / "alice.yaml"
    entry.write_text(entry.read_text() + "    send_to: [bob]\n")
    before = files(main)

    with pytest.raises(ConfigError, match="there is no client 'bob'"):
        remove_client("bob", main)

    assert files(main) == before
