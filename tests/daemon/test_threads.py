"""Work in a thread: the waiting task gets the result, a cancelled one discards it."""

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


def test_run_in_thread_returns_result_or_raises_error_of_work() -> None:
    """The work runs in a thread of its own, which does not keep the process alive."""
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
def test_run_in_thread_cancelled_discards_late_result(closed: bool) -> None:
    """A resource opened meanwhile is closed, even where the event loop has ended. A
    late error is dropped.
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


def test_daemon_stopped_during_start_closes_listeners(
    socket_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The listeners that were open at the stop are closed again, and the start raises
    Stopped.
    """
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
