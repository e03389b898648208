"""A pool of workers, one of them killed: every request has a reply or an error."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.outages.restartable_broker import TIMEOUT_S, RestartableBroker, restartable_broker

from brokerd_client import aio
from brokerd_client.errors import Abandoned, BrokerdError, Offline

WORKERS = 8
#: Requests under way at once.
WINDOW = 400


@pytest.mark.parametrize("requests", [4_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_pool_worker_killed_each_request_has_reply_or_error(
    socket_dir: Path, requests: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """The requests that the killed worker had end as abandoned or offline; no other
    request fails.
    """
    with (
        restartable_broker(socket_dir, ["asker", "work"], f"connections: {WORKERS + 1}") as broker,
        _pool(broker) as workers,
    ):
        counted = asyncio.run(_ask(broker, workers, requests))
    assert counted.total() == requests
    assert counted.keys() <= {"reply", Abandoned.code, Offline.code}
    # The killed worker had some requests, else this shows nothing; no more than were in
    # flight.
    assert 0 < counted[Abandoned.code] + counted[Offline.code] <= WINDOW
    with capsys.disabled():
        print(f"\n{requests} requests, one of {WORKERS} workers killed: {dict(counted)}")


@contextlib.contextmanager
def _pool(broker: RestartableBroker) -> Iterator[list[subprocess.Popen[bytes]]]:
    script = Path(__file__).resolve().parents[1] / "support" / "outages" / "worker.py"
    command = [sys.executable, str(script), broker.address, "work", broker.key("work")]
    workers = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(WORKERS)]
    try:
        for worker in workers:
            assert worker.stdout is not None
            assert worker.stdout.readline().startswith(b"work/")
        yield workers
    finally:
        for worker in workers:
            worker.kill()
            worker.wait(TIMEOUT_S)
            assert worker.stdout is not None
            worker.stdout.close()


async def _ask(
    broker: RestartableBroker, workers: list[subprocess.Popen[bytes]], requests: int
) -> collections.Counter[str]:
    counted: collections.Counter[str] = collections.Counter()
    window = asyncio.Semaphore(WINDOW)

    async def ask(number: int) -> None:
        try:
            answer = await client.request("work", number, timeout=TIMEOUT_S)
        except BrokerdError as error:
            counted[getattr(error, "code", type(error).__name__)] += 1
        else:
            counted["reply" if answer.payload == number else "wrong reply"] += 1
        finally:
            window.release()

    async with (
        aio.connect(broker.address, name="asker", key=broker.key("asker")) as client,
        asyncio.TaskGroup() as tasks,
    ):
        for number in range(requests):
            await window.acquire()
            tasks.create_task(ask(number))
            if number == requests // 2:
                # Stopped first, so that it has requests that it can't answer any more.
                workers[0].send_signal(signal.SIGSTOP)
            elif workers[0].returncode is None and counted.total() >= requests // 2 + WINDOW // 2:
                # The other workers have answered so many since that it had some, too.
                workers[0].kill()
                workers[0].wait(TIMEOUT_S)
    return counted
