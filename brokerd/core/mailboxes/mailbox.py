"""One mailbox: which of its messages are ready, delayed, held and dead.

Only a part of the messages is in memory. The ready messages in memory are those with
the lowest seqs: all others are on disk, and have seqs above ``loaded_to``. Of the
delayed messages, those that are due first are in memory, up to ``delayed_to``. Of dead
letters, only the number is known.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Iterable
from heapq import heapify, heappop, heappush
from math import inf
from typing import TYPE_CHECKING, Final

from brokerd.core.sink import KEY_SIZE, Sink
from brokerd.core.stored_message import Message, totals_of

if TYPE_CHECKING:
    from brokerd.config.values import MailboxConfig
    from brokerd.core.consumer import Consumer
    from brokerd.core.exchange import Client
    from brokerd.core.mailboxes.journal import Append, Contents, State
    from brokerd.core.session import Session

__all__ = ["Mailbox"]

#: Most ready messages, and bytes of these, that are read ahead or kept in memory; the
#: same for delayed ones. Held messages and those that a consumer returned come on top.
_MESSAGES: Final = 2000
_BYTES: Final = 1024 * 1024
#: A run is read when fewer ready messages than this are in memory.
_FEW: Final = 1000


class Mailbox(Sink):
    """The messages of one name.

    Attributes:
        client: The configured client, or None: the mailbox is orphaned.
        dead, dead_size: Dead letters and their bytes.
        delayed: Delayed messages, in memory or not.
        held: The consumer that holds each held message, by seq.
        consumers: By session.
        free: The consumers that may receive one more message; the first is the next.
        reserved: The consumer that receives nothing until it holds nothing, because a
            message is to be delivered to it alone.
        ready: Ready messages in memory without a failed attempt, in order.
        suspects: Heap of the others, with a failed attempt.
        unloaded: Ready messages that are only on disk.
        loaded_to: No message that is only on disk and ready has this seq or a lower one.
        ahead: Messages above ``loaded_to`` that were delayed, and have failed since: they
            are ready on disk, so a run may have them, and they are in memory, or not in
            the mailbox any more.
        unloaded_since: When the oldest of these was stored, at the latest.
        resting: Heap of messages that are delivered again later. On disk, each has the
            state that it had when it was returned.
        parked: Messages with an uncommitted change.
        returning: Those of them that will be ready; none after them is delivered before.
        leaving: Consumers that get nothing more, while what they held is being returned.
        restored: Messages that were held at an upgrade: runs may have them, and they are in
            memory, or not in the mailbox any more. One that is only on disk again is left out.
        reading, reading_delayed: Whether a run was asked of the store.
        run: Number of the runs that are asked for now; an earlier run is ignored.
        committed_to: The highest seq that is known to be on disk.
        scheduled_at: When a timer wakes this mailbox, or infinity.
        waiting: Senders held until the mailbox has room, in order.
        is_warned: Whether a warning about too many dead letters was logged.
    """

    __slots__ = (
        "_ready_size",
        "_soonest",
        "_timed",
        "_timed_size",
        "_woken_to",
        "ahead",
        "client",
        "committed_to",
        "consumers",
        "dead",
        "dead_size",
        "delayed",
        "delayed_to",
        "free",
        "held",
        "is_warned",
        "leaving",
        "loaded_to",
        "name",
        "parked",
        "reading",
        "reading_delayed",
        "ready",
        "reserved",
        "resting",
        "restored",
        "returning",
        "run",
        "scheduled_at",
        "suspects",
        "unloaded",
        "unloaded_delayed",
        "unloaded_since",
        "waiting",
    )

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.client: Client | None = None
        self.committed_to = 0
        self.scheduled_at = inf
        self.dead = self.dead_size = 0
        self.delayed = 0
        self.held: dict[int, Consumer] = {}
        self.consumers: dict[Session, Consumer] = {}
        self.free: dict[Consumer, None] = {}
        self.reserved: Consumer | None = None
        self.ready: deque[Message] = deque()
        self.suspects: list[Message] = []
        self._ready_size = 0
        self.unloaded = 0
        self.loaded_to = 0
        self.ahead: set[int] = set()
        self.unloaded_since: float | None = None
        self.resting: list[tuple[float, int, Message]] = []
        self.parked: dict[int, Message] = {}
        self.returning: set[int] = set()
        self.leaving: dict[Consumer, None] = {}
        self.restored: set[int] = set()
        #: The delayed messages in memory, in order.
        self._timed: list[tuple[float, int, Message]] = []
        self._timed_size = 0
        self.unloaded_delayed = 0
        self.delayed_to = (0.0, 0)
        #: The last delayed message that was made ready.
        self._woken_to = (0.0, 0)
        #: No delayed message that is only on disk is due before.
        self._soonest = 0.0
        self.reading = self.reading_delayed = False
        self.run = 0
        self.waiting: dict[Session, None] = {}
        self.is_warned = False

    def fill(self, contents: Contents) -> None:
        """Take over what the store has found on disk."""
        self.next_seq = contents.next_seq
        self.committed_to = contents.next_seq - 1
        self.messages = contents.ready + contents.delayed + contents.dead
        self.size = contents.ready_bytes + contents.delayed_bytes + contents.dead_bytes
        self.dead, self.dead_size = contents.dead, contents.dead_bytes
        self.delayed = self.unloaded_delayed = contents.delayed
        self._soonest = contents.next_due or 0.0
        self.keys = contents.keys
        self.unloaded = contents.ready
        self.unloaded_since = contents.oldest

    # Limits and counts

    @property
    def config(self) -> MailboxConfig | None:
        """Its configuration; None of an orphaned mailbox."""
        return None if self.client is None else self.client.config.mailbox

    @property
    def sessions(self) -> Iterable[Session]:
        """The connections of its client."""
        return () if self.client is None else self.client.sessions.values()

    def has_room(self, size: int, keys: int) -> bool:
        """Return whether one more message of ``size`` bytes and its keys fit."""
        config = self.config
        return (
            config is not None
            and self.messages < config.messages
            and self.size + size + (self.keys + keys) * KEY_SIZE <= config.size
        )

    def has_room_for_dead(self, size: int) -> bool:
        """Return whether one more dead letter of ``size`` bytes fits."""
        config = self.config
        if config is None or not config.dead:
            return config is None
        return not self.dead or (
            self.dead < config.messages * config.dead
            and self.dead_size + size <= config.size * config.dead
        )

    @property
    def ready_count(self) -> int:
        """Number of messages on disk that are neither held, delayed nor dead."""
        return self.messages - self.uncommitted - len(self.held) - self.delayed - self.dead

    def counts(self) -> dict[str, int]:
        """Return the number of messages by their state, for an answer."""
        return {
            "ready": self.ready_count,
            "held": len(self.held),
            "delayed": self.delayed,
            "dead": self.dead,
        }

    def oldest(self) -> float | None:
        """Return when the oldest message that is not dead was stored; None without one."""
        known = [message.stored_at for message in (*list(self.ready)[:1], *self.suspects[:1])]
        known += [
            min(message.stored_at for message in consumer.held.values())
            for consumer in (*self.consumers.values(), *self.leaving)
            if consumer.held
        ]
        known += [message.stored_at for _, _, message in (*self.resting, *self._timed)]
        known += [message.stored_at for message in self.parked.values()]
        if self.unloaded_since is not None and (self.unloaded or self.unloaded_delayed):
            known.append(self.unloaded_since)
        return min(known, default=None)

    # Ready messages

    def add(self, message: Message) -> None:
        """Add a message with a new seq that has just been committed."""
        self.committed_to = max(self.committed_to, message.seq)
        if message.is_dead:
            self.dead += 1
            self.dead_size += message.size
        elif message.due_at is not None:
            self.delay(message)
        elif message.seq < self.loaded_to:
            # A dead letter that was revived, behind newer messages of the same batch.
            self.put(message)
        elif self.unloaded or not self._has_memory(message.size):
            if not self.unloaded:
                self.unloaded_since = message.stored_at
            self.unloaded += 1
        else:
            self.loaded_to = message.seq
            self.put(message)

    def add_all(self, append: Append) -> None:
        """Add messages without a delay that have just been committed."""
        position = 0
        seq = append.first_seq
        for stored in append.messages:
            if self.unloaded or not self._has_memory(stored.size):
                break
            frame = append.frames[position : position + stored.size]
            self.loaded_to = seq
            self.put(Message(seq, frame, stored.stored_at, stored.expires_at))
            position += stored.size
            seq += 1
        end = append.first_seq + len(append.messages)
        self.committed_to = end - 1
        if seq < end and not self.unloaded:
            self.unloaded_since = stored.stored_at
        self.unloaded += end - seq

    @property
    def stop(self) -> float:
        """The first seq that is about to return: none behind it is delivered before."""
        first = min(self.returning, default=inf)
        return min([first, *(next(iter(consumer.held)) for consumer in self.leaving)])

    def put(self, message: Message) -> None:
        """Put a message among the ready ones in memory."""
        if message.attempts:
            heappush(self.suspects, message)
        elif not self.ready or self.ready[-1].seq < message.seq:
            self.ready.append(message)
        else:
            insort(self.ready, message)
        self._ready_size += message.size

    def put_again(self, message: Message) -> None:
        """Put a message back whose new state, ready, is on disk."""
        if message.seq > self.loaded_to:
            if self.unloaded:
                self.ahead.add(message.seq)
            else:
                # The next run begins behind it.
                self.loaded_to = message.seq
        self.put(message)

    def load(self, messages: list[Message], loaded_to: int) -> None:
        """Add the run of ready messages behind ``loaded_to``.

        Args:
            messages: The messages.
            loaded_to: The last seq of the run; 0 if it has no message.
        """
        self.reading = False
        if not loaded_to:
            self.unloaded = 0
            self.ahead.clear()
            return
        self.loaded_to = loaded_to
        if self.restored:
            messages = [message for message in messages if message.seq not in self.restored]
        if self.ahead:
            messages = [message for message in messages if message.seq not in self.ahead]
            self.ahead = {seq for seq in self.ahead if seq > loaded_to}
        self.unloaded -= len(messages)
        if messages:
            self.unloaded_since = messages[-1].stored_at
        # Their seqs are above those in memory, but for messages that were delayed.
        is_next = not self.ready or not messages or self.ready[-1] < messages[0]
        size, attempts = totals_of(messages)
        if is_next and not attempts:
            self.ready += messages
            self._ready_size += size
            return
        for message in messages:
            self.put(message)

    @property
    def wants_run(self) -> bool:
        """Whether further ready messages are to be read back."""
        return (
            bool(self.unloaded)
            and not self.reading
            and len(self.ready) < _FEW
            and self._has_memory(0)
        )

    def _has_memory(self, size: int) -> bool:
        count = len(self.ready) + len(self.suspects)
        return count < _MESSAGES and (not count or self._ready_size + size <= _BYTES)

    def first(self) -> Message | None:
        """Return the first ready message in memory without a failed attempt, or None."""
        return self.ready[0] if self.ready else None

    def first_suspect(self) -> Message | None:
        """Return the first ready message with a failed attempt, if it is next in order."""
        if not self.suspects:
            return None
        suspect = self.suspects[0]
        return suspect if not self.ready or suspect.seq < self.ready[0].seq else None

    def take(self, message: Message) -> None:
        """Remove a message that ``first`` or ``first_suspect`` returned."""
        if message.attempts:
            heappop(self.suspects)
        else:
            self.ready.popleft()
        self._ready_size -= message.size

    def take_run(self, count: int, size: int) -> None:
        """Remove the first ready messages without a failed attempt; size: their bytes."""
        for _ in range(count):
            self.ready.popleft()
        self._ready_size -= size

    # Delayed messages

    def rest(self, message: Message, due_at: float) -> None:
        """Keep a message in memory until ``due_at``, which is not written to the disk."""
        self.delayed += 1
        message.due_at = due_at
        heappush(self.resting, (due_at, message.seq, message))

    def delay(self, message: Message) -> None:
        """Add a delayed message, which is on disk with its ``due_at``."""
        self.delayed += 1
        message.is_timed = True
        assert message.due_at is not None
        if self.unloaded_delayed and (message.due_at, message.seq) > self.delayed_to:
            self._note_unloaded_delayed(message)
        else:
            self._keep(message)

    def load_delayed(self, messages: list[Message], *, is_end: bool) -> None:
        """Add the run of delayed messages behind ``delayed_to``.

        is_end: there are none, not even damaged ones.
        """
        self.reading_delayed = False
        if is_end:
            self.unloaded_delayed = 0
        if not messages:
            return
        due_at = messages[-1].due_at
        assert due_at is not None
        self.delayed_to = due_at, messages[-1].seq
        self._soonest = due_at
        for message in messages:
            if message.seq not in self.restored:
                self.unloaded_delayed -= 1
                self._keep(message)

    def _keep(self, message: Message) -> None:
        """Keep a delayed message in memory, or one that is due later instead of it."""
        assert message.due_at is not None
        insort(self._timed, (message.due_at, message.seq, message))
        self._timed_size += message.size
        if not self.reading_delayed:
            self._unload_delayed()

    def _unload_delayed(self) -> None:
        """Forget the delayed messages that are due last, if there are too many in memory."""
        while len(self._timed) > 1 and (len(self._timed) > _MESSAGES or self._timed_size > _BYTES):
            due_at, seq, last = self._timed[-1]
            if (due_at, seq) <= self._woken_to:
                # A run behind ``delayed_to`` must not have a message that is in memory.
                break
            self._timed.pop()
            self._timed_size -= last.size
            self._note_unloaded_delayed(last)
            self.delayed_to = max(self._woken_to, self._timed[-1][:2])

    def _note_unloaded_delayed(self, message: Message) -> None:
        assert message.due_at is not None
        if not self.unloaded_delayed or message.due_at < self._soonest:
            self._soonest = message.due_at
        self.unloaded_delayed += 1
        # A run is to have it from now on.
        self.restored.discard(message.seq)

    def wake(self, now_wall: float) -> bool:
        """Make the messages ready that are due; return whether there were any."""
        woken = False
        while self.resting and self.resting[0][0] <= now_wall:
            self._wake(heappop(self.resting)[2])
            woken = True
        count = 0
        while count < len(self._timed) and self._timed[count][0] <= now_wall:
            due_at, seq, message = self._timed[count]
            self._woken_to = max(self._woken_to, (due_at, seq))
            self._timed_size -= message.size
            self._wake(message)
            count += 1
        del self._timed[:count]
        return woken or count > 0

    def _wake(self, message: Message) -> None:
        self.delayed -= 1
        message.due_at = None
        self.put(message)

    def wants_delayed(self, now_wall: float) -> bool:
        """Whether delayed messages are to be read back."""
        return (
            bool(self.unloaded_delayed)
            and not self.reading_delayed
            and self._soonest <= now_wall
            and self._has_memory(0)
        )

    @property
    def next_due(self) -> float | None:
        """When ``wake`` or ``wants_delayed`` has something to do; None without that."""
        due = [entry[0] for entry in (*self.resting[:1], *self._timed[:1])]
        if self.unloaded_delayed and not self.reading_delayed and self._has_memory(0):
            due.append(self._soonest)
        return min(due, default=None)

    @property
    def delayed_on_disk(self) -> int:
        """Number of messages that are delayed on disk, and not held."""
        elsewhere = (*self.ready, *self.suspects, *(message for _, _, message in self.resting))
        return (
            len(self._timed)
            + self.unloaded_delayed
            + sum(message.is_timed for message in elsewhere)
        )

    # Damaged messages

    def bury(self, messages: Iterable[tuple[int, float | None, int]]) -> None:
        """Count messages as dead letters that are damaged on disk.

        Those in memory are delivered all the same.

        messages: as in ``Buried``.
        """
        in_memory = self._in_memory()
        for seq, due_at, size in messages:
            if seq in in_memory:
                continue
            is_unloaded = self._is_unloaded(seq, due_at)
            if due_at is None:
                self.unloaded -= is_unloaded
            else:
                self.unloaded_delayed -= is_unloaded
                self.delayed -= is_unloaded
            # The others were acknowledged, which is not on disk yet.
            if is_unloaded:
                self.dead += 1
                self.dead_size += size

    def _in_memory(self) -> set[int]:
        """Return the seqs of the messages in memory, and of those held at an upgrade."""
        seqs = {message.seq for message in (*self.ready, *self.suspects)}
        seqs.update(seq for _, seq, _ in (*self.resting, *self._timed))
        return seqs.union(self.held, self.parked, self.restored, self.ahead)

    # Uncommitted changes

    def park(self, message: Message, state: State) -> None:
        """Keep a message apart until its new state is on disk."""
        self.parked[message.seq] = message
        if state == "ready":
            self.returning.add(message.seq)

    def unpark(self, seq: int) -> bool:
        """Forget a message that was parked; return whether it was."""
        self.returning.discard(seq)
        return self.parked.pop(seq, None) is not None

    # Removal

    def discard(self, seq: int, state: State, due_at: float | None) -> bool:
        """Remove a message that is not held; return whether it was still in the mailbox.

        state, due_at: on disk; the state is ``ready`` or ``delayed``.
        """
        self._forget_runs()
        parked = self.parked.get(seq)
        if parked is not None:
            if parked.due_at is None and seq not in self.returning:
                # It was about to be a dead letter.
                self.dead -= 1
                self.dead_size -= parked.size
            self.unpark(seq)
            return True
        for messages in (self.ready, self.suspects):
            for message in [message for message in messages if message.seq == seq]:
                messages.remove(message)
                heapify(self.suspects)
                self._ready_size -= message.size
                return True
        for timed in (self.resting, self._timed):
            for entry in [entry for entry in timed if entry[1] == seq]:
                timed.remove(entry)
                self.delayed -= 1
                if timed is self._timed:
                    self._timed_size -= entry[2].size
                heapify(self.resting)
                return True
        if seq in self.restored or seq in self.ahead or not self._is_unloaded(seq, due_at):
            # It was processed, and that is not on disk yet.
            return False
        if state == "ready":
            self.unloaded -= 1
        else:
            self.unloaded_delayed -= 1
            self.delayed -= 1
        return True

    def _is_unloaded(self, seq: int, due_at: float | None) -> bool:
        """Return whether a message that is not in memory is among those only on disk.

        due_at: on disk; None if it is ready there.
        """
        if due_at is None:
            return self.unloaded > 0 and seq > self.loaded_to
        return self.unloaded_delayed > 0 and (due_at, seq) > self.delayed_to

    def empty(self, state: State) -> None:
        """Forget all messages of one state, which are being removed from the disk."""
        self._forget_runs()
        if state == "ready":
            self._keep_resting(timed=True)
            self._keep_ready(timed=True)
            self.unloaded = 0
            self.ahead.clear()
            self.loaded_to = self.committed_to
        elif state == "delayed":
            self._keep_resting(timed=False)
            self._keep_ready(timed=False)
            self.delayed -= len(self._timed) + self.unloaded_delayed
            self._timed, self._timed_size, self.unloaded_delayed = [], 0, 0

    def _keep_resting(self, *, timed: bool) -> None:
        """Keep the resting messages that are delayed on disk, or the others."""
        self.delayed -= len(self.resting)
        self.resting = [entry for entry in self.resting if entry[2].is_timed == timed]
        heapify(self.resting)
        self.delayed += len(self.resting)

    def _keep_ready(self, *, timed: bool) -> None:
        """Keep the ready messages in memory that are delayed on disk, or the others."""
        self.ready = deque(message for message in self.ready if message.is_timed == timed)
        self.suspects = [message for message in self.suspects if message.is_timed == timed]
        heapify(self.suspects)
        self._ready_size = sum(message.size for message in (*self.ready, *self.suspects))

    def _forget_runs(self) -> None:
        """Ignore the runs on their way, which may have messages that are removed."""
        self.run += 1
        self.reading = self.reading_delayed = False

    @property
    def has_timeout(self) -> bool:
        """Whether held messages are returned after some time."""
        return self.config is not None and self.config.ack_timeout is not None

    def next_timeout(self, now: float) -> float | None:
        """Return the seconds until ``ack_timeout`` returns the first held message."""
        config = self.config
        if config is None or config.ack_timeout is None or not self.held:
            return None
        oldest = [
            next(iter(consumer.held.values())).held_since
            for consumer in self.consumers.values()
            if consumer.held
        ]
        # What a consumer that has left held is being returned anyway.
        return min(oldest) + config.ack_timeout - now if oldest else None
