"""Work in a thread: its result goes to the task that waits, or is discarded where that
was cancelled.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.running_daemon import Recorder, configuration

from brokerd.daemon import Daemon, Stopped, daemon
from brokerd.daemon.threads import run_in_thread


def test_run_in_thread_returns_and_raises_what_the_work_does() -> None:
    """It runs in a thread of its own, which does not keep the process alive."""
    seen: list[threading.Thread] = []

    def work() -> int:
        seen.append(threading.current_thread())
        return 7

    def fails() -> None:
        raise ZeroDivisionError

    async def main() -> None:
        assert await run_in_thread(work) == 7
        with pytest.raises(ZeroDivisionError):
            await run_in_thread(fails)

    asyncio.run(main())
    assert seen[0].daemon
    assert seen[0] is not threading.main_thread()


@pytest.mark.parametrize("closed", [False, True])
def test_run_in_thread_cancelled_discards_what_comes_too_late(closed: bool) -> None:
    """What was opened meanwhile is closed, also where the event loop has ended by then;
    an error is dropped.
    """
    go_on, discarded = threading.Event(), threading.Event()
    results: list[int] = []

    def work() -> int:
        go_on.wait(30)
        return 7

    def fails() -> int:
        go_on.wait(30)
        raise ZeroDivisionError

    def discard(result: int) -> None:
        results.append(result)
        discarded.set()

    async def main() -> None:
        tasks = [
            asyncio.ensure_future(run_in_thread(each, discard=discard)) for each in (work, fails)
        ]
        await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        if not closed:
            go_on.set()
            assert await run_in_thread(lambda: discarded.wait(30))

    asyncio.run(main())
    go_on.set()
    assert discarded.wait(30)
    assert results == [7]


def test_daemon_stopped_during_its_start_listens_nowhere(
    socket_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was opened when it was told to stop is closed again, and the start says so."""
    path = socket_dir / "b.sock"

    async def main() -> None:
        broker = Daemon(configuration(str(path)), Recorder().logger)

        async def stop_meanwhile(work: Callable[[], Any], **_: object) -> Any:
            result = work()
            broker.stop_soon("the test")
            return result

        monkeypatch.setattr(daemon, "run_in_thread", stop_meanwhile)
        with pytest.raises(Stopped):
            await broker.start()
        assert not path.exists()
        await asyncio.wait_for(broker.stopped.wait(), 30)
        assert broker.addresses == []

    asyncio.run(main())
