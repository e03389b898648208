"""Validation of a snapshot's facts, before any object is created from them.

Another process wrote the facts, maybe another version of the program. A broker made
from inconsistent facts might answer for half of its messages. It might also end in the
middle of a frame. So such facts are refused, and the old process continues to serve.
Unknown keys are ignored. Of the bytes, only the lengths of the frames are checked.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, Final, TypeAlias

from brokerd_client.errors import BadLength, InvalidName
from brokerd_client.wire.envelope import check_pattern
from brokerd_client.wire.framing import LENGTH, frame_span

__all__ = [
    "FLAGS",
    "BadSnapshot",
    "check",
    "check_block",
    "check_clients",
    "check_counters",
    "check_counts",
    "check_frames",
    "check_idle",
    "check_incidents",
    "check_numbers",
    "marked_places",
]

Check: TypeAlias = Callable[[Any, str], None]

#: All bits that the flags of a queued frame may have.
FLAGS: Final = 0xF
_KEPT: Final = 8
_PREFIX: Final = LENGTH.size
#: Bytes of the smallest frame: its length and its header.
_LEAST_FRAME: Final = 16
#: Largest counter in a snapshot. The counters continue from there, in 63 bits.
_MOST: Final = 2**62
#: Most seconds per frame that may be left of its ttl, or have passed since its end.
_LONGEST: Final = 2**33
_MOST_ID: Final = 2**64 - 1


class BadSnapshot(ValueError):
    """Facts that ``capture`` did not write; the message names the place and the valid
    values.
    """


def _refuse(path: str, expected: str, value: object) -> None:
    raise BadSnapshot(f"{path} is {value!r:.60}, and has to be {expected}")


def _number(value: Any, path: str) -> None:
    if type(value) not in (int, float) or not math.isfinite(value):
        _refuse(path, "a number", value)


def _seconds(value: Any, path: str) -> None:
    _number(value, path)
    if abs(value) > _LONGEST:
        _refuse(path, "a number of seconds that a ttl can have", value)


def _count(value: Any, path: str) -> None:
    if type(value) is not int or not 0 <= value <= _MOST:
        _refuse(path, "a whole number from 0 on", value)


def _id(value: Any, path: str) -> None:
    if type(value) is not int or not 0 <= value <= _MOST_ID:
        _refuse(path, "an unsigned 64-bit number", value)


def _text(value: Any, path: str) -> None:
    if type(value) is not str or not value.isascii():
        _refuse(path, "ASCII text", value)


def _any_text(value: Any, path: str) -> None:
    if type(value) is not str:
        _refuse(path, "text", value)


def _flag(value: Any, path: str) -> None:
    if type(value) is not bool:
        _refuse(path, "true or false", value)


def _pattern(value: Any, path: str) -> None:
    _any_text(value, path)
    try:
        check_pattern(value)
    except InvalidName:
        _refuse(path, "a topic pattern", value)


def _own_topic(value: Any, path: str) -> None:
    _pattern(value, path)
    if not value.startswith("$"):
        _refuse(path, "a topic of the broker's own", value)


def _long_operation(value: Any, path: str) -> None:
    if value not in ("clients", "stats", "connections", "channels", "mailboxes"):
        _refuse(path, "an operation with a long answer", value)


def _queue(value: Any, path: str) -> None:
    if type(value) is not list:
        _refuse(path, "a list", value)
    for position, item in enumerate(value):
        # Inlined for speed: there may be a million frames, and all clients wait.
        if (
            type(item) is not list
            or len(item) != 3
            or type(item[0]) is not int
            or item[0] < _LEAST_FRAME
            or type(item[1]) is not int
            or not 0 <= item[1] <= FLAGS
            or not (item[2] is None or (type(item[2]) is int and item[2] >= 0))
        ):
            _refuse(f"{path}[{position}]", "[size, flags, sender] of a frame", item)


def _optional(check: Check) -> Check:
    def checked(value: Any, path: str) -> None:
        if value is not None:
            check(value, path)

    return checked


def _each(check: Check) -> Check:
    def checked(value: Any, path: str) -> None:
        if type(value) is not list:
            _refuse(path, "a list", value)
        for position, item in enumerate(value):
            check(item, path and f"{path}[{position}]")

    return checked


def _row(*checks: Check) -> Check:
    def checked(value: Any, path: str) -> None:
        if type(value) is not list or len(value) != len(checks):
            _refuse(path, f"a list of {len(checks)}", value)
        for position, (item, check) in enumerate(zip(value, checks, strict=True)):
            check(item, path and f"{path}[{position}]")

    return checked


def _named(check: Check) -> Check:
    def checked(value: Any, path: str) -> None:
        if type(value) is not dict:
            _refuse(path, "an object", value)
        for name, item in value.items():
            check(item, path and f"{path}.{name}")

    return checked


def _record(fields: dict[str, Check]) -> Check:
    def checked(value: Any, path: str) -> None:
        if type(value) is not dict:
            _refuse(path, "an object", value)
        for name, check in fields.items():
            if name not in value:
                raise BadSnapshot(f"{path} has no {name}")
            check(value[name], path and f"{path}.{name}")

    return checked


def _outbox(value: Any, path: str) -> None:
    _OUTBOX(value, path)
    if "queue" in value:
        _QUEUED(value, path)
    else:
        _STREAM(value, path)
        _MARKS(value, path) if "marks" in value else _FORMER_MARKS(value, path)


_OUTBOX: Final = _record(
    {
        "frames": _count,
        "size": _count,
        "limit": _count,
        "blocked": _flag,
        "stalled": _flag,
        "begun": _count,
    }
)
_QUEUED: Final = _record(
    {
        "queue": _queue,
        "timed": _each(_row(_count, _seconds)),
        "copied": _optional(_row(_count, _count, _each(_count))),
    }
)
_STREAM: Final = _record(
    {
        "chunks": _each(_count),
        "left": _each(_row(_text, _count)),
    }
)
_MARKS: Final = _record(
    {
        "marks": _each(_row(_count, _count, _optional(_seconds), _flag)),
        "copied": _optional(_row(_count, _count)),
    }
)
#: The form before format 5: [chunk, seconds left, flags, sender] of a chunk that is one
#: frame.
_FORMER_MARKS: Final = _record({"timed": _each(_row(_count, _seconds, _count, _optional(_count)))})
_SESSION: Final = _record(
    {
        "name": _text,
        "instance": _text,
        "address": _text,
        "configured": _flag,
        "peer": _any_text,
        "since": _number,
        "number": _count,
        "left_at": _count,
        "skip": _id,
        "charged": _flag,
        "waited_s": _number,
        "hold_s": _optional(_number),
        "closing": _any_text,
        "slow": _flag,
        "allowance": _optional(_row(_number, _number, _flag)),
        "goaway": _flag,
        "in": _row(_count, _count, _count),
        "subscriptions": _each(_row(_pattern, _optional(_any_text))),
        "unsubscribed": _each(_row(_any_text, _optional(_any_text))),
        "reached": _each(_text),
        "owed": _each(_row(_text, _id, _count)),
        "asked": _each(_row(_id, _text, _count)),
        "reached_by_event": _optional(_each(_count)),
        "expiring": _each(_row(_id, _text, _seconds)),
    }
)
#: What some older formats do not have.
_NEWER: Final[dict[str, Check]] = {
    "cancels": _flag,
    "listens": _flag,
    "in_flight": _optional(_count),
    "revoked": _each(_row(_text, _id)),
}


def _whole_session(value: Any, path: str) -> None:
    _SESSION(value, path)
    for name, check in _NEWER.items():
        if name in value:
            check(value[name], path and f"{path}.{name}")


def _session(value: Any, path: str) -> None:
    (_count if type(value) is int else _whole_session)(value, path)


_JOB: Final = _record(
    {
        "question": _optional(_row(_count, _id, _long_operation)),
        "news": _optional(
            _row(
                _own_topic,
                _any_text,
                _optional(_text),
                _optional(_row(_text, _flag, _number)),
                _each(_count),
            )
        ),
    }
)
_LIMIT: Final = _optional(_number)
_CLIENT: Final = _record(
    {
        "changed_at": _number,
        "shown": _row(_flag, _number),
        "turn": _count,
        "rate": _row(_LIMIT, _LIMIT),
        "levels": _optional(_row(_LIMIT, _LIMIT)),
    }
)
#: Each with the session's number, its messages, bytes and errors, and the frames and
#: bytes of its outbox.
_COUNTERS: Final = _each(_row(*[_count] * 6))
_NUMBERS: Final = _each(_count)
_MAILBOXES: Final = _record(
    {
        "dedup": _number,
        "failure": _any_text,
        # Each row ends in when the oldest message was stored.
        "boxes": _each(_row(_text, *[_count] * 8, _optional(_number))),
        # Session, window and its bytes, and what the session holds.
        "consumers": _each(
            _row(
                _count,
                _count,
                _count,
                _each(_row(_count, _count, _count, _number, _optional(_number), _flag, _number)),
            )
        ),
    }
)
_INCIDENTS: Final = _each(
    _row(
        _text,
        _row(_any_text, _any_text, _any_text),
        *[_any_text] * 7,
        _number,
        _number,
        _count,
        _each(_id),
    )
)
#: Frames for one target: the target, milliseconds of their ttl, and their size.
_RUNS: Final = _each(_row(_any_text, _count, _count))
_NUMBERED_RUNS: Final = _each(_row(_count, _RUNS))
_LINK: Final = _record(
    {
        "facts": _row(_text, _text, _number, _any_text, _any_text, _each(_any_text), _number),
        "number": _optional(_count),
        "names": _each(_row(_any_text, _count, _number, _flag, _flag)),
        "interests": _each(_row(_any_text, _any_text, _flag)),
        "up": _flag,
        "changed_at": _number,
        "in_doubt": _count,
        "refused": _count,
        "last_error": _any_text,
        "ending": _any_text,
        "generation": _count,
        "forgotten": _count,
        "sent": _record(
            {
                "next": _count,
                "inquiries": _count,
                "last_outcomes": _count,
                "batches": _NUMBERED_RUNS,
                "answered": _NUMBERED_RUNS,
            }
        ),
        "received": _record(
            {
                "generation": _count,
                "next": _count,
                "pending": _each(_row(_count, _count)),
                "last_outcomes": _count,
                "kept": _each(_row(_count, _count)),
            }
        ),
        "unsent": _RUNS,
    }
)
_REMOTE_SENDER: Final = _record(
    {
        "identity": _text,
        "over": _flag,
        "reached": _each(_text),
        "hold_s": _LIMIT,
        "portions": _each(_row(_count, _number, _optional(_each(_any_text)), _count)),
        "asked": _each(_row(_id, _count, _LIMIT, _optional(_count), _flag)),
        "waiting": _each(_row(_text, _id, _LIMIT, _count, _flag)),
    }
)
_REMOTES: Final = _each(
    _record(
        {
            "name": _text,
            "revoked": _each(_row(_text, _each(_row(_text, _id)))),
            "asked": _each(_row(_count, _id, _text, _LIMIT)),
            "held": _each(_row(_count, _text, _LIMIT)),
            "senders": _each(_REMOTE_SENDER),
        }
    )
)
_CLUSTER: Final = _record(
    {
        "host": _text,
        "version": _count,
        "boot": _id,
        "joined": _flag,
        "number": _count,
        "links": _each(_LINK),
        "suspended": _flag,
        "remotes": _REMOTES,
        "events": _each(
            _row(
                _count,
                _id,
                _flag,
                _optional(_any_text),
                _any_text,
                _each(_text),
                _each(_row(_text, _each(_text))),
            )
        ),
        "size": _count,
    }
)
#: Each with the position of its session.
_TAPS: Final = _each(_row(_count, _any_text, _flag, _count, _count, _count))
#: What is only in newer formats.
_NEWER_FACTS: Final[dict[str, Check]] = {
    "incidents": _INCIDENTS,
    "taps": _TAPS,
    "returning": _row(_each(_text), _number),
}
_FACTS: Final = _record(
    {
        "started_at": _number,
        "upgrades": _count,
        "next_number": _count,
        "dropped": _count,
        "refused": _named(_count),
        "totals": _named(_count),
        "given_back": _named(_count),
        "clients": _named(_CLIENT),
        "deferred": _each(_JOB),
        "sessions": _each(_session),
        "outboxes": _each(_optional(_outbox)),
        "counts": _COUNTERS,
        "gone": _NUMBERS,
        "held": _each(_row(_count, _count, _LIMIT)),
        "leaving": _each(_row(_count, _queue, _each(_row(_count, _seconds)))),
        # Each ends in the size, flags, sender and seconds left of its frame.
        "waiting": _each(
            _row(_text, _optional(_count), _text, _id, _count, _count, _count, _optional(_seconds))
        ),
        "retained": _each(
            _row(_count, _text, _id, _count, _count, _optional(_count), _optional(_seconds))
        ),
    }
)


def check(facts: Any, copied: Callable[[int], dict[str, Any]]) -> None:
    """Raise BadSnapshot for facts that have the wrong form or contradict each other.

    copied: returns what is known of the copied session with a number, or raises
    BadSnapshot. The facts may refer to such sessions by their numbers.
    """
    try:
        # Paths are omitted at first: building a path takes longer than checking the
        # value, and all clients wait.
        _FACTS(facts, "")
    except BadSnapshot:
        # The second run fails again, and names the place.
        _FACTS(facts, "facts")
    sessions = [copied(entry) if type(entry) is int else entry for entry in facts["sessions"]]
    outboxes, leaving = facts["outboxes"], facts["leaving"]
    _hold(len(outboxes) <= len(sessions), "there are more outboxes than sessions")
    # First those with an outbox, then those that have left, then the numbers of copied
    # ones that the rest refers to.
    first_copied = len(outboxes) + len(leaving)
    _hold(
        first_copied <= len(sessions)
        and [position for position, _, _ in leaving] == list(range(len(outboxes), first_copied))
        and all(type(entry) is int for entry in facts["sessions"][first_copied:]),
        "leaving are not those sessions that have no outbox",
    )
    opened = {*range(len(outboxes)), *range(first_copied, len(sessions))}
    for name, client in facts["clients"].items():
        _check_levels(client["rate"], client["levels"], name)
    next_number = facts["next_number"]
    for position, session in enumerate(sessions):
        if type(facts["sessions"][position]) is int:
            # Inlined for speed: there may be ten thousand sessions, and all clients
            # wait.
            if position < first_copied and (
                position >= len(outboxes) or outboxes[position] is not None
            ):
                raise BadSnapshot(f"sessions[{position}] was copied in part")
            if session["number"] >= next_number or session["left_at"] >= next_number:
                raise BadSnapshot(f"sessions[{position}] came after all that have come")
            continue
        _hold(
            position >= len(outboxes) or outboxes[position] is not None,
            f"outboxes[{position}] was copied alone",
        )
        _check_session(session, sessions, f"sessions[{position}]", next_number)
    addresses = [
        session["address"]
        for position, session in enumerate(sessions)
        if position in opened and session["configured"]
    ]
    _hold(len(set(addresses)) == len(addresses), "two open sessions have one address")
    _hold(
        len({session["number"] for session in sessions}) == len(sessions),
        "two sessions have one number",
    )
    for name, check_value in _NEWER_FACTS.items():
        if name in facts:
            check_value(facts[name], f"facts.{name}")
    _hold(
        all(row[0] in opened for row in facts.get("taps", ())),
        "a session taps that is not open",
    )
    if facts.get("mailboxes") is not None:
        _check_mailboxes(facts["mailboxes"], sessions, opened)
    if facts.get("cluster") is not None:
        _check_cluster(facts["cluster"], opened)
    for position, job in enumerate(facts["deferred"]):
        _check_job(job, opened, f"deferred[{position}]")
    for position, outbox in enumerate(outboxes):
        if outbox is not None:
            _check_outbox(outbox, len(sessions), f"outboxes[{position}]")
    for position, queue, timed in facts["leaving"]:
        _check_senders(queue, len(sessions), f"leaving of sessions[{position}]")
        _check_timed(timed, len(queue), f"leaving of sessions[{position}]")
    _check_requests(facts, sessions, opened)
    held = [source for source, _, _ in facts["held"]]
    _hold(len(set(held)) == len(held), "a session is held twice")
    _hold(
        all({source, target} <= opened for source, target, _ in facts["held"]),
        "a session is held, or holds one, that is not open",
    )


def check_idle(facts: Any) -> None:
    """Raise BadSnapshot for facts that no idle session can have; see
    brokerd.core.precopy.
    """
    _IDLE(facts, "idle")
    session, outbox, client = facts["session"], facts["outbox"], facts["client"]
    # An idle session refers to no other session, and is in none of the states in which
    # a session waits.
    _check_session(session, [], "idle.session", _MOST + 1)
    _check_outbox(outbox, 0, "idle.outbox")
    _hold(
        not outbox.get("queue") and not sum(outbox.get("chunks", ())),
        "idle.outbox has something that waits",
    )
    _hold(
        outbox.get("copied") is None and outbox["begun"] == 0,
        "idle.outbox has something that was begun",
    )
    busy = [key for key in ("charged", "closing", "skip", "allowance", "hold_s") if session[key]]
    _hold(not busy and session["configured"], "idle.session is not idle")
    if client is not None:
        _check_levels(client["rate"], client["levels"], session["name"])


_IDLE: Final = _record({"session": _whole_session, "outbox": _outbox, "client": _optional(_CLIENT)})


def check_clients(facts: Any) -> None:
    """Raise BadSnapshot for facts of a block of clients in the wrong form."""
    _CLIENT_BLOCK(facts, "block")
    for name, client in facts["clients"].items():
        _check_levels(client["rate"], client["levels"], name)


def check_block(facts: Any) -> None:
    """Raise BadSnapshot for facts of a block in the wrong form; see
    brokerd.core.precopy.
    """
    _SESSION_BLOCK(facts, "block")
    if "frames" in facts:
        _QUEUE_BLOCK(facts, "block")
    else:
        (_CHUNK_BLOCK if "chunks" in facts else _SUBSCRIPTION_BLOCK)(facts, "block")


_CLIENT_BLOCK: Final = _record({"started_at": _number, "clients": _named(_CLIENT)})
_SESSION_BLOCK: Final = _record({"session": _count})
_QUEUE_BLOCK: Final = _record({"first": _count, "frames": _count})
_CHUNK_BLOCK: Final = _record({"place": _count, "chunks": _each(_count)})
_SUBSCRIPTION_BLOCK: Final = _record(
    {"name": _text, "subscriptions": _each(_row(_pattern, _optional(_any_text)))}
)


def check_incidents(rows: Any) -> None:
    """Raise BadSnapshot unless these are incidents."""
    _INCIDENTS(rows, "incidents")


def check_counters(rows: Any) -> None:
    """Raise BadSnapshot unless these are the counters of copied sessions."""
    _COUNTERS(rows, "counts")


def check_numbers(numbers: Any) -> None:
    """Raise BadSnapshot unless these are the numbers of sessions."""
    _NUMBERS(numbers, "gone")


def check_counts(value: Any, path: str) -> None:
    """Raise BadSnapshot unless the value is an object of named counters."""
    _named(_count)(value, path)


def check_frames(chunk: memoryview, *, one: bool = False) -> None:
    """Raise BadSnapshot unless the bytes are whole frames.

    one: whether they have to be exactly one frame.
    """
    position, end = 0, len(chunk)
    length_at = LENGTH.unpack_from
    # Inlined for speed: there may be a million frames, and all clients wait.
    while position <= end - _PREFIX:
        (size,) = length_at(chunk, position)
        if size < 0:
            size = _long(chunk, position)
        position += _PREFIX + size
        if one:
            break
    _hold(
        position == end,
        "what waits as one frame is more, or not whole"
        if one
        else "what waits ends inside a frame",
    )


def _long(chunk: memoryview, position: int) -> int:
    """Return how many bytes of a frame of 2 GiB or more follow its first four bytes."""
    try:
        span = frame_span(chunk, position, len(chunk))
    except BadLength as error:
        raise BadSnapshot(f"what waits does not consist of frames: {error}") from error
    return len(chunk) if span is None else sum(span) - position - _PREFIX


def _hold(condition: bool, fault: str) -> None:
    if not condition:
        raise BadSnapshot(fault)


def _check_levels(rate: list[float | None], levels: list[float | None] | None, name: str) -> None:
    _hold(
        (levels is None) == (rate == [None, None]),
        f"what is left of the rate of {name} does not fit the rate",
    )
    remaining = [None, None] if levels is None else levels
    for limit, level in zip(rate, remaining, strict=True):
        _hold(
            (limit is None) == (level is None),
            f"what is left of the rate of {name} does not fit the rate",
        )
        _hold(
            limit is None or level is None or level <= max(1.0, limit),
            f"{name} has more left than its rate",
        )


def _check_session(
    session: dict[str, Any], sessions: list[dict[str, Any]], path: str, next_number: int
) -> None:
    name, _, _ = session["address"].partition("/")
    _hold(name == session["name"], f"{path} has an address that is not below its name")
    recipients = session["reached_by_event"] or []
    _hold(
        all(recipient < len(sessions) for recipient in recipients),
        f"{path}.reached_by_event names a session that is not there",
    )
    outgoing_requests = Counter(
        (message_id, address) for message_id, address, _ in session["asked"]
    )
    expiring = Counter((message_id, address) for message_id, address, _ in session["expiring"])
    _hold(expiring <= outgoing_requests, f"{path}.expiring names a request that was not asked")
    _hold(
        max(session["number"], session["left_at"]) < next_number,
        f"{path} came after all that have come",
    )
    subscriptions = [(pattern, group) for pattern, group in session["subscriptions"]]
    _hold(len(set(subscriptions)) == len(subscriptions), f"{path} has a subscription twice")
    for key, rows in (
        ("owed", [(row[0], row[2]) for row in session["owed"]]),
        ("asked", [row[1:] for row in session["asked"]]),
    ):
        for address, other in rows:
            _hold(other < len(sessions), f"{path}.{key} names a session that is not there")
            # An answer is looked up, and removed, by the address.
            _hold(
                sessions[other]["address"] == address,
                f"{path}.{key} has another address than the session",
            )


def _check_requests(facts: Any, sessions: list[dict[str, Any]], opened: set[int]) -> None:
    """Check the requests that wait, and the frames kept of those that were delivered."""
    for position, row in enumerate(facts["waiting"]):
        _, member, _, _, size, flags, sender, _ = row
        _hold(
            sender in opened and (member is None or member in opened),
            f"waiting[{position}] names a session that is not open",
        )
        _hold(size >= _LEAST_FRAME and flags <= FLAGS, f"waiting[{position}] is not one frame")
    retained = Counter((row[0], row[1], row[2]) for row in facts["retained"])
    owed = {
        responder: Counter((row[0], row[1]) for row in sessions[responder]["owed"])
        for responder in {row[0] for row in facts["retained"]}
        if responder < len(facts["outboxes"]) and type(facts["sessions"][responder]) is dict
    }
    for position, row in enumerate(facts["retained"]):
        responder, address, message_id, size, flags, sender, _ = row
        _hold(
            responder in owed
            and retained[responder, address, message_id] <= owed[responder][address, message_id],
            f"retained[{position}] is not a request that its session owes an answer",
        )
        _hold(
            size >= _LEAST_FRAME and flags <= FLAGS and (sender is None or sender < len(sessions)),
            f"retained[{position}] is not one frame",
        )


def _check_job(job: dict[str, Any], opened: set[int], path: str) -> None:
    question, news = job["question"], job["news"]
    _hold((question is None) != (news is None), f"{path} is not one job")
    positions = [question[0]] if question is not None else news[4]
    _hold(opened.issuperset(positions), f"{path} names a session that is not open")


def _check_outbox(outbox: dict[str, Any], count: int, path: str) -> None:
    sizes = [item[0] for item in outbox["queue"]] if "queue" in outbox else outbox["chunks"]
    total = sum(sizes)
    if "queue" in outbox:
        _check_senders(outbox["queue"], count, path)
        if outbox["copied"] is not None:
            _check_copied(outbox, path)
        _hold(len(sizes) <= outbox["frames"], f"{path} holds more frames than were ever put there")
    else:
        _hold(
            len(sizes) > 0 and 0 not in sizes[:-1],
            f"{path} has no chunk, or an empty one before others",
        )
        if outbox.get("copied") is not None:
            sizes = outbox["copied"][1:]
            total += sizes[0]
        _hold(all(end <= total for _, end in outbox["left"]), f"{path}.left is beyond what waits")
    if "queue" in outbox:
        _check_timed(outbox["timed"], len(sizes), path)
    else:
        _check_places(outbox, total, path)
    _hold(total <= outbox["size"], f"{path} holds more bytes than were ever put there")
    written = outbox["begun"]
    _hold(written == 0 or written < next(iter(sizes), 0), f"{path}.begun is beyond what was begun")


def _check_copied(outbox: dict[str, Any], path: str) -> None:
    """Check the queue of an outbox whose plain frames were partly copied.

    The queue consists of three parts, in this order: the begun frame, the frames that
    are never dropped, and the frames behind the copied ones.
    """
    queue, (_, copied, kept) = outbox["queue"], outbox["copied"]
    first = int(outbox["begun"] > 0)
    _hold(copied > 0, f"{path}.copied has no frame")
    _hold(first + len(kept) <= len(queue), f"{path}.copied places frames that are not there")
    plain = queue[first + len(kept) :]
    _hold(kept == sorted(kept), f"{path}.copied is not in order")
    _hold(
        not kept or kept[-1] <= copied + len(plain),
        f"{path}.copied places a frame behind all others",
    )
    _hold(
        all(item[1] & _KEPT for item in queue[first : first + len(kept)]),
        f"{path}.copied places other frames",
    )
    _hold(
        not any(item[1] & _KEPT for item in plain),
        f"{path}.queue has frames that are never dropped behind others",
    )


def _check_timed(timed: list[list[Any]], places: int, path: str) -> None:
    positions = [row[0] for row in timed]
    _hold(positions == sorted(set(positions)), f"{path}.timed is not in order")
    _hold(not positions or positions[-1] < places, f"{path}.timed names a frame that is not there")


def marked_places(outbox: dict[str, Any]) -> Iterator[tuple[int, int, float | None, bool]]:
    """Yield the start, the end, the seconds left of each marked frame of a stream, and
    whether it is pinned.
    """
    if "marks" in outbox:
        for start, end, left, pinned in outbox["marks"]:
            yield start, end, left, pinned
        return
    sizes = outbox["chunks"]
    for chunk, left, _, _ in outbox["timed"]:
        _hold(chunk < len(sizes), "timed names a frame that is not there")
        start = sum(sizes[:chunk])
        yield start, start + sizes[chunk], left, False


def _check_places(outbox: dict[str, Any], size: int, path: str) -> None:
    """Check the places of the marked frames in a stream of ``size`` bytes."""
    position = 0
    for start, end, _, _ in marked_places(outbox):
        _hold(position <= start < end, f"{path}.marks is not in order")
        position = end
    _hold(position <= size, f"{path}.marks names a frame that is not there")


def _check_senders(queue: list[list[Any]], count: int, path: str) -> None:
    _hold(
        all(sender is None or sender < count for _, _, sender in queue),
        f"{path} has a sender that is not there",
    )


def _check_mailboxes(facts: Any, sessions: list[dict[str, Any]], opened: set[int]) -> None:
    """Check that each connection holds messages of its own client's mailbox only once."""
    _MAILBOXES(facts, "facts.mailboxes")
    names = [row[0] for row in facts["boxes"]]
    _hold(len(set(names)) == len(names), "two mailboxes have one name")
    held: set[tuple[str, int]] = set()
    for position, window, window_bytes, rows in facts["consumers"]:
        _hold(position in opened, "a session that is not open has opened a mailbox")
        name = sessions[position]["address"].partition("/")[0]
        _hold(name in names, f"{name} has opened a mailbox that is not there")
        _hold(window > 0 and window_bytes > 0, "a window is empty")
        seqs = {(name, row[0]) for row in rows}
        _hold(len(seqs) == len(rows) and not seqs & held, "a message is held twice")
        held |= seqs


def _check_cluster(facts: Any, opened: set[int]) -> None:
    """Check the form of the links and remote sessions, and the sessions that they name."""
    _CLUSTER(facts, "facts.cluster")
    named = {row[0] for row in facts["events"]}
    for host in facts["remotes"]:
        named.update(row[0] for row in (*host["asked"], *host["held"]))
        named.update(row[1] for sender in host["senders"] for row in sender["asked"])
    _hold(named <= opened, "a session that is not open deals with another host")
