"""Backups of a database in use, and checks of one that is not."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path

import pytest
from support.store_requests import LocalStore, append, database_file, overwrite

from brokerd.core.mailboxes.journal import Change, Remove
from brokerd.store import backup
from brokerd.store.backup import Checked, back_up, check
from brokerd.store.directory import Refused


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    """Return a store with a few messages."""
    store = LocalStore(tmp_path / "store")
    store.commit(append("bob", 1, b"one", b"two", key="k"), append("carol", 1, b"other"))
    store.commit(Remove("bob", ((1, 1),)), Change("carol", 1, "dead", 1))
    return store


def restore(file: Path, directory: Path) -> LocalStore:
    """Put a backup in place, as the documentation says."""
    directory.mkdir()
    file.rename(directory / "mailboxes.db")
    return LocalStore(directory)


def test_backup_of_store_in_use_has_its_messages(store: LocalStore, tmp_path: Path) -> None:
    """A backup is one file with everything that was stored, checked."""
    file = tmp_path / "backup"

    assert back_up(store.path, file) == Checked(2, 2, [], [])

    assert file.stat().st_mode & 0o777 == 0o600
    assert sorted(path.name for path in tmp_path.iterdir()) == ["backup", "store"]
    store.commit(append("bob", 3, b"later"))
    restored = restore(file, tmp_path / "restored")
    assert [(row.seq, row.frame) for row in restored.rows("bob", None)] == [(2, b"two")]
    assert [row.state for row in restored.rows("carol", None)] == ["dead"]
    assert restored.contents["bob"].keys == 2


def test_backup_restored_uses_no_seq_of_after_it(store: LocalStore, tmp_path: Path) -> None:
    """A consumer that remembers its last seq takes no new message for an old one."""
    back_up(store.path, tmp_path / "backup")

    restored = restore(tmp_path / "backup", tmp_path / "restored")

    assert restored.contents["bob"].next_seq > 1 << 32


def test_backup_while_messages_are_stored_is_consistent(store: LocalStore, tmp_path: Path) -> None:
    """Whatever is committed and checkpointed meanwhile, a backup has a state of the store."""
    stop, done = threading.Event(), []

    def copy() -> None:
        number = 0
        while not stop.is_set() or number < 3:
            number += 1
            done.append(back_up(store.path, tmp_path / f"backup{number}"))

    copying = threading.Thread(target=copy, daemon=True)
    copying.start()
    seq = 3
    while len(done) < 3:
        store.commit(append("bob", seq, *[bytes([seq % 256]) * 900] * 20))
        seq += 20
        if seq % 100 == 3:
            store.commit(Remove("bob", ((seq - 60, seq - 30),)))
        store.store._since_checkpoint += 1 << 30
    stop.set()
    copying.join()

    assert all(checked.problems == checked.damaged == [] for checked in done)
    assert all(checked.messages for checked in done)


def test_backup_log_that_begins_again_is_copied_again(
    store: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A log that is overwritten while it is copied would have frames of two kinds."""
    copy, copied = backup._copy, []

    def overwriting(source: Path, target: Path) -> None:
        copy(source, target)
        copied.append(source.name)
        if copied == ["mailboxes.db", "mailboxes.db-wal"]:
            overwrite(target, 17)

    monkeypatch.setattr(backup, "_copy", overwriting)

    assert back_up(store.path, tmp_path / "backup").messages == 2
    assert copied == ["mailboxes.db", "mailboxes.db-wal", "mailboxes.db-wal"]


def test_backup_holds_checkpoints_off(store: LocalStore, tmp_path: Path) -> None:
    """A checkpoint waits for the backup, and is made up for later."""
    with backup.no_checkpoints(store.path):
        before = database_file(store.path).read_bytes()
        store.store._since_checkpoint = 1 << 30
        store.commit(append("bob", 3, b"three"))
        assert database_file(store.path).read_bytes() == before
    store.commit(append("bob", 4, b"four"))
    assert database_file(store.path).read_bytes() != before


def test_backup_overwrites_no_file(store: LocalStore, tmp_path: Path) -> None:
    """An existing file stays as it is."""
    (tmp_path / "backup").write_text("mine")

    with pytest.raises(Refused, match="backup exists"):
        back_up(store.path, tmp_path / "backup")

    assert (tmp_path / "backup").read_text() == "mine"


def test_backup_without_database_is_refused(tmp_path: Path) -> None:
    """Another directory is named in the error."""
    with pytest.raises(Refused, match=r"mailboxes\.db: no such database"):
        back_up(tmp_path, tmp_path / "backup")


def test_backup_of_damaged_database_is_not_kept(store: LocalStore, tmp_path: Path) -> None:
    """A backup that could not be restored does not look like one."""
    store.close()
    overwrite(database_file(store.path), 100)

    assert back_up(store.path, tmp_path / "backup").problems
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_check_of_sound_database_changes_nothing(store: LocalStore, tmp_path: Path) -> None:
    """A check reads the write-ahead log too, and leaves all files as they are."""
    store.crash(tmp_path / "copy")

    def content() -> dict[str, str]:
        return {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in store.path.iterdir()
        }

    before = content()

    assert check(store.path) == Checked(2, 2, [], [])
    assert content() == before


def test_check_of_backup_file_names_damaged_messages(store: LocalStore, tmp_path: Path) -> None:
    """Damaged content is named by mailbox and seq."""
    file = tmp_path / "backup"
    back_up(store.path, file)
    overwrite(file, file.read_bytes().index(b"two"))

    checked = check(file)

    assert (checked.problems, checked.damaged) == (
        [],
        ["mailbox 'bob': messages 1 to 2 are damaged"],
    )


def test_check_of_lost_log_says_so(store: LocalStore, tmp_path: Path) -> None:
    """Transactions that were noted and are not there are missed."""
    store.close()
    store.open()
    store.commit(append("bob", 3, b"three"))
    store.crash(tmp_path / "copy")
    (store.path / "mailboxes.db-wal").unlink()

    assert check(store.path).problems == ["the last 1 transactions are missing"]


def test_check_of_store_in_use_is_refused(store: LocalStore) -> None:
    """A database that a broker writes to can't be checked."""
    with pytest.raises(Refused, match="in use"):
        check(store.path)


def test_check_of_other_file_reports_it(tmp_path: Path) -> None:
    """A file that is no database is a problem, not a traceback."""
    (tmp_path / "file").write_bytes(b"x" * 5000)

    assert check(tmp_path / "file").problems == ["file is not a database"]
