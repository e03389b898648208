"""The `$broker` operations: requests that the broker itself answers.

An operation is a REQUEST whose payload is a JSON object ``{"op": NAME, ...}``. Its
REPLY is a JSON object; a refusal is an ERROR (docs/protocol.md, "Operations").

Each operation is a method that returns the reply, as it is or as JSON. If it returns
None, the reply is sent by another part of the broker or the daemon, mostly later.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from brokerd.core.goaway import DRAINING
from brokerd.core.incidents import place_of
from brokerd.core.mailboxes.operations import MailboxOperations
from brokerd.core.refusal import LONGEST, Refusal, text_of
from brokerd.core.taps import MOST as MOST_TAPS
from brokerd_client.errors import InvalidName
from brokerd_client.wire.envelope import (
    BROKER,
    ErrorCode,
    check_pattern,
    is_name,
    split_address,
)

if TYPE_CHECKING:
    from brokerd.config.values import Rule
    from brokerd.core.channels import Channels
    from brokerd.core.cluster.remote_traffic import RemoteTraffic
    from brokerd.core.deferred import Deferred
    from brokerd.core.exchange import Client, Exchange
    from brokerd.core.goaway import Goaway
    from brokerd.core.held_senders import HeldSenders
    from brokerd.core.in_flight import InFlight
    from brokerd.core.incidents import Incident, Incidents
    from brokerd.core.mailboxes.mailboxes import Mailboxes
    from brokerd.core.replies import Replies
    from brokerd.core.session import Session
    from brokerd.core.status import Status
    from brokerd.core.taps import Taps
    from brokerd.core.topics import Topics
    from brokerd.core.turn import Turn

__all__ = ["PROTOCOL_VERSION", "AdminCommand", "Operations", "Question"]

PROTOCOL_VERSION: Final = 1

#: Most bytes of JSON per operation: some milliseconds' work. The largest message
#: allowed would take seconds.
_LARGEST: Final = 128 * 1024
#: Seconds for which keys of stored messages are remembered, told while no host with a
#: store is known: the default of ``store.dedup``.
_DEDUP_S: Final = 3600.0
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
#: Incidents looked at per frame charged to the turn budget, and most that an answer has.
_LOOKED_AT: Final = 64
_INCIDENTS: Final = 100
#: Mailboxes listed per step of a long answer.
_MAILBOXES: Final = 8
#: Features that this broker offers beyond the first version of the protocol.
_FEATURES: Final = ("goaway", "cancels", "in_flight", "channels")
#: Most requests in flight that a connection may ask for.
_MOST_IN_FLIGHT: Final = 10_000_000
#: Counters that are the sum of those of the sessions.
_SUMS: Final = ("messages_in", "bytes_in", "messages_out", "bytes_out")

#: As json.loads, which would look for other encodings first, and for white space twice.
_scan: Final = json.JSONDecoder().raw_decode
#: White space of JSON.
_SPACE: Final = " \t\n\r"
#: The JSON of a string. An encoder of dicts takes ten times as long.
_quote: Final = json.encoder.encode_basestring_ascii

_Arguments: TypeAlias = dict[str, Any]
_Operation: TypeAlias = (
    "Callable[[Operations, Session, int, _Arguments], _Arguments | bytes | None]"
)


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

    traffic: the traffic with other hosts; None without a cluster.
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
        incidents: Incidents,
        taps: Taps,
        channels: Channels,
        mailboxes: Mailboxes,
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
        self._channels = channels
        self._incidents = incidents
        self._taps = taps
        self._mailboxes = mailboxes
        self._on_mailboxes = MailboxOperations(
            mailboxes, replies, self._addresses_of, self._home_of
        )
        self.traffic: RemoteTraffic | None = None
        self.asking: set[Session] = set()
        self.admin_commands: list[AdminCommand] = []

    def serve(self, source: Session, message_id: int, payload: memoryview) -> None:
        """Carry out one REQUEST to ``$broker`` and answer it."""
        try:
            if len(payload) > _LARGEST:
                self._check_size(source, len(payload))
            op, arguments = _read(payload)
            operation = _OPEN.get(op)
            if operation is None and op in _ADMIN:
                if not source.client.policy.admin:
                    raise Refusal(
                        ErrorCode.DENIED,
                        f"the operation {op} is only for clients with admin: true",
                        BROKER,
                    )
                operation = _ADMIN[op]
                about = arguments.get("address", arguments.get("pattern"))
                self._replies.log_events.note(
                    "admin.asked",
                    source,
                    about[:LONGEST] if isinstance(about, str) else "",
                    op,
                )
            if operation is None:
                names = ", ".join(sorted((*_OPEN, *_ADMIN)))
                raise Refusal(
                    ErrorCode.UNSUPPORTED,
                    f"unknown operation {op[:64]!r}: use one of {names}",
                    BROKER,
                )
            reply = operation(self, source, message_id, arguments)
        except Refusal as refusal:
            self._replies.refuse(
                source,
                message_id,
                refusal.code,
                str(refusal),
                refusal.name,
                topic=refusal.topic,
                field=refusal.field,
                host=refusal.host,
                addresses=refusal.addresses,
            )
        else:
            if isinstance(reply, bytes):
                self._replies.reply_json(source, message_id, reply)
            elif reply is not None:
                self._replies.reply(source, message_id, reply)

    def _check_size(self, source: Session, size: int) -> None:
        """Refuse a long operation. One with a message for a mailbox in it may be longer: in
        base64, that has a third more bytes.
        """
        most = _LARGEST
        if source.client.policy.admin:
            most += self._mailboxes.largest * 4 // 3
        if size > most:
            message = f"the operation has {size} bytes; at most {most} are allowed"
            raise Refusal(ErrorCode.UNSUPPORTED, message, BROKER)

    def queue_question(self, source: Session, message_id: int, op: str) -> None:
        """Queue an operation with a long answer."""
        self.asking.add(source)
        steps = self._deferred.add(Question(self, source, message_id, op))
        self._turn.charge(steps * _STEP)

    def answer_in_steps(self, question: Question) -> Iterator[None]:
        """Build a long answer in steps and send it."""
        source = question.source
        pieces = yield from _LONG[question.op](self, source)
        self.asking.discard(source)
        self._replies.reply_json(source, question.id, *pieces)
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
                **self._mailbox_limits(source),
            },
            "features": (
                *_FEATURES,
                *["mailboxes"] * (self._mailboxes.is_active or self.traffic is not None),
            ),
            **({} if self.traffic is None else {"host": self.traffic.host}),
        }

    def _mailbox_limits(self, source: Session) -> _Arguments:
        if not self._mailboxes.is_active and self.traffic is None:
            return {}
        mailbox = source.client.config.mailbox
        if mailbox is not None:
            of_client: _Arguments = {"window": mailbox.window, "ack_timeout": mailbox.ack_timeout}
        else:
            home = source.client.config.home
            of_client = {"home": home} if home else {}
        # The message may be for a mailbox of any host.
        dedup = self._mailboxes.dedup if self.traffic is None else self.traffic.cluster.dedup
        return {"dedup": dedup or _DEDUP_S, **of_client}

    def _home_of(self, name: str) -> str:
        client = self._exchange.resolve(name)
        return "" if client is None else client.config.home

    def _addresses_of(self, host: str) -> tuple[str, ...]:
        return () if self.traffic is None else self.traffic.addresses_of(host)

    def _hosts(self, source: Session, message_id: int, arguments: _Arguments) -> _Arguments:
        return {"host": None, "hosts": []} if self.traffic is None else self.traffic.show_hosts()

    def _list_mailboxes(self, source: Session) -> Generator[None, None, list[bytes]]:
        return _in_pieces("mailboxes", self._on_mailboxes.listed(source), _MAILBOXES)

    def _open_mailbox(self, source: Session, message_id: int, arguments: _Arguments) -> None:
        self._on_mailboxes.open(source, message_id, arguments)

    def _close_mailbox(self, source: Session, message_id: int, arguments: _Arguments) -> _Arguments:
        return self._on_mailboxes.close(source, message_id, arguments)

    def _show_mailbox(self, source: Session, message_id: int, arguments: _Arguments) -> None:
        self._on_mailboxes.show(source, message_id, arguments)

    def _kick_mailbox(self, source: Session, message_id: int, arguments: _Arguments) -> None:
        self._on_mailboxes.kick(source, message_id, arguments)

    def _drop_mailbox(self, source: Session, message_id: int, arguments: _Arguments) -> None:
        self._on_mailboxes.drop(source, message_id, arguments)

    def _purge_mailbox(self, source: Session, message_id: int, arguments: _Arguments) -> None:
        self._on_mailboxes.purge(source, message_id, arguments)

    def _import_messages(self, source: Session, message_id: int, arguments: _Arguments) -> None:
        self._on_mailboxes.import_(source, message_id, arguments)

    def _ping(self, source: Session, message_id: int, arguments: _Arguments) -> _Arguments:
        return {}

    def _clients(self, source: Session) -> Generator[None, None, list[bytes]]:
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
        topic, group = text_of(arguments, "topic"), arguments.get("group")
        if cost := topic.count(".") // _TOKENS + self._topics.searches // _SEARCHES:
            self._turn.charge(cost)
        try:
            check_pattern(topic)
        except InvalidName as error:
            raise Refusal(ErrorCode.UNSUPPORTED, str(error), BROKER) from error
        if group is not None and not (isinstance(group, str) and is_name(group)):
            raise Refusal(
                ErrorCode.UNSUPPORTED,
                "invalid group name: use 1 to 64 letters, digits, '_', '.', '-'",
                BROKER,
            )
        return topic, group

    def _subscribe(self, source: Session, message_id: int, arguments: _Arguments) -> bytes:
        topic, group = self._subscription(arguments)
        if source.retired:
            raise Refusal(ErrorCode.SHUTTING_DOWN, "the broker closes this connection", BROKER)
        if source.client.policy.subscribing(topic) is None:
            message = f"{source.client.name} may not subscribe to {topic}"
            raise Refusal(ErrorCode.DENIED, message, BROKER, topic=topic, field="subscribe")
        config = source.client.config
        if (
            len(source.subscriptions) >= config.subscriptions
            and (topic, group) not in source.subscriptions
        ):
            message = (
                f"no more than {config.subscriptions} subscriptions"
                f" (clients.{config.name}.subscriptions)"
            )
            raise Refusal(ErrorCode.FULL, message, BROKER)
        if self._topics.add(topic, source, group) and self.traffic is not None:
            self.traffic.subscribed(topic, group)
        source.subscriptions.add((topic, group))
        return _json_of(topic, group)

    def _unsubscribe(self, source: Session, message_id: int, arguments: _Arguments) -> bytes:
        topic, group = self._subscription(arguments)
        if self._topics.discard(topic, source, group) and self.traffic is not None:
            self.traffic.unsubscribed(topic, group)
        source.subscriptions.discard((topic, group))
        return _json_of(topic, group)

    def _ask_for_goaway(self, source: Session, message_id: int, arguments: _Arguments) -> None:
        source.goaway = True
        self._replies.reply(source, message_id, {})
        if self._status.draining:
            self._goaway.part(source)

    def _finished(self, source: Session, message_id: int, arguments: _Arguments) -> None:
        if not (source.goaway and source.goaway_sent):
            raise Refusal(
                ErrorCode.UNSUPPORTED,
                f"finished is valid only after goaway and the event {DRAINING}",
                BROKER,
            )
        if source.finishing is not None:
            raise Refusal(ErrorCode.UNSUPPORTED, "finished has been sent already", BROKER)
        source.finishing = message_id
        self._goaway.finishing[source] = None

    def _ask_for_cancels(
        self, source: Session, message_id: int, arguments: _Arguments
    ) -> _Arguments:
        source.cancels = True
        return {}

    def _listen(self, source: Session, message_id: int, arguments: _Arguments) -> _Arguments:
        source.listens = True
        return {}

    def _unlisten(self, source: Session, message_id: int, arguments: _Arguments) -> _Arguments:
        source.listens = False
        return {}

    def _limit_in_flight(
        self, source: Session, message_id: int, arguments: _Arguments
    ) -> _Arguments:
        limit = arguments.get("n")
        if type(limit) is not int or not 0 <= limit <= _MOST_IN_FLIGHT:
            raise Refusal(
                ErrorCode.UNSUPPORTED,
                f"invalid n: in_flight needs a number of requests from 0 to {_MOST_IN_FLIGHT}",
                BROKER,
            )
        self._in_flight.set_limit(source, limit)
        return {"in_flight": source.in_flight_limit}

    def _stats(self, source: Session) -> Generator[None, None, list[bytes]]:
        return [json.dumps((yield from self._count())).encode()]

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
        stored: Counter[str] = Counter()
        for number, mailbox in enumerate(list(self._mailboxes.boxes.values()), 1):
            stored.update(mailbox.counts())
            if number % _COUNTED == 0:
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
            "channels": len(self._channels.open),
            "subscriptions": len(self._topics),
            "waiting_bytes": waiting,
            "requests_in_flight": in_flight,
            "requests_waiting": waiting_requests,
            "dropped": self._replies.dropped,
            "refused": dict(self._replies.refused),
            **{counter: sums[counter] for counter in _SUMS},
            **({"mailboxes": dict(stored)} if self._mailboxes.is_active else {}),
        }

    def _connections(self, source: Session) -> Generator[None, None, list[bytes]]:
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
                    "held_by": None if session.held_by is None else session.held_by.address,
                    "holds": len(session.waiters),
                    "subscriptions": len(session.subscriptions),
                    "owed": len(session.incoming_requests),
                    "in_flight": session.in_flight_limit,
                    **_mailbox_of(session),
                }
                if session.open
                else None
            )
            for session in list(self._exchange.sessions())
        )
        return _in_pieces("connections", entries, _CONNECTIONS)

    def _list_channels(self, source: Session) -> Generator[None, None, list[bytes]]:
        return _in_pieces("channels", self._channels.describe(), _CONNECTIONS)

    def _disconnect(self, source: Session, message_id: int, arguments: _Arguments) -> _Arguments:
        address = text_of(arguments, "address")
        name, instance = split_address(address)
        exact = self._exchange.find(address)
        client = self._exchange.resolve(name)
        if client is None:
            raise Refusal(ErrorCode.NO_SUCH_CLIENT, f"unknown client {address}", address)
        pool = [] if instance else list(client.sessions.values())
        sessions = pool if exact is None else [exact]
        reason = f"disconnected by {source.client.name}"
        channels = 0 if instance else self._channels.disconnect(client, reason)
        if not (sessions or channels):
            raise Refusal(ErrorCode.OFFLINE, f"{address} is not connected", address)
        for session in sessions:
            self._replies.close(session, reason, code=ErrorCode.DISCONNECTED)
        return {
            "disconnected": [session.address for session in sessions],
            "channels": channels,
        }

    def _can(self, source: Session, message_id: int, arguments: _Arguments) -> _Arguments:
        sender, verb, target = (text_of(arguments, key) for key in ("sender", "verb", "target"))
        client = self._exchange.resolve(sender)
        if client is None:
            raise Refusal(ErrorCode.NO_SUCH_CLIENT, f"unknown client {sender}", sender)
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
        if verb == "open":
            return self._can_open(client, target)
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
            raise Refusal(
                ErrorCode.UNSUPPORTED, "invalid verb: use send, open, publish or subscribe", BROKER
            )
        return _ruling(rule, rules)

    def _can_open(self, caller: Client, target: str) -> _Arguments:
        """Return whether a client may open a channel to another one."""
        name = target.partition("/")[0]
        recipient = self._exchange.resolve(name)
        if caller.policy.sending(name) is None:
            return _ruling(None, caller.config.send_to)
        if recipient is None:
            return {
                "allowed": False,
                "rule": None,
                "where": None,
                "why": f"unknown client {target}",
            }
        return _ruling(recipient.policy.opening(caller.name), recipient.config.open_from)

    def _why(self, source: Session, message_id: int, arguments: _Arguments) -> _Arguments:
        own = source.client
        name = text_of(arguments, "name") if "name" in arguments else own.name
        sender = text_of(arguments, "from") if "from" in arguments else ""
        wanted = arguments.get("id")
        if wanted is not None and type(wanted) is not int:
            raise Refusal(ErrorCode.UNSUPPORTED, "invalid id: use a whole number", BROKER)
        is_admin = own.policy.admin
        if name != own.name and not is_admin:
            reason = "without admin: true, a client may only ask about itself"
            raise Refusal(ErrorCode.DENIED, reason, BROKER)
        client = self._exchange.resolve(name)
        if client is None:
            raise Refusal(ErrorCode.NO_SUCH_CLIENT, f"unknown client {name}", name)
        self._turn.charge(len(self._incidents) // _LOOKED_AT)

        def may_see(incident: Incident) -> bool:
            other = split_address(incident.sender)[0]
            return is_admin or not other or own.policy.sending(other) is not None or other == name

        found = filter(may_see, self._incidents.newest(name, sender, wanted))
        incidents = [each.as_object() for each in itertools.islice(found, _INCIDENTS)]
        for incident in incidents:
            if not is_admin:
                # Only administrators read the configuration's files.
                incident["where"] = None
        mailbox = client.mailbox
        stored = {} if mailbox is None else {"mailbox": self._mailboxes.entry(mailbox)}
        return {**_state_of(client), **stored, "incidents": incidents}

    def _tap(self, source: Session, message_id: int, arguments: _Arguments) -> _Arguments:
        payload = arguments.get("payload", False)
        if not isinstance(payload, bool):
            raise Refusal(ErrorCode.UNSUPPORTED, "invalid payload: use true or false", BROKER)
        if arguments.get("pattern", "") is None:
            ended = self._taps.stop(source)
            return {} if ended is None else ended.counts()
        pattern = text_of(arguments, "pattern")
        if source not in self._taps.all and len(self._taps.all) >= MOST_TAPS:
            raise Refusal(ErrorCode.FULL, f"{MOST_TAPS} taps are in use already", BROKER)
        return self._taps.start(source, pattern, payload=payload).counts()

    def _reload(self, source: Session, message_id: int, arguments: _Arguments) -> None:
        if not isinstance(arguments.get("dry_run", False), bool):
            raise Refusal(ErrorCode.UNSUPPORTED, "invalid dry_run: use true or false", BROKER)
        self.queue_command("reload", source, message_id, arguments)


def _read(payload: memoryview) -> tuple[str, _Arguments]:
    try:
        text = str(payload, "utf-8").strip(_SPACE)
        arguments, end = _scan(text)
        if end != len(text):
            raise ValueError("more follows behind the object")
    except (ValueError, RecursionError) as error:
        raise Refusal(
            ErrorCode.UNSUPPORTED,
            "an operation is a JSON object with an op; this is not valid JSON",
            BROKER,
        ) from error
    if not isinstance(arguments, dict) or not isinstance(arguments.get("op"), str):
        raise Refusal(
            ErrorCode.UNSUPPORTED, 'an operation is a JSON object such as {"op": "whoami"}', BROKER
        )
    return arguments.pop("op"), arguments


def _ruling(rule: Rule | None, rules: Sequence[Rule]) -> _Arguments:
    """Return the answer to ``can``. rule: the one of these rules that allows it, or None."""
    if rule is not None:
        return {
            "allowed": True,
            "rule": rule.pattern,
            "where": place_of((rule,)),
            "why": f"{rule.pattern} allows it",
        }
    patterns = ", ".join(each.pattern for each in rules) or "nothing"
    return {
        "allowed": False,
        "rule": None,
        "where": place_of(rules) or None,
        "why": f"none of its rules matches: {patterns}",
    }


def _in_pieces(
    name: str, entries: Iterable[_Arguments | None], step: int
) -> Generator[None, None, list[bytes]]:
    """Return the pieces of a JSON object with one list of the entries that are not None.

    It yields after every ``step`` entries.
    """
    pieces = [f'{{"{name}": ['.encode()]
    batch: list[_Arguments] = []
    separator = ""
    for count, entry in enumerate(entries, 1):
        if entry is not None:
            batch.append(entry)
        if count % step == 0:
            if batch:
                pieces.append(f"{separator}{json.dumps(batch)[1:-1]}".encode())
                batch, separator = [], ", "
            yield
    if batch:
        pieces.append(f"{separator}{json.dumps(batch)[1:-1]}".encode())
    pieces.append(b"]}")
    return pieces


def _json_of(topic: str, group: str | None) -> bytes:
    """Return the reply about a subscription."""
    quoted = "null" if group is None else _quote(group)
    return f'{{"topic": {_quote(topic)}, "group": {quoted}}}'.encode()


def _state_of(client: Client) -> _Arguments:
    """Return whether a client is online, and what its first connections do."""
    sessions = itertools.islice(client.sessions.values(), _INCIDENTS)
    return {
        "name": client.name,
        "online": client.online,
        "since": client.changed_at,
        "connections": [
            {
                "address": session.address,
                "peer": session.peer,
                "since": session.since,
                "waiting_bytes": session.outbox.waiting,
                "queue": session.outbox.limit,
                "slow": session.outbox.blocked,
                "held_by": None if session.held_by is None else session.held_by.address,
                "holds": len(session.waiters),
            }
            for session in sessions
        ],
    }


def _mailbox_of(session: Session) -> _Arguments:
    """Return what a connection holds of its mailbox, if it has opened that."""
    consumer = session.consumer
    if consumer is None:
        return {}
    return {"mailbox_held": len(consumer.held), "mailbox_window": consumer.window}


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
_LONG: Final[dict[str, Callable[[Operations, Session], Generator[None, None, list[bytes]]]]] = {
    "clients": Operations._clients,
    "stats": Operations._stats,
    "connections": Operations._connections,
    "channels": Operations._list_channels,
    "mailboxes": Operations._list_mailboxes,
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
    "listen": Operations._listen,
    "unlisten": Operations._unlisten,
    "mailboxes": _ask("mailboxes"),
    "open_mailbox": Operations._open_mailbox,
    "close_mailbox": Operations._close_mailbox,
    "mailbox_show": Operations._show_mailbox,
    "mailbox_kick": Operations._kick_mailbox,
    "mailbox_drop": Operations._drop_mailbox,
    "mailbox_purge": Operations._purge_mailbox,
    "why": Operations._why,
}
_ADMIN: Final[dict[str, _Operation]] = {
    "stats": _ask("stats"),
    "connections": _ask("connections"),
    "channels": _ask("channels"),
    "mailbox_import": Operations._import_messages,
    "disconnect": Operations._disconnect,
    "can": Operations._can,
    "hosts": Operations._hosts,
    "tap": Operations._tap,
    "keys": _order("keys"),
    "reload": Operations._reload,
    "upgrade": _order("upgrade"),
    "drain": _order("drain"),
    "log_level": _order("log_level"),
}
