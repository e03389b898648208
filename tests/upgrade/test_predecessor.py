"""The old process of an upgrade: the report of a bug in it."""

from __future__ import annotations

import asyncio
import socket
import sys

import pytest
from support.running_daemon import Recorder, configuration

from brokerd.daemon import Daemon
from brokerd.upgrade import old_process as upgrade_source
from brokerd.upgrade.channel import UpgradeChannel, UpgradeChannelError
from brokerd.upgrade.old_process import UpgradeSource

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="processes upgrade on Linux"
)


def test_upgrade_bug_is_logged_without_payload(monkeypatch: pytest.MonkeyPatch) -> None:
    """The log has the traceback and the kind of the error, but not its text, which may
    hold a client's message.
    """
    log = Recorder()

    bug = UnicodeDecodeError("utf-8", b"\xff of a message", 0, 1, "planted")

    def fail(*given: object) -> None:
        raise bug

    async def serve() -> None:
        async with Daemon(configuration("127.0.0.1:0"), log.logger) as daemon:
            source = UpgradeSource(daemon)
            source.soon("the test")
            await asyncio.wait_for(asyncio.gather(*filter(None, [source._task])), 30)

    monkeypatch.setattr(upgrade_source, "_NewProcess", fail)
    asyncio.run(serve())

    (bug,), (failed,) = log.named("daemon.bug"), log.named("daemon.upgrade_failed")
    assert bug.level == "error"
    assert "in fail" in "".join(bug.fields["trace"])
    assert failed.fields["problem"].startswith("a bug: UnicodeDecodeError: ")
    assert "of a message" not in str(log.events)


def test_upgrade_unexpected_data_is_not_shown_in_error() -> None:
    """Unexpected data may be anything, even a client's message."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        text = b'"\xff of a message"'
        ours.sendall(b"bkUP" + len(text).to_bytes(4) + text)
        with pytest.raises(UpgradeChannelError) as caught:
            UpgradeChannel(theirs).receive(within_s=30)
    assert "UnicodeDecodeError" in str(caught.value)
    assert "of a message" not in str(caught.value)
