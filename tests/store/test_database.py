"""The store's database: what is written, removed, changed and read back."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path

import pytest
from support.store_requests import DEDUP_S, LocalStore, append, database_file, overwrite

from brokerd.core.mailboxes.journal import (
    MAX_SEQ,
    Batch,
    Change,
    Contents,
    Remove,
    Revive,
    Stored,
)
from brokerd.store import database
from brokerd.store.check import content_problems_of, problems_of
from brokerd.store.database import Damaged
from brokerd.store.directory import Refused
from brokerd.store.messages import Message, commit_message, message, rows_of
from brokerd.store.process import Store


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    """Return an empty store."""
    return LocalStore(tmp_path / "store")


def seqs(store: LocalStore, *arguments: object) -> list[int]:
    """Return the seqs of a read."""
    return [row.seq for row in store.rows(*arguments)]  # type: ignore[arg-type]


def test_database_read_before_a_commit_does_not_wait_for_it(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is a transaction of its own, which writes nothing; the answers keep their order."""
    store.commit(append("bob", 1, b"one"))
    words = []
    together = Store._together

    def noted(self: Store, requests: list[Message], size: int) -> None:
        words.append([request.word for request in requests])
        together(self, requests, size)

    monkeypatch.setattr(Store, "_together", noted)
    commit = commit_message(Batch(2, (Remove("bob", ((1, 1),)),)))
    read = message("read", 1, "bob", "ready", (0.0, 0), 10, 1000)
    commits = store.database.commits
    answers = store.run(read, read, commit, read, commit)
    assert words == [["read", "read"], ["commit", "read", "commit"]]
    expected = ["rows", "rows", "committed", "rows", "committed"]
    assert [answer.word for answer in answers] == expected
    assert store.database.commits == commits + 1


def test_database_files_are_for_their_owner_alone(tmp_path: Path) -> None:
    """That holds in a directory that is open to other users, with a wide umask."""
    directory = tmp_path / "store"
    directory.mkdir(mode=0o755)
    before = os.umask(0)
    try:
        store = LocalStore(directory)
        store.commit(append("bob", 1, b"secret"))
    finally:
        os.umask(before)
    modes = {file.name: file.stat().st_mode & 0o777 for file in directory.iterdir()}
    assert {"mailboxes.db", "mailboxes.db-wal"} <= set(modes)
    assert set(modes.values()) == {0o600}


def test_database_messages_are_read_back_in_order(store: LocalStore) -> None:
    """Messages of several batches return with all that is known of them."""
    store.commit(append("bob", 1, b"one", b"two"), append("carol", 1, b"other"))
    store.commit(append("bob", 3, b"three", expires_at=1500.0, key="k"))

    rows = store.rows("bob")

    assert [(row.seq, row.frame, row.state, row.attempts) for row in rows] == [
        (1, b"one", "ready", 0),
        (2, b"two", "ready", 0),
        (3, b"three", "ready", 0),
    ]
    assert rows[2].stored == Stored(5, 1000.0, 1500.0, None, ("alice", "k0"))
    assert store.rows("carol")[0].frame == b"other"
    assert store.rows("dave") == []


def test_database_read_behind_the_largest_seq_finds_nothing(store: LocalStore) -> None:
    store.commit(append("bob", 1, b"one"))
    for state in (None, "ready", "delayed", "dead"):
        assert not seqs(store, "bob", state, (0.0, MAX_SEQ))


def test_database_read_is_bounded_by_messages_and_bytes(store: LocalStore) -> None:
    """A read returns what is wanted, and at least one message however long it is."""
    store.commit(append("bob", 1, b"a" * 10, b"b" * 10, b"c" * 10))
    store.commit(append("bob", 4, b"d" * 500))

    assert seqs(store, "bob", "ready", (0.0, 0), 2) == [1, 2]
    assert seqs(store, "bob", "ready", (0.0, 1), 10, 25) == [2, 3]
    assert seqs(store, "bob", "ready", (0.0, 3), 10, 25) == [4]
    assert seqs(store, "bob", "ready", (0.0, 4), 10, 25) == []


def test_database_read_ends_before_a_row_of_which_only_a_part_is_wanted(
    store: LocalStore,
) -> None:
    """The next read would need the content of that row again. A part is better than nothing."""
    store.commit(append("bob", 1, b"a" * 10))
    store.commit(append("bob", 2, *[b"b" * 10] * 3))
    store.commit(append("bob", 5, b"c" * 10))

    assert seqs(store, "bob", "ready", (0.0, 0), 3) == [1]
    assert seqs(store, "bob", "ready", (0.0, 0), 10, 35) == [1]
    assert seqs(store, "bob", "ready", (0.0, 0), 4) == [1, 2, 3, 4]
    assert seqs(store, "bob", "ready", (0.0, 1), 2) == [2, 3]
    assert seqs(store, "bob", "ready", (0.0, 3), 10) == [4, 5]
    assert seqs(store, "bob", "ready", (0.0, 0), 10, 40) == [1, 2, 3, 4]


def test_database_removed_messages_do_not_return(store: LocalStore, tmp_path: Path) -> None:
    """Removal holds across a crash; unknown seqs are ignored."""
    store.commit(append("bob", 1, *[b"x"] * 10), append("bob", 11, *[b"y"] * 10))
    store.commit(Remove("bob", ((2, 4), (9, 12), (50, 60))), Remove("nobody", ((1, 1),)))

    store.crash(tmp_path / "copy")
    store.open()

    assert seqs(store) == [1, 5, 6, 7, 8, *range(13, 21)]
    assert (store.contents["bob"].ready, store.contents["bob"].ready_bytes) == (13, 13)


@pytest.mark.parametrize(("size", "contents"), [(1, 0), (100, 1)])
def test_database_row_is_deleted_with_its_last_message(
    store: LocalStore, size: int, contents: int
) -> None:
    """Acknowledged messages give their disk space back, in whatever order.

    contents: the content of a short run is in its row.
    """
    store.commit(append("bob", 1, *[b"x" * size] * 10))
    for seq in (3, 1, 2, 10, 9, 8, 7, 6, 5):
        store.commit(Remove("bob", ((seq, seq),)))
    count = "SELECT (SELECT count(*) FROM runs), (SELECT count(*) FROM content)"
    assert store.database.connection.execute(count).fetchone() == (1, contents)
    assert seqs(store) == [4]

    store.commit(Remove("bob", ((4, 4),)))

    assert store.database.connection.execute(count).fetchone() == (0, 0)


def test_database_message_that_stays_does_not_keep_its_neighbours_on_disk(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row of which little is left is written again without the rest, but not the latest:
    the rest of that is probably removed soon.
    """
    monkeypatch.setattr(database, "_SPARSE", 1)
    monkeypatch.setattr(database, "_RUNS", 1)
    for first in (1, 201, 401):
        store.commit(append("bob", first, *[bytes([at]) * 1000 for at in range(200)]))

    for first in (1, 201, 401):
        store.commit(Remove("bob", ((first, first + 98), (first + 100, first + 199))))
    store.commit(Remove("bob", ((300, 300),)))

    sizes = "SELECT length(frames) FROM content ORDER BY id"
    assert store.database.connection.execute(sizes).fetchall() == [(1000,), (200_000,)]
    kept = bytes([99]) * 1000
    assert [(row.seq, row.frame) for row in store.rows()] == [(100, kept), (500, kept)]
    store.commit(Remove("bob", ((100, 100), (500, 500))))
    assert store.rows() == []


def test_database_long_append_is_split_into_rows(store: LocalStore) -> None:
    """Rows have at most 1,024 messages and 256 KiB, unless one message is longer."""
    frames = [b"x"] * 3000 + [b"y" * 200_000] * 3 + [b"z" * 900_000]
    store.commit(append("bob", 1, *frames))

    rows = store.database.connection.execute("SELECT count, size FROM runs").fetchall()

    assert all(count <= 1024 and (size <= 256 << 10 or count == 1) for count, size in rows)
    assert sum(count for count, _ in rows) == len(frames)
    assert [row.frame for row in store.rows(max_bytes=1 << 30)] == frames


def test_database_known_key_leaves_the_message_out(store: LocalStore) -> None:
    """A duplicate is named, in the same transaction too, and after it was removed."""
    answer = store.commit(append("bob", 1, b"one", key="k"), append("bob", 2, b"two", key="k"))
    assert answer.arguments[1] == [("bob", 2)]
    store.commit(Remove("bob", ((1, 1),)))

    answer = store.commit(append("bob", 3, b"1", b"2", key="k"), append("carol", 1, b"3", key="k"))

    assert answer.arguments[1] == [("bob", 3)]
    assert (seqs(store), seqs(store, "carol")) == ([4], [1])


def test_database_key_is_forgotten_when_its_time_is_over(store: LocalStore) -> None:
    """An old key is counted as forgotten, once, and its message is stored again."""
    store.commit(append("bob", 1, b"one", key="k"))
    store.now += DEDUP_S + 1

    answer = store.commit(append("bob", 2, b"two", key="k", at=store.now))

    assert answer.arguments[1:] == [[], [("bob", 1)]]
    assert seqs(store) == [1, 2]
    assert store.commit().arguments[1:] == [[], []]


def test_database_keys_are_forgotten_while_nothing_is_committed(store: LocalStore) -> None:
    """A mailbox that is full of keys gets room without a message."""
    store.commit(append("bob", 1, b"one", b"two", key="k"))
    store.now += DEDUP_S + 1

    store.store.tidy(is_idle=True)

    (answer,) = store.run()
    assert (answer.word, answer.arguments) == ("forgotten", [[("bob", 2)]])


def test_database_looked_up_key_is_known_for_its_time(store: LocalStore) -> None:
    """The broker may ask for a key without a message."""

    def known(mailbox: str, sender: str, key: str) -> bool:
        answer = store.run(message("look_up_key", 3, mailbox, sender, key))[0]
        assert (answer.word, answer.arguments[0]) == ("key_looked_up", 3)
        return bool(answer.arguments[1])

    store.commit(append("bob", 1, b"one", key="k"))

    assert known("bob", "alice", "k0")
    assert not known("bob", "alice", "k1")
    assert not known("bob", "carol", "k0")
    assert not known("carol", "alice", "k0")
    store.now += DEDUP_S + 1
    assert not known("bob", "alice", "k0")


def test_database_delayed_messages_are_read_by_due_time(store: LocalStore) -> None:
    """Messages with a delay are a list of their own, in the order in which they are due."""
    store.commit(
        append("bob", 1, b"late", due_at=1030.0),
        append("bob", 2, b"ready"),
        append("bob", 3, b"soon", due_at=1010.0),
        append("bob", 4, b"too", due_at=1010.0),
    )

    assert seqs(store) == [2]
    assert seqs(store, "bob", "delayed") == [3, 4, 1]
    assert seqs(store, "bob", "delayed", (1010.0, 3)) == [4, 1]
    assert [row.due_at for row in store.rows("bob", "delayed")] == [1010.0, 1010.0, 1030.0]
    assert seqs(store, "bob", None) == [1, 2, 3, 4]


def test_database_changed_message_returns_with_its_state(store: LocalStore) -> None:
    """A failed message has its attempts, and a dead letter all that is known of it."""
    store.commit(append("bob", 1, b"one", b"two", b"three"))
    failed = Change("bob", 1, "ready", 2, None, "failed", "no disk")
    dead = Change("bob", 2, "dead", 3, None, "attempts", "é", "carol/1", 1234.5)

    store.commit(failed, dead, Change("bob", 9, "dead", 1), Change("dave", 1, "dead", 1))

    first, third = store.rows()
    assert (first.seq, first.attempts, first.error) == (1, 2, "no disk")
    assert (third.seq, third.attempts) == (3, 0)
    (letter,) = store.rows("bob", "dead")
    assert letter == (2, b"two", Stored(3, 1000.0, None, None, None), *dead[2:])


def test_database_revived_message_is_ready_under_its_new_seq(store: LocalStore) -> None:
    """A dead letter returns to the end; its old seq is gone."""
    first = b"head" + (1).to_bytes(8, "big") + b"one"
    store.commit(append("bob", 1, first, b"two", key="k"), Change("bob", 1, "dead", 3))

    store.commit(Revive("bob", 1, 3, 4), Revive("bob", 8, 9, 4))

    assert [(row.seq, row.frame, row.attempts) for row in store.rows()] == [
        (2, b"two", 0),
        (3, b"head" + (3).to_bytes(8, "big") + b"one", 0),
    ]
    assert store.rows()[1].stored.key == ("alice", "k0")
    assert store.rows("bob", "dead") == []


def test_database_purge_removes_one_state(store: LocalStore) -> None:
    """A purge removes what has the state, up to a seq, but for some messages."""
    store.commit(
        append("bob", 1, *[b"abc"] * 10),
        append("bob", 11, b"later", due_at=2000.0),
        Change("bob", 4, "dead", 1),
        Change("bob", 5, "ready", 1),
    )

    assert store.purge("bob", "ready", 9, [2, 7]) == (5, 15)
    assert seqs(store, "bob", None) == [2, 4, 7, 9, 10, 11]
    assert store.purge("bob", "dead", 100) == (1, 3)
    assert store.purge("bob", "delayed", 100) == (1, 5)
    assert store.purge("bob", None, 100) == (4, 12)
    assert store.purge("bob", None, 100) == (0, 0)
    assert store.purge("dave", None, 100) == (0, 0)


def test_database_contents_are_known_when_it_is_opened(store: LocalStore) -> None:
    """A start has the counters of each mailbox without reading its messages."""
    store.commit(
        append("bob", 1, b"one", b"four"),
        append("bob", 3, b"later", due_at=1300.0, key="k", at=990.0),
        append("bob", 4, b"sooner", due_at=1200.0),
        Change("bob", 1, "dead", 1),
        append("carol", 7, b"seven"),
        Remove("carol", ((7, 7),)),
    )
    store.close()

    store.open()

    assert store.contents == {
        "bob": Contents("bob", 5, 1, 2, 1, 4, 11, 3, 1000.0, 1, 1200.0),
        "carol": Contents("carol", 8),
    }


def test_database_seq_is_not_used_twice_after_a_crash(store: LocalStore, tmp_path: Path) -> None:
    """After a crash the next seq is above all that the disk may have lost."""
    store.commit(append("bob", 1, b"one"))
    store.crash(tmp_path / "copy")

    store.open()

    assert store.contents["bob"].next_seq > 1000


def test_database_requests_of_one_transaction_see_each_other(store: LocalStore) -> None:
    """Requests are carried out in their order, however they are committed."""
    answers = store.run(
        *(message("read", number, "bob", "ready", (0.0, 0), 9, 99) for number in (1, 2)),
        message("purge", 3, "bob", None, 9, ()),
        message("read", 4, "bob", "ready", (0.0, 0), 9, 99),
    )

    assert [(answer.word, answer.arguments[0]) for answer in answers] == [
        ("rows", 1),
        ("rows", 2),
        ("purged", 3),
        ("rows", 4),
    ]


@pytest.mark.parametrize("size", [0, 1000])
def test_database_damaged_content_becomes_dead_letters(
    store: LocalStore, tmp_path: Path, size: int
) -> None:
    """Messages whose content is damaged are kept as dead letters, and the rest goes on.

    size: of what makes a run so long that its content is not in its row.
    """
    store.commit(append("bob", 3, b"third message"))
    store.commit(append("bob", 4, b"fourth message" + bytes(size), b"fifth message"))
    store.commit(append("bob", 6, b"sixth message"), Change("bob", 5, "ready", 4))
    store.close()
    file = database_file(store.path)
    overwrite(file, file.read_bytes().index(b"fifth message"))
    store.open()

    rows = store.rows()

    assert [(row.seq, row.frame, row.state, row.reason) for row in rows] == [
        (3, b"third message", "ready", ""),
        (4, b"", "dead", "damaged"),
        (5, b"", "dead", "damaged"),
        (6, b"sixth message", "ready", ""),
    ]
    assert [row.attempts for row in store.rows("bob", "dead")] == [0, 4]
    assert seqs(store) == [3, 6]
    assert [*content_problems_of(store.database.connection)]
    store.crash(tmp_path / "copy")
    store.open()
    assert (store.contents["bob"].ready, store.contents["bob"].dead) == (2, 2)
    store.commit(Remove("bob", ((1, 6),)))
    assert [*problems_of(store.database.connection)] == []


def test_database_tells_all_messages_of_a_damaged_row(store: LocalStore) -> None:
    """They became dead letters, although the read returns only the first."""
    first, second, third = b"1" * 900, b"2" * 900, b"3" * 900
    store.commit(append("bob", 1, first, second), append("bob", 3, third, due_at=2000.0))
    store.database.connection.execute("UPDATE content SET frames_seal = frames_seal + 1")

    told, rows = store.run(message("read", 1, "bob", "ready", (0.0, 0), 1, 99))
    again = store.run(message("read", 2, "bob", "delayed", (0.0, 0), 9, 99))

    assert (told.word, told.arguments) == ("buried", ["bob", [(1, None, 900), (2, None, 900)]])
    assert [(row.seq, row.state) for row in rows_of(rows)] == [(1, "dead")]
    assert again[0].arguments == ["bob", [(3, 2000.0, 900)]]
    (only,) = store.run(message("read", 3, "bob", None, (0.0, 0), 9, 9999))
    assert len(rows_of(only)) == 3


def test_database_damaged_counters_are_refused(store: LocalStore) -> None:
    """A start refuses a database that contradicts itself, and changes nothing."""
    store.commit(append("bob", 1, b"one", b"two"))
    store.close()
    with sqlite3.connect(database_file(store.path)) as connection:
        connection.execute("UPDATE runs SET live = 1")
    connection.close()

    with pytest.raises(Damaged, match="runs does not match its checksum"):
        store.open()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("DELETE FROM mailboxes", "the last 2 transactions are missing"),
        ("UPDATE mailboxes SET commits = 'x'", "number of committed transactions"),
        ("UPDATE mailboxes SET commits = commits + 1", "does not match its checksum"),
    ],
)
def test_database_with_damaged_number_of_transactions_is_refused(
    store: LocalStore, change: str, reason: str
) -> None:
    """It can't be told whether transactions are missing."""
    store.commit(append("bob", 1, b"x"))
    store.commit(append("carol", 1, b"x"))
    store.close()
    with sqlite3.connect(store.path / "mailboxes.db") as connection:
        connection.execute(change)
    connection.close()
    with pytest.raises((Damaged, Refused), match=reason):
        LocalStore(store.path)


def test_database_lost_log_is_refused(store: LocalStore, tmp_path: Path) -> None:
    """Messages in a write-ahead log that is gone are missed."""
    store.commit(append("bob", 1, b"one"))
    store.crash(tmp_path / "copy")
    (tmp_path / "copy" / "mailboxes.db-wal").unlink()

    with pytest.raises(Refused, match=r"the last \d transactions are missing"):
        store.open()


def test_database_of_another_program_is_refused(store: LocalStore) -> None:
    """A database with other tables is left alone."""
    store.close()
    with sqlite3.connect(database_file(store.path)) as connection:
        connection.execute("PRAGMA application_id = 1")
    connection.close()

    with pytest.raises(Refused, match="is not a database of brokerd"):
        store.open()


def test_database_of_a_newer_version_is_refused(store: LocalStore) -> None:
    """A database that a later brokerd has written is left alone."""
    store.close()
    with sqlite3.connect(database_file(store.path)) as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()

    with pytest.raises(Refused, match="version 99, and this brokerd uses version 2"):
        store.open()


def test_database_in_use_is_refused(store: LocalStore) -> None:
    """Two processes never write to one database."""
    with pytest.raises(Refused, match="is in use by another process"):
        LocalStore(store.path)


def test_database_too_little_free_space_refuses_new_messages(store: LocalStore) -> None:
    """Below min_free, no message is stored, and everything else of the batch is."""
    store.commit(append("bob", 1, b"one", b"two", b"three"))
    store.run(message("configure", DEDUP_S, 1 << 62))

    answer = store.commit(
        Remove("bob", ((1, 1),)), append("bob", 4, b"four"), Change("bob", 2, "dead", 1)
    )

    assert answer.word == "failed"
    assert answer.arguments[1] == "full"
    assert "store.min_free is" in answer.arguments[2]
    assert (seqs(store), seqs(store, "bob", "dead")) == ([3], [2])
    store.run(message("configure", DEDUP_S, 0))
    store.commit(append("bob", 5, b"five"))
    assert seqs(store) == [3, 5]


@pytest.mark.parametrize("short", ["zeroblob(0)", "zeroblob(20)", "'text'", "substr(short, 1, 15)"])
def test_database_damaged_short_content_becomes_dead_letters(store: LocalStore, short: str) -> None:
    """Whatever is wrong with the content in the row of a run, its messages are kept."""
    store.commit(append("bob", 1, b"one", b"two"))
    store.close()
    with sqlite3.connect(database_file(store.path)) as connection:
        connection.execute(f"UPDATE runs SET short = {short}")
    connection.close()
    store.open()

    rows = store.rows(state=None)
    assert [(row.seq, row.state, row.reason) for row in rows] == [
        (1, "dead", "damaged"),
        (2, "dead", "damaged"),
    ]
    assert len([*content_problems_of(store.database.connection)]) == 1
