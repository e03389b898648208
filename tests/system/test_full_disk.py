"""A disk that fills up under the audit, and is emptied again."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.broker_process import BrokerProcess
from support.outages.traffic import RECIPIENTS, SENDERS, Traffic
from support.waiting import until

pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(
        sys.platform != "linux" or os.geteuid() != 0 or shutil.which("mount") is None,
        reason="needs root on Linux",
    ),
]

NAMES = (*SENDERS, *RECIPIENTS, "late")


@pytest.fixture
def small_disk(socket_dir: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    mount_point = socket_dir / "disk"
    mount_point.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", mount_point], check=True)
    try:
        yield mount_point
    finally:
        subprocess.run(["umount", "--lazy", mount_point], check=True)


def test_audit_on_full_disk_continues_when_space_is_free(
    socket_dir: Path, small_disk: Path
) -> None:
    """Messages go on without the audit. When there is room again the audit continues,
    and says how many lines it lost.
    """
    audit = small_disk / "audit.log"
    with BrokerProcess(socket_dir, NAMES, log={"audit": str(audit)}) as broker:
        broker.wait("daemon.started")
        with Traffic(socket_dir, str(broker.socket)) as traffic:
            with (small_disk / "filler").open("wb", buffering=0) as filler:
                until(lambda: not _takes_more(filler.fileno()), "the disk is never full")
            for _ in range(60):
                # Enough lines for what is left of the page the audit has begun.
                with broker.login("late") as late:
                    late.ping()
            traffic.goes_on()
            size = audit.stat().st_size
            (small_disk / "filler").unlink()
            with broker.login("late") as late:
                late.ping()
            until(lambda: b'"log.lost"' in audit.read_bytes()[size:], "the audit never goes on")
            traffic.goes_on()
            disconnected = [
                event["name"]
                for event in broker.events("client.disconnected")
                if event["name"] != "late"
            ]
            account = traffic.finish("ENOSPC under the audit, and room again")
    assert disconnected == []
    assert (account.refused, account.in_doubt) == (0, 0)
    account.record("no connection ended; the audit continued and logged its loss")


def _takes_more(file: int) -> bool:
    try:
        return os.write(file, bytes(4096)) > 0
    except OSError:
        return False
