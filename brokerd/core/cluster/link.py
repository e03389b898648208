"""The link to one other host: whether it answers, and the batches in both directions.

A link is up when each host knows the names of the other and answers its pings. The
batches of one direction belong to a generation, which ends when their origin gives the
owner up. The owner then ends the link, too. So both hosts agree on what was lost.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, Final

from brokerd.core.cluster.blob import Blob
from brokerd.core.cluster.directory import Changes, HostDirectory
from brokerd.core.cluster.hub import Hub
from brokerd.core.cluster.messages import (
    HEAD_SIZE,
    RUN_OVERHEAD,
    Answer,
    Bytes,
    Data,
    Inquiry,
    Outcomes,
    Ping,
    Pong,
    Ranges,
    bytes_of,
    frames_of,
    pack,
    size_of,
)
from brokerd.core.cluster.received import ReceivedBatches
from brokerd.core.cluster.seam import HostFacts, Run
from brokerd.core.cluster.sent import SentBatch, SentBatches, Unanswered
from brokerd_client.wire.envelope import ErrorCode

__all__ = ["FORGET_S", "STEPS", "Link"]

#: Seconds without contact after which the outcomes for a host are forgotten.
FORGET_S: Final = 120.0
#: Frames of a lost link that are reported in one turn: some milliseconds' work.
STEPS: Final = 256
#: Most ranges of batches in one message of outcomes, and room for them, in bytes.
_RANGES: Final = 64
_RANGES_SIZE: Final = 16 * 2 * _RANGES


class Link:
    """The link to one broker on another host.

    Attributes:
        facts: Of the other host.
        host: Its name.
        boot: Its boot id as a number.
        head: What its messages to this host begin with.
        is_up: Whether frames are exchanged.
        changed_at: When it came up or went away, in seconds since the epoch.
        contact_at: When a message came from it last.
        round_trip: Seconds from a ping to its pong; None before the first pong.
        in_doubt, refused: Frames that this host reported as in_doubt, or as offline
            although it had sent them.
        last_error: Why it went away the last time, or "".
        is_malformed: Whether a message that can't be read has been logged.
        unsent: Frames that the earlier process of this broker has left; they leave first.
        is_held: Whether the other host has asked to be sent nothing until its next ping.
        is_ready: Whether it has agreed to the same.
    """

    __slots__ = (
        "_asked_state_at",
        "_ending",
        "_forgotten",
        "_generation",
        "_heard_at",
        "_hub",
        "_is_full",
        "_leaving",
        "_leaving_doubts",
        "_leaving_reason",
        "_misses_outcomes",
        "_own_head",
        "boot",
        "changed_at",
        "contact_at",
        "directory",
        "facts",
        "head",
        "host",
        "in_doubt",
        "is_held",
        "is_malformed",
        "is_ready",
        "is_up",
        "last_error",
        "received",
        "refused",
        "round_trip",
        "sent",
        "unsent",
    )

    def __init__(self, hub: Hub, facts: HostFacts) -> None:
        self._hub = hub
        self.facts = facts
        self.host = facts.host
        self.boot = int(facts.boot_id, 16)
        self.head = pack(self.boot, hub.boot, ())
        self._own_head = pack(hub.boot, self.boot, ())
        self.directory = HostDirectory()
        self.is_up = False
        self.changed_at = hub.now_wall
        self.round_trip: float | None = None
        self.in_doubt = self.refused = 0
        self.last_error = ""
        self.is_malformed = False
        # Generations of an earlier link between the same two boots must not come again.
        self._generation = int(hub.now_wall * 1000)
        self.sent = SentBatches(hub.timeout - hub.beat)
        self.received = ReceivedBatches(0)
        self._heard_at = self.contact_at = hub.now
        #: A generation of the other host that has been forgotten.
        self._forgotten = 0
        self._asked_state_at: float | None = None
        #: Why the link ends once all batches are answered, or "".
        self._ending = ""
        self._is_full = False
        self._misses_outcomes = False
        #: The frames to report before the link has ended; None while it has not to end.
        self._leaving: Iterator[Unanswered | None] | None = None
        self._leaving_reason = ""
        self._leaving_doubts = 0
        self.unsent: deque[Run] = deque()
        self.is_held = self.is_ready = False

    def _send(self, kind: str, pieces: Iterable[Bytes | bytearray]) -> bytes:
        message = b"".join((self._own_head, *pieces))
        self._hub.repeat(self.host, kind, message)
        return message

    # Frames and outcomes

    def fill(self) -> None:
        """Send what waits for the host, as far as the window has room."""
        if self.is_held or self._hub.is_holding:
            return
        hub, received = self._hub, self.received
        runs = hub.remotes.take_outcomes(self.host)
        if runs or not received.can_wait(hub.now, hub.unanswered // 8):
            self._send_outcomes(runs)
        if self.pull() and received.is_gathered(hub.now):
            # These go with the frames.
            self._send_outcomes(())

    def pull(self) -> bool:
        """Send the frames that wait for the host, as far as the window has room.

        Return whether there were any.
        """
        hub = self._hub
        if not self.is_up or self._ending or self.is_leaving or not hub.is_connected:
            return False
        if self.is_held or hub.is_holding:
            return False
        limit, before = hub.max_payload - HEAD_SIZE, len(hub.outgoing)
        while (room := self.sent.room(hub.unanswered)) > 0:
            take = self._take_unsent if self.unsent else hub.remotes.take_frames
            runs = take(self.host, room)
            if not runs:
                break
            too_large: list[Unanswered] = []
            for group in _grouped(runs, limit, too_large):
                batch = self.sent.add(group, hub.now)
                confirms = self.sent.last_outcomes
                self._send("data", Data(self._generation, batch.number, confirms, group).encode())
                self.sent.unconfirmed = 0
            if too_large:
                reason = f"a message to another host has at most {limit} bytes, NATS' max_payload"
                self._fail(too_large, ErrorCode.TOO_LARGE, reason)
            if bytes_of(runs) < room:
                # That was all.
                break
        else:
            self._is_full = True
        return len(hub.outgoing) > before

    def _take_unsent(self, host: str, room: int) -> list[Run]:
        """Remove and return frames that the earlier process has left, and others behind them."""
        runs = []
        while self.unsent and room > 0:
            runs.append(self.unsent.popleft())
            room -= len(runs[-1].frames)
        return [*runs, *self._hub.remotes.take_frames(host, room)]

    def fail_unsent(self, reason: str) -> None:
        """Report the frames that the earlier process has left: they can't leave."""
        unsent, self.unsent = self.unsent, deque()
        frames = ((run.target, frame) for run in unsent for frame in frames_of(run))
        self._fail(frames, ErrorCode.OFFLINE, reason)

    # Another process of this broker, or of the other host's

    def hold(self) -> None:
        """Send what can leave, and ask the host to send nothing more."""
        self._hub.touch(self.host)
        self.fill()
        self.is_ready = False
        self._send("hold", ())

    def receive_hold(self) -> None:
        """Send nothing more until the next ping; all before arrives before the answer."""
        self.is_held = True
        self._send("held", ())

    def receive_held(self) -> None:
        """Note that the host sends nothing more."""
        self.is_ready = True

    def repeat_outcomes(self) -> None:
        """Send the outcomes that may not have left before another process took over.

        So a REPLY from here does not overtake the RECEIPT of its request.
        """
        for message in self.received.messages():
            self._hub.repeat(self.host, "outcomes", message)

    def keep_outcomes(self) -> None:
        """Make outcomes of all answers, and keep them until the host asks for them."""
        self._send_all_outcomes()

    def capture(self, blob: Blob) -> dict[str, Any]:
        """Return the facts for a new process; all bytes are added to ``blob``."""
        directory = self.directory
        return {
            "facts": list(self.facts),
            "number": directory.number,
            "names": [list(name) for name in directory.names.values()],
            "interests": [list(interest) for interest in directory.interests.values()],
            "up": self.is_up,
            "changed_at": self.changed_at,
            "in_doubt": self.in_doubt,
            "refused": self.refused,
            "last_error": self.last_error,
            "ending": self._ending,
            "generation": self._generation,
            "forgotten": self._forgotten,
            "sent": self.sent.capture(blob),
            "received": self.received.capture(blob),
            "unsent": blob.put_runs(list(self.unsent)),
        }

    def restore(self, facts: dict[str, Any], blob: Blob) -> None:
        """Go on with the link of another process."""
        self.directory.restore(facts)
        self.is_up = bool(facts["up"])
        self.changed_at = float(facts["changed_at"])
        self.in_doubt, self.refused = int(facts["in_doubt"]), int(facts["refused"])
        self.last_error, self._ending = str(facts["last_error"]), str(facts["ending"])
        self._generation, self._forgotten = int(facts["generation"]), int(facts["forgotten"])
        self.sent.restore(facts["sent"], blob, self._hub.now)
        self.received = ReceivedBatches(int(facts["received"]["generation"]))
        self.received.restore(facts["received"], blob)
        self.unsent.extend(blob.take_runs(facts["unsent"]))

    def _send_all_outcomes(self) -> None:
        """Send the outcomes that wait, and then which batches are done or never seen."""
        self._send_outcomes(self._hub.remotes.take_outcomes(self.host))

    def _send_outcomes(self, runs: Sequence[Run]) -> None:
        """Send outcomes, and then which batches are done or never seen."""
        received = self.received
        if not (runs or received.has_news) or not received.generation:
            return
        limit = self._hub.max_payload - HEAD_SIZE - _RANGES_SIZE
        groups = _grouped(runs, limit, [])
        done, never = received.take_news()
        if len(groups) < 2 and len(done) <= _RANGES and len(never) <= _RANGES:
            self._send_outcome_message(done, never, groups[0] if groups else ())
            return
        # The last group comes with the batches that are done: their outcomes come first.
        for group in groups[:-1]:
            self._send_outcome_message((), (), group)
        last: Sequence[Run] = groups[-1] if groups else ()
        self._send_outcome_message(done[:_RANGES], never[:_RANGES], last)
        for start in range(_RANGES, max(len(done), len(never)), _RANGES):
            end = start + _RANGES
            self._send_outcome_message(done[start:end], never[start:end], ())

    def tell_soon(self) -> None:
        """Send the news at once, or with a later message if they can wait for one."""
        hub = self._hub
        if self.received.can_wait(hub.now, hub.unanswered // 8):
            hub.postpone(self.received.wait_until)
        else:
            hub.touch(self.host)

    def _send_outcome_message(self, done: Ranges, never: Ranges, runs: Sequence[Run]) -> None:
        received = self.received
        received.last_outcomes += 1
        outcomes = Outcomes(received.generation, received.last_outcomes, done, never, runs)
        received.keep(self._send("outcomes", outcomes.encode()), self._hub.unanswered)

    def receive_data(self, data: Data, size: int) -> None:
        """Deliver the frames of a batch, unless it was refused or received before.

        size: bytes of its message.
        """
        self._note_generation(data.generation)
        received = self.received
        # After this host has given the other one up, that one may not know it yet.
        if data.generation != received.generation or not self.is_up or self.is_leaving:
            return
        received.confirm(data.confirms)
        if not received.accept(data.number, size):
            return
        self._hub.remotes.deliver(self.host, data.number, data.runs, self._hub.now)
        if received.never:
            self._hub.touch(self.host)

    def finish(self, batch: int) -> None:
        """Note that no frame of a received batch waits any more."""
        if self.received.finish(batch, self._hub.now):
            self.tell_soon()

    def receive_outcomes(self, outcomes: Outcomes, size: int) -> None:
        """Take outcomes of this host's frames. size: bytes of their message."""
        sent = self.sent
        if outcomes.generation != self._generation or outcomes.number <= sent.last_outcomes:
            return
        self._hear()
        if sent.misses(outcomes.number):
            self._ask_for_outcomes()
            return
        never = sent.receive(outcomes, size)
        if outcomes.runs:
            self._hub.remotes.conclude(self.host, outcomes.runs, self._hub.now)
        if never:
            self._fail(_frames(never), ErrorCode.OFFLINE, f"host {self.host} did not receive it")
        if sent.unconfirmed > self._hub.unanswered // 4:
            self._ping()
        self._go_on()

    def _go_on(self) -> None:
        """End the link if that waited for answers; otherwise use the room in the window."""
        if self._ending and not self.sent.batches:
            self.lose(self._ending)
        elif self._is_full:
            self._is_full = False
            self._hub.touch(self.host)

    def _fail(self, frames: Iterable[Unanswered], code: ErrorCode, reason: str) -> None:
        """Report frames that were not accepted, or may not have been."""
        hub, count = self._hub, 0
        for target, frame in frames:
            hub.remotes.fail(self.host, target, frame, code, reason, hub.now)
            count += 1
        if code is ErrorCode.IN_DOUBT:
            self.in_doubt += count
        else:
            self.refused += count

    # Inquiries

    def _inquire(self) -> None:
        inquiry = self.sent.inquiry(
            self._generation, self._hub.now, is_missing=self._misses_outcomes
        )
        if inquiry is not None and self._hub.is_connected:
            self._send("inquiry", inquiry.encode())

    def _ask_for_outcomes(self) -> None:
        """Ask for outcomes that are known to be missing, once until the answer."""
        if not self._misses_outcomes:
            self._misses_outcomes = True
            self.sent.ask_now()
            self._inquire()

    def receive_inquiry(self, inquiry: Inquiry) -> None:
        """Repeat the outcomes that the origin misses, and answer."""
        self._note_generation(inquiry.generation)
        received = self.received
        if inquiry.generation != received.generation:
            return
        received.confirm(inquiry.last_outcomes)
        if inquiry.batches:
            received.skip_to(inquiry.batches[-1] + 1)
        self.repeat_outcomes()
        self._send_all_outcomes()
        pending = [number for number in inquiry.batches if number in received.pending]
        first = received.first_outcomes
        last = received.last_outcomes
        answer = Answer(received.generation, inquiry.number, first, last, pending)
        self._send("answer", answer.encode())

    def receive_answer(self, answer: Answer) -> None:
        """Take the answer to an inquiry; the outcomes came before it."""
        if answer.generation != self._generation:
            return
        self._hear()
        if self.sent.misses(answer.first_outcomes):
            self.lose(f"host {self.host} has forgotten outcomes")
            return
        unknown = self.sent.answered(answer, self._hub.now)
        self._misses_outcomes = self.sent.misses(answer.last_outcomes + 1)
        reason = f"host {self.host} does not know any more what became of it"
        frames = self.sent.frames_without_outcome(unknown)
        self._fail(filter(None, frames), ErrorCode.IN_DOUBT, reason)
        self._go_on()

    # Liveness

    def beat(self) -> None:
        """Ping the host; end the link if the host has been silent for too long."""
        hub = self._hub
        if self.sent.is_lost(hub.now):
            self.lose(f"no answer to a batch in {hub.timeout:g} s")
        elif self.is_up and self._heard_at + hub.timeout <= hub.now:
            self.lose(f"not heard for {hub.timeout:g} s")
        if self.contact_at + FORGET_S <= hub.now and self.received.generation:
            self._forgotten = self.received.generation
            self.received = ReceivedBatches(0)
        self._ping()
        self._inquire()
        if self.directory.number is None:
            self._ask_state()

    @property
    def is_silent(self) -> bool:
        """Whether the other broker may have ended: nothing came from it for too long."""
        return self.contact_at + self._hub.timeout <= self._hub.now

    def excuse(self, seconds: float) -> None:
        """Do not count the time in which this process did not run."""
        self._heard_at += seconds
        self.contact_at += seconds
        self.sent.excuse(seconds)

    def _hear(self) -> None:
        self._heard_at = self.contact_at = self._hub.now

    def _ping(self) -> None:
        self.sent.unconfirmed = 0
        stamp = int(self._hub.now * 1e9)
        self._send("ping", Ping(self._generation, self.sent.last_outcomes, stamp).encode())

    def receive_ping(self, ping: Ping) -> None:
        """Answer a ping."""
        if self.is_held:
            self.is_held = False
            self._hub.touch(self.host)
        self._note_generation(ping.generation)
        if ping.generation < self.received.generation:
            # It was on its way while the other host has begun again.
            return
        is_known = ping.generation == self.received.generation
        if is_known:
            self.received.confirm(ping.confirms)
        self._pong(self.received.generation if is_known else 0, ping.stamp)

    def _pong(self, generation: int, stamp: int) -> None:
        """Answer a ping, or say that this host is ready now: stamp 0."""
        is_ready, last = self.directory.number is not None, self.received.last_outcomes
        self._send("pong", Pong(generation, self._generation, last, stamp, is_ready).encode())

    def receive_pong(self, pong: Pong) -> None:
        """Take the answer to a ping; the link may come up."""
        self._note_generation(pong.own_generation)
        hub = self._hub
        if pong.stamp:
            self.round_trip = hub.now - pong.stamp / 1e9
        if pong.generation != self._generation:
            if self.is_up and not pong.generation:
                self.lose(f"host {self.host} has forgotten this one")
            return
        self._hear()
        if pong.last_outcomes > self.sent.last_outcomes:
            self._ask_for_outcomes()
        is_ready = pong.is_ready and self.directory.number is not None
        if is_ready and not self.is_up and not self.is_leaving:
            self._come_up()

    def _come_up(self) -> None:
        hub = self._hub
        hub.needs_settling = self.is_up = True
        self._hear()
        self.changed_at = hub.now_wall
        hub.note("info", "cluster.host_found", host=self.host, version=self.facts.version)
        # The other host comes up before the first frames from here arrive.
        self._pong(self.received.generation, 0)
        hub.remotes.host_up(self.facts, hub.now_wall)
        names = list(self.directory.names.values())
        self._pass_on(Changes(names, list(self.directory.interests.values())))
        hub.touch(self.host)

    def _note_generation(self, generation: int) -> None:
        """Begin a generation of the other host's batches, if it is a new one."""
        if generation <= max(self.received.generation, self._forgotten):
            return
        if self.is_up and self.received.generation:
            # The other host has given this one up. What it knows of this host's batches
            # is asked first.
            self._ending = self._ending or f"host {self.host} had lost this one"
            if self.sent.batches:
                self.sent.ask_now()
                self._inquire()
                return
            self.lose(self._ending)
        self.received = ReceivedBatches(generation)

    @property
    def is_leaving(self) -> bool:
        """Whether frames are still to be reported before the link has ended."""
        return self._leaving is not None

    def lose(self, reason: str) -> None:
        """End the link: report what has no outcome, and the host's clients are offline.

        There may be hundreds of thousands of frames: :meth:`run` goes on with the rest.
        """
        self._hub.needs_settling = True
        if self.is_leaving:
            return
        hub, sent = self._hub, self.sent
        self._generation += 1
        self.sent = SentBatches(hub.timeout - hub.beat)
        self._ending, self._is_full, self._misses_outcomes = "", False, False
        self._leaving = sent.frames_without_outcome(sent.batches.values())
        self._leaving_reason = reason
        self._leaving_doubts = self.in_doubt
        if not self.run(STEPS):
            hub.continue_later(self.run)

    def run(self, steps: int | None) -> bool:
        """Report some frames of a link that ends; return whether it has ended.

        steps: limits the work, None for no limit.
        """
        assert self._leaving is not None
        some = list(islice(self._leaving, steps))
        text = f"host {self.host} was lost before it answered: {self._leaving_reason}"
        self._fail(filter(None, some), ErrorCode.IN_DOUBT, text)
        if len(some) == steps:
            return False
        self._leaving = None
        if self.is_up:
            self._go_down(self._leaving_reason)
        return True

    def _go_down(self, reason: str) -> None:
        hub = self._hub
        self.is_up = False
        self.last_error = reason
        self.changed_at = hub.now_wall
        in_doubt = self.in_doubt - self._leaving_doubts
        hub.note("warning", "cluster.host_lost", host=self.host, reason=reason, in_doubt=in_doubt)
        self.fail_unsent(reason)
        # What became of the other host's frames is kept for its inquiry.
        self._send_all_outcomes()
        hub.remotes.host_down(self.host, reason, hub.now_wall)
        self._send_all_outcomes()

    def resume(self) -> None:
        """Ask for what was lost while NATS was away."""
        self.sent.ask_now()
        self._ping()
        self._inquire()
        if self.directory.number is None:
            self._asked_state_at = None
            self._ask_state()
        if self.is_up:
            self._hub.touch(self.host)

    # Names and interests

    def receive_hello(self, facts: HostFacts, number: int) -> None:
        """Take the facts of the host, and the number of its last changes."""
        self.facts = facts
        if self.directory.misses(number):
            self._ask_state()

    def receive_changes(self, body: dict[str, Any]) -> None:
        """Take changes of names and interests."""
        changes = self.directory.change(body)
        if changes is None:
            self._ask_state()
        else:
            self._pass_on(changes)

    def receive_state(self, body: dict[str, Any]) -> None:
        """Take a part of all names and interests."""
        was_known = self.directory.number is not None
        changes = self.directory.take_part(body)
        if changes is None:
            return
        self._asked_state_at = None
        self._pass_on(changes)
        if not was_known:
            self._ping()
            self._pong(self.received.generation, 0)

    def _ask_state(self) -> None:
        hub = self._hub
        if self._asked_state_at is None or self._asked_state_at + hub.beat <= hub.now:
            self._asked_state_at = hub.now
            self._send("ask", ())

    def _pass_on(self, changes: Changes) -> None:
        if not self.is_up:
            return
        if changes.names:
            self._hub.remotes.names_changed(self.host, changes.names, self._hub.now_wall)
        if changes.interests:
            self._hub.remotes.interests_changed(self.host, changes.interests)

    def show(self) -> dict[str, Any]:
        """Return what is known of the host, for operators."""
        round_trip = self.round_trip
        return {
            "host": self.host,
            "state": "up" if self.is_up else "away" if self.last_error else "joining",
            "since": self.changed_at,
            "round_trip_ms": None if round_trip is None else round(round_trip * 1000, 3),
            "in_flight": self.sent.in_flight,
            "batches": len(self.sent.batches),
            "in_doubt": self.in_doubt,
            "refused": self.refused,
            "last_error": self.last_error,
            "digest": self.facts.digest,
            "version": self.facts.version,
            "boot_id": self.facts.boot_id,
            "addresses": list(self.facts.addresses),
            "names": len(self.directory.names),
        }


def _frames(batches: Iterable[SentBatch]) -> Iterator[Unanswered]:
    """Yield all frames of batches."""
    for batch in batches:
        for run in batch.runs:
            for frame in frames_of(run):
                yield run.target, frame


def _grouped(
    runs: Sequence[Run], limit: int, too_large: list[Unanswered]
) -> Sequence[Sequence[Run]]:
    """Return the runs in groups of at most ``limit`` bytes; cut those that are longer.

    too_large: gets the frames that are longer than that alone.
    """
    if sum(map(size_of, runs)) <= limit:
        return (runs,) if runs else ()
    groups: list[list[Run]] = []
    group: list[Run] = []
    size = 0
    for run in _cut(runs, limit, too_large):
        run_size = size_of(run)
        if group and size + run_size > limit:
            groups.append(group)
            group, size = [], 0
        group.append(run)
        size += run_size
    if group:
        groups.append(group)
    return groups


def _cut(runs: Iterable[Run], limit: int, too_large: list[Unanswered]) -> Iterator[Run]:
    """Yield the runs, those that are longer than ``limit`` in pieces."""
    for run in runs:
        if size_of(run) <= limit:
            yield run
            continue
        room = limit - RUN_OVERHEAD - len(run.target.encode())
        piece = bytearray()
        for frame in frames_of(run):
            if len(frame) > room:
                too_large.append((run.target, frame))
                continue
            if len(piece) + len(frame) > room:
                yield run._replace(frames=piece)
                piece = bytearray()
            piece += frame
        if piece:
            yield run._replace(frames=piece)
