"""Damage: each byte of the files changed or cut off, and never a message lost silently."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from support.store_requests import LocalStore, append

from brokerd.core.mailboxes.journal import Change, Remove
from brokerd.store import schema
from brokerd.store.database import Damaged
from brokerd.store.directory import Refused

#: What is there: mailbox, seq, frame, state.
Found = set[tuple[str, int, bytes, str]]


class _Files(NamedTuple):
    """The files of a store, and what is in it."""

    path: Path
    messages: Found


@pytest.fixture
def copy() -> Iterator[Path]:
    """Return a directory for copies; in memory, because nothing of it has to last."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as path:
        yield Path(path) / "copy"


@pytest.fixture(params=["log", "database"])
def files(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> _Files:
    """Return the files of a killed process, with or without a write-ahead log.

    The smallest pages that SQLite has make the files short. Carol's messages are too long
    for the row of their run.
    """
    monkeypatch.setattr(schema, "PAGE", 512)
    store = LocalStore(tmp_path / "first")
    for number in range(4):
        first = 1 + 5 * number
        frames = [b"message %d of bob" % (first + at) for at in range(5)]
        store.commit(append("bob", first, *frames, key=f"{number}-"))
    store.commit(append("carol", 1, b"for carol", b"x" * 800, due_at=2000.0))
    store.commit(
        Remove("bob", ((2, 3), (11, 15))),
        Change("bob", 6, "dead", 3, None, "attempts", "no disk", "bob/1", 1.0),
        Change("bob", 7, "ready", 1),
    )
    messages = found(store)
    assert len(messages) == 15
    if request.param == "database":
        store.close()
    else:
        store.crash(tmp_path / "files")
    (store.path / "mailboxes.reserve").unlink()
    return _Files(store.path, messages)


def found(store: LocalStore) -> Found:
    """Return everything that a store delivers or shows, with empty frames for damage."""
    return {
        (mailbox, row.seq, row.frame, row.state)
        for mailbox in ("bob", "carol")
        for row in store.rows(mailbox, None)
    }


def check(files: _Files, copy: Path) -> None:
    """Open damaged files: they are refused, or each message is there or dead."""
    try:
        store = LocalStore(copy)
    except (*schema.ERRORS, Refused, Damaged, OSError):
        return
    try:
        messages = found(store)
        if store.store.broken:
            return
        buried = {(mailbox, seq) for mailbox, seq, frame, _ in messages if not frame}
        assert {message for message in messages if message[2]} <= files.messages
        missing = files.messages - messages
        assert {(mailbox, seq) for mailbox, seq, *_ in missing} == buried
        # A key is not taken for another one.
        answer = store.commit(append("bob", 500, b"new", key="other"))
        assert answer.word == "failed" or answer.arguments[1] == []
    finally:
        store.database.connection.close()
        store.directory.close()


def damaged_copies(files: _Files, copy: Path, step: int) -> Iterator[str]:
    """Damage each file of a copy at every ``step``-th byte, in two ways."""
    for name in sorted(file.name for file in files.path.iterdir()):
        whole = (files.path / name).read_bytes()
        for offset in range(step // 2 if step > 1 else 0, len(whole), step):
            flipped = bytearray(whole)
            flipped[offset] ^= 1 << offset % 8
            for damage, content in (("flipped", bytes(flipped)), ("cut", whole[:offset])):
                shutil.rmtree(copy, ignore_errors=True)
                shutil.copytree(files.path, copy)
                (copy / name).write_bytes(content)
                yield f"{name} {damage} at {offset}"


def lost_silently(files: _Files, copy: Path, step: int) -> list[str]:
    """Return the damages after which a message is neither there nor missed."""
    lost = []
    for damage in damaged_copies(files, copy, step):
        try:
            check(files, copy)
        except Exception as error:  # noqa: BLE001 - the rest is tried all the same
            lost.append(f"{damage}: {error!r}")
    return lost


def test_damage_at_some_bytes_loses_no_message_silently(files: _Files, copy: Path) -> None:
    """Damage is refused at the start, or its messages become dead letters."""
    assert lost_silently(files, copy, 499) == []


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_damage_at_every_byte_loses_no_message_silently(files: _Files, copy: Path) -> None:
    """The same with each single byte."""
    assert lost_silently(files, copy, 1) == []
