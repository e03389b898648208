"""``brokerd store check`` and ``brokerd store backup``, as commands."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from support.store_requests import LocalStore, append, database_file, overwrite

from brokerd.cli.main import main


def run(*arguments: object) -> Result:
    """Run ``brokerd store``."""
    return CliRunner().invoke(main, ["store", *map(str, arguments)])


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    """Return a store with one message."""
    store = LocalStore(tmp_path / "store")
    store.commit(append("bob", 1, b"some payload"))
    return store


def test_store_check_of_stopped_broker_prints_what_is_there(store: LocalStore) -> None:
    """A sound database gives status 0 and one line."""
    store.close()

    done = run("check", "--directory", store.path)

    assert (done.exit_code, done.output) == (0, f"{store.path}: ok, 1 mailbox, 1 message\n")


def test_store_check_of_running_broker_recommends_a_backup(store: LocalStore) -> None:
    """The error says what would be right."""
    done = run("check", "--directory", store.path)

    assert done.exit_code == 1
    assert "Check a backup: brokerd store backup FILE" in done.output


def test_store_check_without_directory_takes_the_configured_one(
    store: LocalStore, tmp_path: Path
) -> None:
    """The configuration names the directory; without a store it is a usage error."""
    store.close()
    config = tmp_path / "brokerd.yaml"
    config.touch(mode=0o600)
    listen = "listen: [./s]\nclients: {bob: {peer_uid: [0]}}\n"
    config.write_text(f"{listen}store: store\n")

    done = CliRunner().invoke(main, ["--config", str(config), "store", "check"])

    assert (done.exit_code, done.output) == (0, f"{store.path}: ok, 1 mailbox, 1 message\n")
    config.write_text(listen)
    done = CliRunner().invoke(main, ["--config", str(config), "store", "check"])
    assert done.exit_code == 2
    assert "has no store; give the directory" in done.output


def test_store_backup_is_checked(store: LocalStore, tmp_path: Path) -> None:
    """A backup of a store in use, and its check, have status 0."""
    file = tmp_path / "backup"

    done = run("backup", "--directory", store.path, file)

    assert (done.exit_code, done.output) == (0, f"{file}: ok, 1 mailbox, 1 message\n")
    assert run("check", file).exit_code == 0
    assert (
        "exists (backups never overwrite" in run("backup", "--directory", store.path, file).output
    )


def test_store_check_of_damaged_message_names_it(store: LocalStore) -> None:
    """Damage gives status 1."""
    store.close()
    file = database_file(store.path)
    overwrite(file, file.read_bytes().index(b"some payload"))

    done = run("check", "--directory", store.path)

    assert done.exit_code == 1
    assert "mailbox 'bob': messages 1 to 1 are damaged" in done.output


def test_store_backup_of_damaged_database_is_not_made(store: LocalStore, tmp_path: Path) -> None:
    """The reason and the problem are printed."""
    store.close()
    overwrite(database_file(store.path), 100)

    done = run("backup", "--directory", store.path, tmp_path / "backup")

    assert done.exit_code == 1
    assert "no backup was made" in done.output
