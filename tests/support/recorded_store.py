"""A store for the recorder: ``python recorded_store.py DIRECTORY``.

Each receipt is a byte in the file ``receipts`` of the directory, which the store does not
use.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from support.store_requests import LocalStore, append

from brokerd.core.mailboxes.journal import Change, Record, Remove, Revive
from brokerd.store import process, schema


def batches() -> list[tuple[Record, ...]]:
    """Return batches with all kinds of records."""
    frames = [b"frame %03d" % at * 40 for at in range(12)]
    return [
        (append("bob", 1, *frames[:4], key="a"),),
        (append("bob", 5, frames[4]), append("carol", 1, b"x" * 1500, due_at=3000.0)),
        (Remove("bob", ((1, 2),)), append("bob", 6, *frames[5:8])),
        (Change("bob", 3, "dead", 2, None, "attempts", "error", "bob/1", 5.0),),
        (append("bob", 9, b"duplicate", key="a"), Change("bob", 4, "ready", 1)),
        (Remove("bob", ((4, 8),)), Revive("bob", 3, 10, 0)),
        (append("bob", 11, *frames), Remove("carol", ((1, 1),))),
        (Remove("bob", ((10, 22),)),),
        (append("carol", 2, *frames),),
        (append("dave", 1, frames[0]),),
    ]


def main(directory: str) -> None:
    """Commit all batches, with checkpoints and a clean end in between."""
    schema.PAGE = 512  # type: ignore[misc]  # so that there are calls for many pages
    process._CHECKPOINT_BYTES = 300_000  # type: ignore[misc]  # so that there are some
    store = LocalStore(Path(directory))
    receipts = os.open(Path(directory) / "receipts", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number, records in enumerate(batches()):
        if number == 7:
            store.close()
            store.open()
        answer = store.commit(*records)
        assert answer.word == "committed", answer.arguments
        os.write(receipts, b"r")
    store.close()


if __name__ == "__main__":
    main(sys.argv[1])
