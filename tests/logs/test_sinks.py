"""Where lines go: in order, whole, counted where they are lost, and never with anybody
waiting.
"""

from __future__ import annotations

import errno
import io
import os
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from time import monotonic

import pytest

from brokerd.log import sinks
from brokerd.log.sinks import Descriptor, Journal, Sink, Text, of_stream, open_for_append

TIMEOUT_S = 30.0


def lost_line(count: int) -> bytes:
    return b"lost %d\n" % count


class Gate:
    """A target that takes a line when it is let, and says what it has."""

    def __init__(self) -> None:
        self.lines: list[bytes] = []
        self.opened = threading.Event()
        self.recipients = threading.Event()
        self.full = False
        self.closed = False

    def write(self, line: bytes) -> None:
        self.recipients.set()
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


def test_lines_come_out_in_order(gate: Gate) -> None:
    """Ten thousand lines from one thread arrive as they were put."""
    sink = Sink(gate, lost_line)
    gate.opened.set()
    for number in range(5000):
        sink.put(b"%d\n" % number)

    assert sink.close(TIMEOUT_S)

    assert gate.lines == [b"%d\n" % number for number in range(5000)]
    assert gate.closed


def test_whoever_logs_never_waits(gate: Gate) -> None:
    """With nobody reading, putting goes on; what found no room is counted, and the
    count stands where it was lost.
    """
    sink = Sink(gate, lost_line)
    sink.put(b"first\n")
    assert gate.recipients.wait(TIMEOUT_S)
    for number in range(3 * sinks.MOST_LINES):
        sink.put(b"%d\n" % number)

    assert not sink.flush(0.01)
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


def test_what_waits_is_bounded_in_bytes(gate: Gate) -> None:
    """Long lines are fewer."""
    sink = Sink(gate, lost_line)
    sink.put(b"first\n")
    assert gate.recipients.wait(TIMEOUT_S)
    line = bytes(100_000)
    for _ in range(100):
        sink.put(line)

    gate.opened.set()
    assert sink.close(TIMEOUT_S)

    kept = sinks.MOST_BYTES // len(line)
    assert gate.lines == [b"first\n", *[line] * kept, b"lost %d\n" % (100 - kept)]


def test_a_full_disk_loses_lines_and_says_how_many(gate: Gate) -> None:
    """While nothing can be written lines are lost; the first one afterwards is the
    count.
    """
    sink = Sink(gate, lost_line)
    gate.opened.set()
    gate.full = True
    for _ in range(7):
        sink.put(b"gone\n")
    assert sink.flush(TIMEOUT_S)

    gate.full = False
    sink.put(b"here\n")
    assert sink.close(TIMEOUT_S)

    assert gate.lines == [b"lost 7\n", b"here\n"]


def test_the_count_does_not_wait_for_the_next_line(
    gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a quiet broker it is tried again by itself."""
    monkeypatch.setattr(sinks, "_TRY_AGAIN", 0.01)
    sink = Sink(gate, lost_line)
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
def test_closing_gives_up_in_time(gate: Gate) -> None:
    """Nobody reads: the end comes when the time is over, and what is put after it goes
    nowhere.
    """
    sink = Sink(gate, lost_line)
    sink.put(b"first\n")
    assert gate.recipients.wait(TIMEOUT_S)
    sink.put(b"second\n")
    began = monotonic()

    assert not sink.close(0.05)

    assert monotonic() - began < 5
    sink.put(b"third\n")
    gate.opened.set()


def test_closing_what_was_never_used_closes_it(gate: Gate) -> None:
    """No thread is begun for it."""
    sink = Sink(gate, lost_line)

    assert sink.close(1)
    assert gate.closed


def test_a_line_cut_short_is_finished_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that fills up within a line: its rest comes before the next one, so that
    no line is ever in another.
    """
    taken: list[bytes] = []
    room = 4

    def write(descriptor: int, data: bytes) -> int:
        nonlocal room
        if not room:
            raise OSError(errno.ENOSPC, "no space left")
        size = min(room, len(data))
        room -= size
        taken.append(bytes(data[:size]))
        return size

    monkeypatch.setattr(os, "write", write)
    # A number that is not in use: the end of an open file would be looked at.
    target = Descriptor(10_000)
    target.write(b"a line\n")
    for _ in range(2):
        with pytest.raises(OSError, match="no space"):
            target.write(b"lost\n")
    room = 100
    target.write(b"next\n")

    assert b"".join(taken) == b"a line\nnext\n"


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


def test_a_descriptor_that_others_made_non_blocking_is_waited_for() -> None:
    """Nothing is lost when it says that it would block; and it stays as it was."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    sink = Sink(Descriptor(writing, owned=True), lost_line)
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


def test_a_blocking_descriptor_stays_blocking() -> None:
    """Standard error may be shared with others, who do not expect it to say that it
    would block.
    """
    reading, writing = os.pipe()
    sink = Sink(Descriptor(writing, owned=True), lost_line)
    sink.put(b"line\n")
    assert os.read(reading, 100) == b"line\n"
    assert os.get_blocking(writing)
    sink.close(TIMEOUT_S)
    os.close(reading)


def test_a_stream_without_a_descriptor_is_written_as_text() -> None:
    """A program may keep its standard error in memory; one that it has closed loses
    lines.
    """
    stream = io.StringIO()
    target = of_stream(stream)
    target.write(b"line\n")
    assert stream.getvalue() == "line\n"
    assert isinstance(target, Text)
    stream.close()
    with pytest.raises(OSError, match="closed"):
        target.write(b"line\n")
    target.close()


def test_a_new_file_is_its_owners_alone(tmp_path: Path) -> None:
    """It is made with mode 0600 and appended to; the mode of one that is there stays."""
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


def test_the_journal_is_found_again(socket_dir: Path) -> None:
    """When it was started anew, entries reach the new one; while there is none, writing
    fails.
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
