"""The `$broker` operations: requests that the broker itself answers.

An operation is a REQUEST whose payload is a JSON object ``{"op": NAME, ...}``. Its
REPLY is a JSON object; a refusal is an ERROR (docs/protocol.md, "Operations").

Each operation is a function that returns the reply. If it returns None, the reply is
sent by another part of the broker, mostly later.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from brokerd.config.values import Rule
from brokerd.core.goaway import DRAINING, part
from brokerd_client.errors import InvalidName
from brokerd_client.wire.envelope import (
    BROKER,
    CodecId,
    Envelope,
    ErrorCode,
    Kind,
    check_pattern,
    is_name,
    split_address,
)

if TYPE_CHECKING:
    from brokerd.core.broker import Broker
    from brokerd.core.session import Session

__all__ = ["PROTOCOL_VERSION", "Question", "reply_to", "reply_with", "serve", "stats"]

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
_FEATURES: Final = ("goaway",)
#: Counters that are the sum of those of the sessions.
_SUMS: Final = ("messages_in", "bytes_in", "messages_out", "bytes_out")
#: Most characters per argument: more than any name, address, topic or pattern has. A
#: longer argument is neither examined nor repeated in an answer or the log.
_LONGEST: Final = 255

_Arguments: TypeAlias = dict[str, Any]
_Operation: TypeAlias = "Callable[[Broker, Session, int, _Arguments], _Arguments | None]"


class _Refusal(Exception):
    """A refused operation."""

    def __init__(self, code: ErrorCode, message: str, name: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.name = name


def serve(broker: Broker, source: Session, request: Envelope, payload: bytes) -> None:
    """Carry out one REQUEST to ``$broker`` and answer it."""
    try:
        op, arguments = _read(payload)
        operation = _OPEN.get(op)
        if operation is None and op in _ADMIN:
            if not source.client.policy.admin:
                raise _Refusal(
                    ErrorCode.DENIED, f"the operation {op} is for clients with admin: true", BROKER
                )
            operation = _ADMIN[op]
            whom = arguments.get("address")
            broker.log_events.note(
                "admin.asked", source, whom[:_LONGEST] if isinstance(whom, str) else "", op
            )
        if operation is None:
            known = ", ".join(sorted((*_OPEN, *_ADMIN)))
            raise _Refusal(
                ErrorCode.UNSUPPORTED, f"there is no operation {op[:64]!r}: {known}", BROKER
            )
        reply = operation(broker, source, request.id, arguments)
    except _Refusal as refusal:
        broker.refuse(source, request.id, refusal.code, str(refusal), refusal.name)
    else:
        if reply is not None:
            reply_to(broker, source, request.id, reply)


def reply_to(broker: Broker, source: Session, message_id: int, reply: _Arguments) -> None:
    """Send the REPLY to an operation."""
    reply_with(broker, source, message_id, json.dumps(reply).encode())


def reply_with(broker: Broker, source: Session, message_id: int, payload: bytes) -> None:
    """Send the REPLY to an operation. payload: a JSON object."""
    broker.answer(source, Envelope(Kind.REPLY, message_id, BROKER, payload, codec=CodecId.JSON))


def _read(payload: bytes) -> tuple[str, _Arguments]:
    if len(payload) > _LARGEST:
        message = f"an operation of {len(payload)} bytes; $broker takes at most {_LARGEST}"
        raise _Refusal(ErrorCode.UNSUPPORTED, message, BROKER)
    try:
        arguments = json.loads(payload)
    except (ValueError, RecursionError) as error:
        raise _Refusal(
            ErrorCode.UNSUPPORTED,
            "an operation is a JSON object with an op; this is no JSON",
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


# For every client


def _whoami(broker: Broker, source: Session, message_id: int, arguments: _Arguments) -> _Arguments:
    return {
        "name": source.client.name,
        "address": source.address,
        "version": broker.version,
        "protocol": PROTOCOL_VERSION,
        "limits": {"max_message": broker.limits.max_message, "queue": source.client.config.queue},
        "features": _FEATURES,
    }


def _ping(broker: Broker, source: Session, message_id: int, arguments: _Arguments) -> _Arguments:
    return {}


class Question:
    """An operation with a long answer, which is built in steps as deferred work."""

    __slots__ = ("arguments", "id", "op", "source")

    def __init__(self, source: Session, message_id: int, op: str, arguments: _Arguments) -> None:
        self.source = source
        self.id = message_id
        self.op = op
        self.arguments = arguments

    def begin(self, broker: Broker) -> Iterator[None]:
        """Build the answer in steps and send it."""
        source = self.source
        payload = yield from _LONG[self.op](broker, source)
        broker.asking.discard(source)
        broker.answer(source, Envelope(Kind.REPLY, self.id, BROKER, payload, codec=CodecId.JSON))
        if source.held_by is source:
            broker.release(source)


def _ask(op: str) -> _Operation:
    def ask(broker: Broker, source: Session, message_id: int, arguments: _Arguments) -> None:
        broker.asking.add(source)
        broker.charge(broker.deferred.add(Question(source, message_id, op, arguments)) * _STEP)

    return ask


def _in_pieces(
    name: str, entries: Iterable[_Arguments | None], each: int
) -> Generator[None, None, bytes]:
    """Return a JSON object with one list of the entries that are not None.

    It yields after every ``each`` entries.
    """
    pieces: list[bytes] = []
    some: list[_Arguments] = []
    for count, entry in enumerate(entries, 1):
        if entry is not None:
            some.append(entry)
        if count % each == 0:
            if some:
                pieces.append(json.dumps(some)[1:-1].encode())
                some = []
            yield
    if some:
        pieces.append(json.dumps(some)[1:-1].encode())
    return b"".join((f'{{"{name}": ['.encode(), b", ".join(pieces), b"]}"))


def _clients(broker: Broker, source: Session) -> Generator[None, None, bytes]:
    may_see = source.client.policy.sending
    entries = (
        (
            {"name": client.name, "online": client.shown_online, "since": client.shown_since}
            if source.open and may_see(client.name) is not None
            else None
        )
        for client in list(broker.exchange.clients.values())
    )
    return _in_pieces("clients", entries, _CLIENTS)


def _subscription(broker: Broker, arguments: _Arguments) -> tuple[str, str | None]:
    topic, group = _text(arguments, "topic"), arguments.get("group")
    broker.charge(topic.count(".") // _TOKENS + broker.topics.searches // _SEARCHES)
    try:
        check_pattern(topic)
    except InvalidName as error:
        raise _Refusal(ErrorCode.UNSUPPORTED, str(error), BROKER) from error
    if group is not None and not (isinstance(group, str) and is_name(group)):
        raise _Refusal(ErrorCode.UNSUPPORTED, "a group is named as a client is", BROKER)
    return topic, group


def _subscribe(
    broker: Broker, source: Session, message_id: int, arguments: _Arguments
) -> _Arguments:
    topic, group = _subscription(broker, arguments)
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
    broker.topics.add(topic, source, group)
    source.subscriptions.add((topic, group))
    return {"topic": topic, "group": group}


def _unsubscribe(
    broker: Broker, source: Session, message_id: int, arguments: _Arguments
) -> _Arguments:
    topic, group = _subscription(broker, arguments)
    broker.topics.discard(topic, source, group)
    source.subscriptions.discard((topic, group))
    return {"topic": topic, "group": group}


def _goaway(broker: Broker, source: Session, message_id: int, arguments: _Arguments) -> None:
    source.goaway = True
    reply_to(broker, source, message_id, {})
    if broker.draining:
        part(broker, source)


def _finished(broker: Broker, source: Session, message_id: int, arguments: _Arguments) -> None:
    if not (source.goaway and source.told):
        raise _Refusal(ErrorCode.UNSUPPORTED, f"{DRAINING} and goaway come before finished", BROKER)
    if source.finishing is not None:
        raise _Refusal(ErrorCode.UNSUPPORTED, "finished has been asked already", BROKER)
    source.finishing = message_id
    broker.finishing[source] = None


# For clients with admin: true


def _stats(broker: Broker, source: Session) -> Generator[None, None, bytes]:
    return json.dumps((yield from _count(broker))).encode()


def stats(broker: Broker) -> _Arguments:
    """Return the broker's counters since it started."""
    counting = _count(broker)
    while True:
        try:
            next(counting)
        except StopIteration as end:
            found: _Arguments = end.value
            return found


def _count(broker: Broker) -> Generator[None, None, _Arguments]:
    # The list of sessions is fixed first. A session that ends meanwhile counts with its
    # last numbers.
    sums = Counter(broker.totals)
    clients = list(broker.exchange.clients.values())
    sessions: list[Session] = []
    online = waiting = 0
    for number, client in enumerate(clients, 1):
        online += client.online
        sessions += client.sessions.values()
        if number % _COUNTED == 0:
            yield
    for number, session in enumerate(sessions, 1):
        for counter in _SUMS:
            sums[counter] += getattr(session, counter)
        waiting += session.outbox.waiting
        if number % _CONNECTIONS == 0:
            yield
    return {
        "version": broker.version,
        "routing": broker.routing,
        "started_at": broker.started_at,
        "upgrades": broker.upgrades,
        "draining": broker.draining,
        "clients": len(clients),
        "online": online,
        "connections": len(sessions),
        "subscriptions": len(broker.topics),
        "waiting_bytes": waiting,
        "dropped": broker.dropped,
        "refused": dict(broker.refused),
        **{counter: sums[counter] for counter in _SUMS},
    }


def _connections(broker: Broker, source: Session) -> Generator[None, None, bytes]:
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
            }
            if session.open
            else None
        )
        for session in list(broker.exchange.sessions())
    )
    return _in_pieces("connections", entries, _CONNECTIONS)


def _disconnect(
    broker: Broker, source: Session, message_id: int, arguments: _Arguments
) -> _Arguments:
    address = _text(arguments, "address")
    name, instance = split_address(address)
    session = broker.exchange.find(address)
    client = broker.exchange.resolve(name)
    if client is None:
        raise _Refusal(ErrorCode.NO_SUCH_CLIENT, f"there is no client {address}", address)
    found = [session] if session is not None else [] if instance else list(client.sessions.values())
    if not found:
        raise _Refusal(ErrorCode.OFFLINE, f"{address} is not connected", address)
    for each in found:
        broker.close(each, f"disconnected by {source.client.name}", code=ErrorCode.DISCONNECTED)
    return {"disconnected": [each.address for each in found]}


def _can(broker: Broker, source: Session, message_id: int, arguments: _Arguments) -> _Arguments:
    sender, verb, target = (_text(arguments, key) for key in ("sender", "verb", "target"))
    client = broker.exchange.resolve(sender)
    if client is None:
        raise _Refusal(ErrorCode.NO_SUCH_CLIENT, f"there is no client {sender}", sender)
    policy = client.policy
    if verb == "send" and target == BROKER:
        return {"allowed": True, "rule": None, "where": None, "why": "everyone may ask the broker"}
    if verb == "publish" and target.startswith("$"):
        why = "topics that begin with $ are the broker's own"
        return {"allowed": False, "rule": None, "where": None, "why": why}
    if verb == "send":
        rule, rules = policy.sending(target.partition("/")[0]), client.config.send_to
        if rule is not None and broker.exchange.resolve(target.partition("/")[0]) is None:
            return {
                "allowed": False,
                "rule": None,
                "where": None,
                "why": f"there is no client {target}",
            }
    elif verb == "publish":
        rule, rules = policy.publishing(target), client.config.publish
    elif verb == "subscribe":
        rule, rules = policy.subscribing(target), client.config.subscribe
    else:
        raise _Refusal(ErrorCode.UNSUPPORTED, "verb is send, publish or subscribe", BROKER)
    if rule is not None:
        return {
            "allowed": True,
            "rule": rule.pattern,
            "where": _where(rule),
            "why": f"{rule.pattern} allows it",
        }
    given = ", ".join(each.pattern for each in rules) or "nothing"
    where = _where(rules[0]) if rules else None
    return {
        "allowed": False,
        "rule": None,
        "where": where,
        "why": f"none of its rules matches: {given}",
    }


def _where(rule: Rule) -> str:
    return "default" if rule.source is None else str(rule.source)


def _reload(broker: Broker, source: Session, message_id: int, arguments: _Arguments) -> None:
    if not isinstance(arguments.get("dry_run", False), bool):
        raise _Refusal(ErrorCode.UNSUPPORTED, "dry_run is true or false", BROKER)
    broker.order("reload", source, message_id, arguments)


def _order(op: str) -> _Operation:
    def order(broker: Broker, source: Session, message_id: int, arguments: _Arguments) -> None:
        broker.order(op, source, message_id, arguments)

    return order


#: Operations with a long answer: see Question.
_LONG: Final[dict[str, Callable[[Broker, Session], Generator[None, None, bytes]]]] = {
    "clients": _clients,
    "stats": _stats,
    "connections": _connections,
}
_OPEN: Final[dict[str, _Operation]] = {
    "whoami": _whoami,
    "ping": _ping,
    "clients": _ask("clients"),
    "subscribe": _subscribe,
    "unsubscribe": _unsubscribe,
    "goaway": _goaway,
    "finished": _finished,
}
_ADMIN: Final[dict[str, _Operation]] = {
    "stats": _ask("stats"),
    "connections": _ask("connections"),
    "disconnect": _disconnect,
    "can": _can,
    "keys": _order("keys"),
    "reload": _reload,
    "upgrade": _order("upgrade"),
    "drain": _order("drain"),
    "log_level": _order("log_level"),
}
