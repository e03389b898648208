"""The `$broker` operations: requests that the broker itself answers.

An operation is a REQUEST whose payload is a JSON object ``{"op": NAME, ...}``. Its
REPLY is a JSON object; a refusal is an ERROR (docs/protocol.md, "Operations").

Each operation is a method that returns the reply. If it returns None, the reply is sent
by another part of the broker or the daemon, mostly later.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from brokerd.config.values import Rule
from brokerd.core.goaway import DRAINING
from brokerd_client.errors import InvalidName
from brokerd_client.wire.envelope import (
    BROKER,
    Envelope,
    ErrorCode,
    check_pattern,
    is_name,
    split_address,
)

if TYPE_CHECKING:
    from brokerd.core.deferred import Deferred
    from brokerd.core.exchange import Exchange
    from brokerd.core.goaway import Goaway
    from brokerd.core.held_senders import HeldSenders
    from brokerd.core.in_flight import InFlight
    from brokerd.core.replies import Replies
    from brokerd.core.session import Session
    from brokerd.core.status import Status
    from brokerd.core.topics import Topics
    from brokerd.core.turn import Turn

__all__ = ["PROTOCOL_VERSION", "AdminCommand", "Operations", "Question"]

PROTOCOL_VERSION: Final = 1

#: Most bytes of JSON per operation: some milliseconds' work. The largest message
#: allowed would take seconds.
_LARGEST: Final = 128 * 1024
#: Frames charged to the sender's turn budget per step of a long answer.
_STEP: Final = 4
#: Clients listed per step of a long answer.
_CLIENTS: Final = 32
#: Clients counted per step of a long answer.
_COUNTED: Final = 256
#: Tokens of a topic pattern per frame charged to the turn budget. The tree of
#: subscriptions is extended or cut by that many in the time of one frame.
_TOKENS: Final = 16
#: Searches under way per frame charged to the turn budget: each is told of a changed
#: subscription.
_SEARCHES: Final = 4
#: Connections listed or counted per step of a long answer.
_CONNECTIONS: Final = 8
#: Features that this broker offers beyond the first version of the protocol.
_FEATURES: Final = ("goaway", "cancels", "in_flight")
#: Most requests in flight that a connection may ask for.
_MOST_IN_FLIGHT: Final = 10_000_000
#: Counters that are the sum of those of the sessions.
_SUMS: Final = ("messages_in", "bytes_in", "messages_out", "bytes_out")
#: Most characters per argument: more than any name, address, topic or pattern has. A
#: longer argument is neither examined nor repeated in an answer or the log.
_LONGEST: Final = 255

_Arguments: TypeAlias = dict[str, Any]
_Operation: TypeAlias = "Callable[[Operations, Session, int, _Arguments], _Arguments | None]"


class _Refusal(Exception):
    """A refused operation."""

    def __init__(self, code: ErrorCode, message: str, name: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.name = name


class Question:
    """An operation with a long answer, which is built in steps as deferred work."""

    __slots__ = ("_operations", "id", "op", "source")

    def __init__(self, operations: Operations, source: Session, message_id: int, op: str) -> None:
        self._operations = operations
        self.source = source
        self.id = message_id
        self.op = op

    def begin(self) -> Iterator[None]:
        """Build the answer in steps and send it."""
        return self._operations.answer_in_steps(self)


@dataclass(frozen=True, slots=True)
class AdminCommand:
    """An admin operation for the daemon, such as ``reload`` or ``log_level``."""

    op: str
    source: Session
    id: int
    arguments: dict[str, object] = field(default_factory=dict)


class Operations:
    """Carries out the operations that clients ask of ``$broker``.

    asking: the sessions whose operation with a long answer is not answered yet.
    admin_commands: commands of an administrator that the daemon carries out.
    """

    def __init__(
        self,
        exchange: Exchange,
        topics: Topics[Session],
        status: Status,
        turn: Turn,
        replies: Replies,
        held: HeldSenders,
        in_flight: InFlight,
        deferred: Deferred,
        goaway: Goaway,
    ) -> None:
        self._exchange = exchange
        self._topics = topics
        self._status = status
        self._turn = turn
        self._replies = replies
        self._held = held
        self._in_flight = in_flight
        self._deferred = deferred
        self._goaway = goaway
        self.asking: set[Session] = set()
        self.admin_commands: list[AdminCommand] = []

    def serve(self, source: Session, request: Envelope, payload: bytes) -> None:
        """Carry out one REQUEST to ``$broker`` and answer it."""
        try:
            op, arguments = _read(payload)
            operation = _OPEN.get(op)
            if operation is None and op in _ADMIN:
                if not source.client.policy.admin:
                    raise _Refusal(
                        ErrorCode.DENIED,
                        f"the operation {op} is only for clients with admin: true",
                        BROKER,
                    )
                operation = _ADMIN[op]
                address = arguments.get("address")
                self._replies.log_events.note(
                    "admin.asked",
                    source,
                    address[:_LONGEST] if isinstance(address, str) else "",
                    op,
                )
            if operation is None:
                names = ", ".join(sorted((*_OPEN, *_ADMIN)))
                raise _Refusal(
                    ErrorCode.UNSUPPORTED,
                    f"unknown operation {op[:64]!r}: use one of {names}",
                    BROKER,
                )
            reply = operation(self, source, request.id, arguments)
        except _Refusal as refusal:
            self._replies.refuse(source, request.id, refusal.code, str(refusal), refusal.name)
        else:
            if reply is not None:
                self._replies.reply(source, request.id, reply)

    def queue_question(self, source: Session, message_id: int, op: str) -> None:
        """Queue an operation with a long answer."""
        self.asking.add(source)
        steps = self._deferred.add(Question(self, source, message_id, op))
        self._turn.charge(steps * _STEP)

    def answer_in_steps(self, question: Question) -> Iterator[None]:
        """Build a long answer in steps and send it."""
        source = question.source
        payload = yield from _LONG[question.op](self, source)
        self.asking.discard(source)
        self._replies.reply_json(source, question.id, payload)
        if source.held_by is source:
            self._held.release(source)

    def queue_command(
        self, op: str, source: Session, message_id: int, arguments: dict[str, object]
    ) -> None:
        """Queue an admin command for the daemon, which answers it."""
        self.admin_commands.append(AdminCommand(op, source, message_id, arguments))

    def _whoami(self, source: Session, message_id: int, arguments: _Arguments) -> _Arguments:
        return {
            "name": source.client.name,
            "address": source.address,
            "version": self._status.version,
            "protocol": PROTOCOL_VERSION,
            "limits": {
                "max_message": self._status.limits.max_message,
                "queue": source.client.config.queue,
            },
            "features": _FEATURES,
        }

    def _ping(self, source: Session, message_id: int, arguments: _Arguments) -> _Arguments:
        return {}

    def _clients(self, source: Session) -> Generator[None, None, bytes]:
        may_see = source.client.policy.sending
        entries = (
            (
                {"name": client.name, "online": client.shown_online, "since": client.shown_since}
                if source.open and may_see(client.name) is not None
                else None
            )
            for client in list(self._exchange.clients.values())
        )
        return _in_pieces("clients", entries, _CLIENTS)

    def _subscription(self, arguments: _Arguments) -> tuple[str, str | None]:
        topic, group = _text(arguments, "topic"), arguments.get("group")
        self._turn.charge(topic.count(".") // _TOKENS + self._topics.searches // _SEARCHES)
        try:
            check_pattern(topic)
        except InvalidName as error:
            raise _Refusal(ErrorCode.UNSUPPORTED, str(error), BROKER) from error
        if group is not None and not (isinstance(group, str) and is_name(group)):
            raise _Refusal(
                ErrorCode.UNSUPPORTED,
                "invalid group name: use 1 to 64 letters, digits, '_', '.', '-'",
                BROKER,
            )
        return topic, group

    def _subscribe(self, source: Session, message_id: int, arguments: _Arguments) -> _Arguments:
        topic, group = self._subscription(arguments)
        if source.retired:
            raise _Refusal(ErrorCode.SHUTTING_DOWN, "the broker closes this connection", BROKER)
        if source.client.policy.subscribing(topic) is None:
            raise _Refusal(
                ErrorCode.DENIED, f"{source.client.name} may not subscribe to {topic}", BROKER
            )
        config = source.client.config
        if (
            len(source.subscriptions) >= config.subscriptions
            and (topic, group) not in source.subscriptions
        ):
            message = (
                f"no more than {config.subscriptions} subscriptions"
                f" (clients.{config.name}.subscriptions)"
            )
            raise _Refusal(ErrorCode.FULL, message, BROKER)
        self._topics.add(topic, source, group)
        source.subscriptions.add((topic, group))
        return {"topic": topic, "group": group}

    def _unsubscribe(self, source: Session, message_id: int, arguments: _Arguments) -> _Arguments:
        topic, group = self._subscription(arguments)
        self._topics.discard(topic, source, group)
        source.subscriptions.discard((topic, group))
        return {"topic": topic, "group": group}

    def _ask_for_goaway(self, source: Session, message_id: int, arguments: _Arguments) -> None:
        source.goaway = True
        self._replies.reply(source, message_id, {})
        if self._status.draining:
            self._goaway.part(source)

    def _finished(self, source: Session, message_id: int, arguments: _Arguments) -> None:
        if not (source.goaway and source.goaway_sent):
            raise _Refusal(
                ErrorCode.UNSUPPORTED,
                f"finished is valid only after goaway and the event {DRAINING}",
                BROKER,
            )
        if source.finishing is not None:
            raise _Refusal(ErrorCode.UNSUPPORTED, "finished has been sent already", BROKER)
        source.finishing = message_id
        self._goaway.finishing[source] = None

    def _ask_for_cancels(
        self, source: Session, message_id: int, arguments: _Arguments
    ) -> _Arguments:
        source.cancels = True
        return {}

    def _limit_in_flight(
        self, source: Session, message_id: int, arguments: _Arguments
    ) -> _Arguments:
        limit = arguments.get("n")
        if type(limit) is not int or not 0 <= limit <= _MOST_IN_FLIGHT:
            raise _Refusal(
                ErrorCode.UNSUPPORTED,
                f"invalid n: in_flight needs a number of requests from 0 to {_MOST_IN_FLIGHT}",
                BROKER,
            )
        self._in_flight.set_limit(source, limit)
        return {"in_flight": source.in_flight_limit}

    def _stats(self, source: Session) -> Generator[None, None, bytes]:
        return json.dumps((yield from self._count())).encode()

    def stats(self) -> _Arguments:
        """Return the broker's counters since it started."""
        counting = self._count()
        while True:
            try:
                next(counting)
            except StopIteration as end:
                counters: _Arguments = end.value
                return counters

    def _count(self) -> Generator[None, None, _Arguments]:
        # The list of sessions is fixed first. A session that ends meanwhile counts with its
        # last numbers.
        sums = Counter(self._status.totals)
        clients = list(self._exchange.clients.values())
        sessions: list[Session] = []
        online = waiting = in_flight = waiting_requests = 0
        for number, client in enumerate(clients, 1):
            online += client.online
            if client.flight:
                waiting_requests += len(client.flight)
                waiting += client.flight.size
            sessions += client.sessions.values()
            if number % _COUNTED == 0:
                yield
        for number, session in enumerate(sessions, 1):
            for counter in _SUMS:
                sums[counter] += getattr(session, counter)
            waiting += session.outbox.waiting
            in_flight += len(session.incoming_requests)
            if number % _CONNECTIONS == 0:
                yield
        return {
            "version": self._status.version,
            "routing": self._status.routing,
            "started_at": self._status.started_at,
            "upgrades": self._status.upgrades,
            "draining": self._status.draining,
            "clients": len(clients),
            "online": online,
            "connections": len(sessions),
            "subscriptions": len(self._topics),
            "waiting_bytes": waiting,
            "requests_in_flight": in_flight,
            "requests_waiting": waiting_requests,
            "dropped": self._replies.dropped,
            "refused": dict(self._replies.refused),
            **{counter: sums[counter] for counter in _SUMS},
        }

    def _connections(self, source: Session) -> Generator[None, None, bytes]:
        entries = (
            (
                {
                    "address": session.address,
                    "name": session.client.name,
                    "peer": session.peer,
                    "since": session.since,
                    "messages_in": session.messages_in,
                    "bytes_in": session.bytes_in,
                    "messages_out": session.messages_out,
                    "bytes_out": session.bytes_out,
                    "errors": session.errors_in,
                    "waiting_bytes": session.outbox.waiting,
                    "queue": session.outbox.limit,
                    "slow": session.outbox.blocked,
                    "held": session.held_by is not None,
                    "subscriptions": len(session.subscriptions),
                    "owed": len(session.incoming_requests),
                    "in_flight": session.in_flight_limit,
                }
                if session.open
                else None
            )
            for session in list(self._exchange.sessions())
        )
        return _in_pieces("connections", entries, _CONNECTIONS)

    def _disconnect(self, source: Session, message_id: int, arguments: _Arguments) -> _Arguments:
        address = _text(arguments, "address")
        name, instance = split_address(address)
        exact = self._exchange.find(address)
        client = self._exchange.resolve(name)
        if client is None:
            raise _Refusal(ErrorCode.NO_SUCH_CLIENT, f"unknown client {address}", address)
        pool = [] if instance else list(client.sessions.values())
        sessions = pool if exact is None else [exact]
        if not sessions:
            raise _Refusal(ErrorCode.OFFLINE, f"{address} is not connected", address)
        for session in sessions:
            self._replies.close(
                session, f"disconnected by {source.client.name}", code=ErrorCode.DISCONNECTED
            )
        return {"disconnected": [session.address for session in sessions]}

    def _can(self, source: Session, message_id: int, arguments: _Arguments) -> _Arguments:
        sender, verb, target = (_text(arguments, key) for key in ("sender", "verb", "target"))
        client = self._exchange.resolve(sender)
        if client is None:
            raise _Refusal(ErrorCode.NO_SUCH_CLIENT, f"unknown client {sender}", sender)
        policy = client.policy
        if verb == "send" and target == BROKER:
            return {
                "allowed": True,
                "rule": None,
                "where": None,
                "why": "every client may send requests to the broker",
            }
        if verb == "publish" and target.startswith("$"):
            reason = "only the broker publishes on topics that begin with $"
            return {"allowed": False, "rule": None, "where": None, "why": reason}
        if verb == "send":
            rule, rules = policy.sending(target.partition("/")[0]), client.config.send_to
            if rule is not None and self._exchange.resolve(target.partition("/")[0]) is None:
                return {
                    "allowed": False,
                    "rule": None,
                    "where": None,
                    "why": f"unknown client {target}",
                }
        elif verb == "publish":
            rule, rules = policy.publishing(target), client.config.publish
        elif verb == "subscribe":
            rule, rules = policy.subscribing(target), client.config.subscribe
        else:
            raise _Refusal(
                ErrorCode.UNSUPPORTED, "invalid verb: use send, publish or subscribe", BROKER
            )
        if rule is not None:
            return {
                "allowed": True,
                "rule": rule.pattern,
                "where": _where(rule),
                "why": f"{rule.pattern} allows it",
            }
        patterns = ", ".join(rule.pattern for rule in rules) or "nothing"
        location = _where(rules[0]) if rules else None
        return {
            "allowed": False,
            "rule": None,
            "where": location,
            "why": f"none of its rules matches: {patterns}",
        }

    def _reload(self, source: Session, message_id: int, arguments: _Arguments) -> None:
        if not isinstance(arguments.get("dry_run", False), bool):
            raise _Refusal(ErrorCode.UNSUPPORTED, "invalid dry_run: use true or false", BROKER)
        self.queue_command("reload", source, message_id, arguments)


def _read(payload: bytes) -> tuple[str, _Arguments]:
    if len(payload) > _LARGEST:
        message = f"the operation has {len(payload)} bytes; at most {_LARGEST} are allowed"
        raise _Refusal(ErrorCode.UNSUPPORTED, message, BROKER)
    try:
        arguments = json.loads(payload)
    except (ValueError, RecursionError) as error:
        raise _Refusal(
            ErrorCode.UNSUPPORTED,
            "an operation is a JSON object with an op; this is not valid JSON",
            BROKER,
        ) from error
    if not isinstance(arguments, dict) or not isinstance(arguments.get("op"), str):
        raise _Refusal(
            ErrorCode.UNSUPPORTED, 'an operation is a JSON object such as {"op": "whoami"}', BROKER
        )
    return arguments.pop("op"), arguments


def _text(arguments: _Arguments, key: str) -> str:
    value = arguments.get(key)
    if not isinstance(value, str) or len(value) > _LONGEST:
        message = f"the operation needs {key}, a string of at most {_LONGEST} characters"
        raise _Refusal(ErrorCode.UNSUPPORTED, message, BROKER)
    return value


def _in_pieces(
    name: str, entries: Iterable[_Arguments | None], step: int
) -> Generator[None, None, bytes]:
    """Return a JSON object with one list of the entries that are not None.

    It yields after every ``step`` entries.
    """
    pieces: list[bytes] = []
    batch: list[_Arguments] = []
    for count, entry in enumerate(entries, 1):
        if entry is not None:
            batch.append(entry)
        if count % step == 0:
            if batch:
                pieces.append(json.dumps(batch)[1:-1].encode())
                batch = []
            yield
    if batch:
        pieces.append(json.dumps(batch)[1:-1].encode())
    return b"".join((f'{{"{name}": ['.encode(), b", ".join(pieces), b"]}"))


def _where(rule: Rule) -> str:
    return "default" if rule.source is None else str(rule.source)


def _ask(op: str) -> _Operation:
    """Return the operation that queues a question with a long answer."""

    def ask(
        operations: Operations, source: Session, message_id: int, arguments: _Arguments
    ) -> None:
        operations.queue_question(source, message_id, op)

    return ask


def _order(op: str) -> _Operation:
    """Return the operation that queues an admin command."""

    def order(
        operations: Operations, source: Session, message_id: int, arguments: _Arguments
    ) -> None:
        operations.queue_command(op, source, message_id, arguments)

    return order


#: Operations with a long answer: see Question.
_LONG: Final[dict[str, Callable[[Operations, Session], Generator[None, None, bytes]]]] = {
    "clients": Operations._clients,
    "stats": Operations._stats,
    "connections": Operations._connections,
}
_OPEN: Final[dict[str, _Operation]] = {
    "whoami": Operations._whoami,
    "ping": Operations._ping,
    "clients": _ask("clients"),
    "subscribe": Operations._subscribe,
    "unsubscribe": Operations._unsubscribe,
    "goaway": Operations._ask_for_goaway,
    "finished": Operations._finished,
    "cancels": Operations._ask_for_cancels,
    "in_flight": Operations._limit_in_flight,
}
_ADMIN: Final[dict[str, _Operation]] = {
    "stats": _ask("stats"),
    "connections": _ask("connections"),
    "disconnect": Operations._disconnect,
    "can": Operations._can,
    "keys": _order("keys"),
    "reload": Operations._reload,
    "upgrade": _order("upgrade"),
    "drain": _order("drain"),
    "log_level": _order("log_level"),
}
