"""Where log lines are written: in order, whole, counted if they are lost, and without
a wait of the caller.
"""

from __future__ import annotations

import errno
import io
import os
import socket
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from time import monotonic
from typing import Any

import pytest

from brokerd.log import sinks
from brokerd.log.sinks import Descriptor, Journal, Sink, Text, of_stream, open_for_append

TIMEOUT_S = 30.0


def line_of(event: Mapping[str, Any]) -> bytes:
    """Return the line of an event of the sink itself, or of a test."""
    if event["event"] == "log.lost":
        return b"lost %d\n" % event["count"]
    return b"%s\n" % event["event"].encode()


class Gate:
    """A target that accepts a line once it is opened, and keeps the lines."""

    together = 0

    def __init__(self) -> None:
        self.lines: list[bytes] = []
        self.opened = threading.Event()
        self.called = threading.Event()
        self.full = False
        self.closed = False

    def write(self, line: bytes) -> None:
        self.called.set()
        assert self.opened.wait(TIMEOUT_S)
        if self.full:
            raise OSError(errno.ENOSPC, "no space left")
        self.lines.append(line)

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.opened.set()


def test_sink_writes_lines_in_order(gate: Gate) -> None:
    """Five thousand lines from one thread arrive in the order in which they were put."""
    sink = Sink(gate, line_of)
    gate.opened.set()
    for number in range(5000):
        sink.put(b"%d\n" % number)

    assert sink.close(TIMEOUT_S)

    assert gate.lines == [b"%d\n" % number for number in range(5000)]
    assert gate.closed


def test_sink_writes_lines_of_a_burst_together(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines that come after a write are gathered: the thread is not woken for each. A
    flush ends the gathering, and a long line is written alone.
    """
    monkeypatch.setattr(sinks, "_GATHER_S", 3600.0)
    gate.together = 10
    gate.opened.set()
    sink = Sink(gate, line_of)
    sink.put(b"first\n")
    assert gate.called.wait(TIMEOUT_S)
    for line in (b"1\n", b"2\n", b"a long line\n", b"3\n", b"12345678\n"):
        sink.put(line)

    assert sink.flush(TIMEOUT_S)
    assert gate.lines == [b"first\n", b"1\n2\n", b"a long line\n", b"3\n", b"12345678\n"]
    sink.put(b"last\n")
    assert sink.close(TIMEOUT_S)
    assert gate.lines[5:] == [b"last\n"]


def test_sink_makes_lines_of_events_in_its_thread(
    gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The caller makes a line only while many events wait. All lines stay in order."""
    monkeypatch.setattr(sinks, "_BATCH", 10)
    threads: list[str] = []

    def render(event: Mapping[str, Any]) -> bytes:
        threads.append(threading.current_thread().name)
        return line_of(event)

    sink = Sink(gate, render)
    sink.put({"event": "first"})
    assert gate.called.wait(TIMEOUT_S)
    for number in range(25):
        sink.put({"event": str(number)})
    gate.opened.set()
    assert sink.close(TIMEOUT_S)

    assert gate.lines == [b"first\n", *[b"%d\n" % number for number in range(25)]]
    assert threads == ["brokerd log", *["MainThread"] * 15, *["brokerd log"] * 10]


def test_sink_with_event_that_has_no_line_writes_others(gate: Gate) -> None:
    """It counts as a lost line."""
    sink = Sink(gate, line_of)
    gate.opened.set()
    sink.put({"event": "before"})
    sink.put({"event": 7})
    sink.put({"event": "after"})
    assert sink.close(TIMEOUT_S)

    assert gate.lines == [b"before\n", b"lost 1\n", b"after\n"]
    assert sink.lost == 1


def test_sink_counts_each_lost_line_of_a_burst(gate: Gate) -> None:
    """Lines that were to be written together are counted one by one."""
    gate.together = 100
    gate.full = True
    sink = Sink(gate, line_of)
    for _ in range(7):
        sink.put(b"gone\n")
    gate.opened.set()
    assert sink.flush(TIMEOUT_S)
    gate.full = False
    sink.put(b"here\n")
    assert sink.close(TIMEOUT_S)

    assert gate.lines == [b"lost 7\n", b"here\n"]
    assert sink.lost == 7


def test_sink_put_without_reader_never_waits(gate: Gate) -> None:
    """While no line is written, put returns at once. Lines without room are counted,
    and the count is written in their place.
    """
    sink = Sink(gate, line_of)
    sink.put(b"first\n")
    assert gate.called.wait(TIMEOUT_S)
    for number in range(3 * sinks.MOST_LINES):
        sink.put(b"%d\n" % number)

    assert not sink.flush(0.01)
    # A metric tells of lost lines while the reader does not read.
    assert sink.lost == 2 * sinks.MOST_LINES
    gate.opened.set()
    assert sink.flush(TIMEOUT_S)
    sink.put(b"last\n")
    assert sink.close(TIMEOUT_S)

    kept = sinks.MOST_LINES
    assert gate.lines == [
        b"first\n",
        *[b"%d\n" % number for number in range(kept)],
        b"lost %d\n" % (2 * kept),
        b"last\n",
    ]


def test_sink_waiting_bytes_are_bounded(gate: Gate) -> None:
    """Fewer long lines may wait than short ones."""
    sink = Sink(gate, line_of)
    sink.put(b"first\n")
    assert gate.called.wait(TIMEOUT_S)
    line = bytes(100_000)
    for _ in range(100):
        sink.put(line)

    gate.opened.set()
    assert sink.close(TIMEOUT_S)

    kept = sinks.MOST_BYTES // len(line)
    assert gate.lines == [b"first\n", *[line] * kept, b"lost %d\n" % (100 - kept)]


def test_sink_on_full_disk_counts_lost_lines(gate: Gate) -> None:
    """While nothing can be written, lines are lost; the first line afterwards is their
    number.
    """
    sink = Sink(gate, line_of)
    gate.opened.set()
    gate.full = True
    for _ in range(7):
        sink.put(b"gone\n")
    assert sink.flush(TIMEOUT_S)

    gate.full = False
    sink.put(b"here\n")
    assert sink.close(TIMEOUT_S)

    assert gate.lines == [b"lost 7\n", b"here\n"]


def test_sink_writes_lost_count_without_next_line(
    gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a quiet broker the write is tried again after some time."""
    monkeypatch.setattr(sinks, "_TRY_AGAIN", 0.01)
    sink = Sink(gate, line_of)
    gate.opened.set()
    gate.full = True
    sink.put(b"gone\n")
    assert sink.flush(TIMEOUT_S)
    gate.full = False

    end = monotonic() + TIMEOUT_S
    while not gate.lines:
        assert monotonic() < end
    assert gate.lines == [b"lost 1\n"]
    assert sink.close(TIMEOUT_S)


@pytest.mark.timing
def test_sink_close_without_reader_ends_at_timeout(gate: Gate) -> None:
    """While no line is written, close returns when its time is over. Lines put after it
    are discarded.
    """
    sink = Sink(gate, line_of)
    sink.put(b"first\n")
    assert gate.called.wait(TIMEOUT_S)
    sink.put(b"second\n")
    began = monotonic()

    assert not sink.close(0.05)

    assert monotonic() - began < 20
    sink.put(b"third\n")
    gate.opened.set()


def test_sink_close_without_use_closes_target(gate: Gate) -> None:
    """No thread is started for it."""
    sink = Sink(gate, line_of)

    assert sink.close(1)
    assert gate.closed


def test_descriptor_completes_partly_written_line_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk becomes full within a line. The rest of the line is written before the
    next one, so that lines never mix.
    """
    written: list[bytes] = []
    room = 4

    def write(descriptor: int, data: bytes) -> int:
        nonlocal room
        if not room:
            raise OSError(errno.ENOSPC, "no space left")
        size = min(room, len(data))
        room -= size
        written.append(bytes(data[:size]))
        return size

    monkeypatch.setattr(os, "write", write)
    # A number that is not in use: the end of an open file would be read.
    target = Descriptor(10_000)
    target.write(b"a line\n")
    for _ in range(2):
        with pytest.raises(OSError, match="no space"):
            target.write(b"lost\n")
    room = 100
    target.write(b"next\n")

    assert b"".join(written) == b"a line\nnext\n"


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="the end of the file is read through /proc"
)
@pytest.mark.parametrize("before", [b"", b"whole\n", b"whole\ncut sh"])
@pytest.mark.parametrize("replaced", [False, True])
def test_descriptor_of_file_with_line_cut_short_begins_new_line(
    tmp_path: Path, before: bytes, replaced: bool
) -> None:
    """A process that ends on a full disk leaves half a line; the next process does not
    append to it.
    """
    path, first = tmp_path / "audit.log", tmp_path / "first.log"
    path.write_bytes(before)
    target = Descriptor(open_for_append(str(first if replaced else path)), owned=True)
    if replaced:
        target.replace(open_for_append(str(path)))
    target.write(b"next\n")
    target.close()
    assert path.read_bytes().splitlines() == [*before.splitlines(), b"next"]


@pytest.mark.parametrize("is_file", [True, False])
def test_descriptor_takes_many_lines_at_once_if_it_is_file(tmp_path: Path, is_file: bool) -> None:
    """A pipe takes no more than PIPE_BUF whole; the lines of other processes would mix."""
    reading, writing = os.pipe()
    target = Descriptor(writing)
    if is_file:
        target.replace(open_for_append(str(tmp_path / "log")))
    assert target.together == (64 * 1024 if is_file else 4096)
    target.write(b"line\n")
    if not is_file:
        assert os.read(reading, 100) == b"line\n"
        os.close(writing)
    os.close(reading)


def test_descriptor_non_blocking_is_waited_for() -> None:
    """Nothing is lost when a write would block, and the descriptor stays non-blocking."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    sink = Sink(Descriptor(writing, owned=True), line_of)
    lines = [b"%d %s\n" % (number, b"x" * 1000) for number in range(500)]
    for line in lines:
        sink.put(line)
    got = bytearray()
    while got.count(b"\n") < len(lines):
        got += os.read(reading, 1 << 16)

    assert bytes(got) == b"".join(lines)
    assert not os.get_blocking(writing)
    assert sink.close(TIMEOUT_S)
    os.close(reading)


def test_descriptor_blocking_stays_blocking() -> None:
    """Standard error may be shared with other programs, which do not expect it to
    become non-blocking.
    """
    reading, writing = os.pipe()
    sink = Sink(Descriptor(writing, owned=True), line_of)
    sink.put(b"line\n")
    assert os.read(reading, 100) == b"line\n"
    assert os.get_blocking(writing)
    sink.close(TIMEOUT_S)
    os.close(reading)


def test_sink_stream_without_descriptor_is_written_as_text() -> None:
    """A program may keep its standard error in memory; a closed stream loses lines."""
    stream = io.StringIO()
    target = of_stream(stream)
    target.write(b"line\n")
    assert stream.getvalue() == "line\n"
    assert isinstance(target, Text)
    stream.close()
    with pytest.raises(OSError, match="closed"):
        target.write(b"line\n")
    target.close()


def test_descriptor_new_file_has_mode_0600(tmp_path: Path) -> None:
    """Lines are appended to the file; the mode of an existing file is unchanged."""
    path = tmp_path / "log"
    target = Descriptor(open_for_append(str(path)), owned=True)
    target.write(b"one\n")
    assert path.stat().st_mode & 0o777 == 0o600
    path.chmod(0o640)
    target.replace(open_for_append(str(path)))
    target.write(b"two\n")
    target.close()
    assert path.read_bytes() == b"one\ntwo\n"
    assert path.stat().st_mode & 0o777 == 0o640


def test_journal_restarted_receives_entries(socket_dir: Path) -> None:
    """When the journal has been restarted, entries reach the new one; while there is
    none, writing fails.
    """
    path = str(socket_dir / "journal")

    def start() -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        sock.settimeout(TIMEOUT_S)
        sock.bind(path)
        return sock

    with start() as first:
        journal = Journal(path)
        journal.write(b"A=1\n")
        assert first.recv(100) == b"A=1\n"
    with pytest.raises(OSError, match="refused"):
        journal.write(b"A=2\n")
    Path(path).unlink()
    with pytest.raises(FileNotFoundError):
        journal.write(b"A=2\n")
    with start() as second:
        journal.write(b"A=3\n")
        assert second.recv(100) == b"A=3\n"
    journal.close()
