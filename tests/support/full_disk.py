"""A store on a file system that becomes full: ``python full_disk.py MOUNT_POINT``.

To be run in a mount namespace of its own. Prints ``done`` if all went as it should.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from support.store_requests import LocalStore, append

from brokerd.core.mailboxes.journal import Change, Remove


def fill(file: Path) -> None:
    """Take up all the space that is left."""
    with file.open("wb", buffering=0) as opened:
        for size in (1 << 16, 1 << 12, 1):
            try:
                while opened.write(bytes(size)):
                    pass
            except OSError:
                continue


def main(mount_point: str) -> None:
    """Fill the disk in several ways, and acknowledge everything."""
    command = ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", mount_point]
    if subprocess.run(command, check=False).returncode:
        sys.exit("mount failed")
    root = Path(mount_point)
    store = LocalStore(root / "store")
    stored: list[int] = []
    seq = 0
    for _ in range(3):
        while True:
            seq += 1
            answer = store.commit(append("bob", seq, bytes([seq % 256]) * 100_000))
            if answer.word == "failed":
                break
            stored.append(seq)
        assert answer.arguments[1] == "full", answer.arguments
        assert "the disk is full" in answer.arguments[2], answer.arguments
        # Something else takes the rest.
        fill(root / "rest")
        assert os.statvfs(root).f_bavail < 16
        assert [row.seq for row in store.rows(max_bytes=1 << 30)] == stored
        assert store.commit(Change("bob", stored[0], "ready", 1)).word == "committed"
        store.close()
        store.open()
        assert store.contents["bob"].ready == len(stored)
        while stored:
            gone = stored.pop(0)
            answer = store.commit(Remove("bob", ((gone, gone),)))
            assert answer.word == "committed", answer.arguments
        assert store.rows() == []
        (root / "rest").unlink()
        store.store.tidy(is_idle=True)
    store.close()
    print("done")


if __name__ == "__main__":
    main(sys.argv[1])
