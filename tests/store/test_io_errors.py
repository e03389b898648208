"""I/O errors and a full disk: the first error is final, and a full disk is not an error."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
from support import full_disk
from support.crash_states import build_shim
from support.store_requests import LocalStore, append

from brokerd.core.mailboxes.journal import Batch, Buried, Committed, Failed, Remove, Row
from brokerd.store.connection import StoreConnection, StoreSettings
from brokerd.store.directory import Refused

needs_gcc = pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")

#: Batches that a test commits, each with a message of this many bytes.
_BATCHES = 6
_SIZE = 5_000


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the file layer that lets calls fail."""
    return build_shim(tmp_path_factory.mktemp("library"))


class _Run(NamedTuple):
    """What became of the batches: "committed", "full" or "io" each; None if refused."""

    outcomes: list[str] | None
    refusal: str


class _Answers:
    def __init__(self) -> None:
        self.queue: asyncio.Queue[str] = asyncio.Queue()

    def committed(self, answer: Committed) -> None:
        self.queue.put_nowait("committed")

    def failed(self, answer: Failed) -> None:
        self.queue.put_nowait(answer.kind.value)

    def rows(self, request: int, rows: Sequence[Row]) -> None:
        self.queue.put_nowait(f"{len(rows)} rows")

    def key_looked_up(self, request: int, known: bool) -> None:
        raise NotImplementedError

    def purged(self, request: int, count: int, size: int) -> None:
        raise NotImplementedError

    def forgotten(self, keys: Sequence[tuple[str, int]]) -> None:
        raise NotImplementedError

    def buried(self, buried: Buried) -> None:
        raise NotImplementedError


async def _commit(path: Path) -> _Run:
    """Commit batches one by one, each removing what the last but one has stored."""
    connection = StoreConnection(StoreSettings(path, 0, 3600.0), lambda: None)
    try:
        await connection.open()
    except Refused as refusal:
        return _Run(None, str(refusal))
    answers, outcomes = _Answers(), []
    connection.serve(answers)
    for number in range(1, _BATCHES + 1):
        new = append("bob", number, bytes([number]) * _SIZE)
        gone = Remove("bob", ((number - 2, number - 2),))
        connection.commit(Batch(number, (gone, new)))
        outcomes.append(await answers.queue.get())
    connection.read(1, "bob", "ready", (0.0, 0), 100, 1 << 20)
    if "io" in outcomes:
        assert await answers.queue.get() == "0 rows"
    else:
        await answers.queue.get()
    await connection.close(30.0)
    return _Run(outcomes, "")


def run_with_faults(
    path: Path,
    library: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    number: int,
    error: int,
    count: int | None,
) -> _Run:
    """Commit to a store whose calls fail from a certain one on; check what is there then."""
    settings = {
        "LD_PRELOAD": str(library),
        "DISK_DIR": str(path),
        "DISK_FAIL": kind,
        "DISK_FAIL_AT": str(number),
        "DISK_ERRNO": str(error),
    }
    if count is not None:
        settings["DISK_FAIL_FOR"] = str(count)
    with monkeypatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        run = asyncio.run(_commit(path))
    if run.outcomes is None:
        return run
    store = LocalStore(path)
    there = {row.seq: row.frame for row in store.rows()}
    store.close()
    for number, outcome in enumerate(run.outcomes, 1):
        frame = bytes([number]) * _SIZE
        removed = number + 2 <= len(run.outcomes)
        if outcome == "committed" and not removed:
            assert there.get(number) == frame
        if outcome == "full":
            assert number not in there
        if outcome == "committed" and removed and run.outcomes[number + 1] != "io":
            assert number not in there
    assert all(there[number] == bytes([number]) * _SIZE for number in there)
    return run


@needs_gcc
@pytest.mark.parametrize("count", [1, None], ids=["once", "always"])
@pytest.mark.parametrize(("kind", "number"), [("sync", 14), ("write", 40)])
def test_io_error_of_a_commit_is_final(
    tmp_path: Path,
    library: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    number: int,
    count: int | None,
) -> None:
    """After the first error nothing is confirmed, even if the disk works again."""
    run = _Run(None, "")
    while run.outcomes is None:
        # The error is moved behind the start of the process.
        path = tmp_path / f"store{number}"
        run = run_with_faults(path, library, monkeypatch, kind, number, errno.EIO, count)
        number += 4

    first = run.outcomes.index("io")
    assert set(run.outcomes[:first]) <= {"committed"}
    assert set(run.outcomes[first:]) == {"io"}


@needs_gcc
@pytest.mark.slow
@pytest.mark.parametrize("count", [1, None], ids=["once", "always"])
@pytest.mark.parametrize("kind", ["sync", "write"])
def test_io_error_of_any_call_is_final(
    tmp_path: Path,
    library: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    count: int | None,
) -> None:
    """The same for each call, from the start to the end of the process."""
    for number in range(1, 1000):
        path = tmp_path / f"store{number}"
        run = run_with_faults(path, library, monkeypatch, kind, number, errno.EIO, count)
        shutil.rmtree(path)
        outcomes = run.outcomes or []
        if run.outcomes is not None and "io" not in outcomes:
            # The error came after the last batch.
            break
        assert run.refusal or set(outcomes[outcomes.index("io") :]) == {"io"}
    else:
        pytest.fail("the calls never end")


@needs_gcc
def test_full_disk_refuses_messages_and_goes_on(
    tmp_path: Path, library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A write without room is rolled back; what needs no room is carried out."""
    run, number = _Run(None, ""), 40
    while run.outcomes is None:
        path = tmp_path / f"store{number}"
        run = run_with_faults(path, library, monkeypatch, "write", number, errno.ENOSPC, 1)
        number += 4

    assert sorted(run.outcomes) == ["committed"] * (_BATCHES - 1) + ["full"]


@needs_gcc
@pytest.mark.slow
def test_full_disk_at_any_write_refuses_messages_and_goes_on(
    tmp_path: Path, library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same at each write, from the start to the end of the process."""
    seen = set()
    for number in range(1, 1000):
        path = tmp_path / f"store{number}"
        run = run_with_faults(path, library, monkeypatch, "write", number, errno.ENOSPC, 1)
        shutil.rmtree(path)
        if run.outcomes is None:
            assert run.refusal
            continue
        assert run.outcomes.count("io") == 0 or number < 20, (number, run.outcomes)
        seen.add(run.outcomes.count("full"))
        if run.outcomes.count("full") == 0 and number > 100:
            break
    assert seen == {0, 1}


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="needs root, for a tmpfs")
@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs unshare")
def test_full_file_system_leaves_room_for_acknowledgements(tmp_path: Path) -> None:
    """On a file system without a free byte, stored messages can be removed."""
    command = ["unshare", "-m", "--propagation", "private", sys.executable, full_disk.__file__]
    environment = {**os.environ, "PYTHONPATH": ":".join(path for path in sys.path if path)}

    done = subprocess.run(
        [*command, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=60
    )

    if "mount failed" in done.stderr:
        pytest.skip("can't mount a tmpfs here")
    assert (done.stdout, done.stderr) == ("done\n", "")
