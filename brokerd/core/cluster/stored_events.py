"""Events that mailboxes at other hosts store: which these are, and what became of them.

The origin sends one copy of such an event to each home, with the flag RECEIPT. The home
answers with a RECEIPT once the event is on disk in its mailboxes, or with an ERROR. These
answers carry the flag ACK, which tells them from answers to messages. The
outcome for the publisher is there when all homes and the origin's own store have answered.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from brokerd.core.mailboxes.commits import Outcome
from brokerd.core.topics import Topics
from brokerd_client.wire.envelope import ErrorCode

if TYPE_CHECKING:
    from brokerd.core.cluster.remote_sessions import RemoteSessions
    from brokerd.core.exchange import Client, Exchange
    from brokerd.core.mailboxes.commits import Commits
    from brokerd.core.session import Session

__all__ = ["Home", "StoredEvents"]

_CODES: Final = {code.value: code for code in ErrorCode}


class Home(NamedTuple):
    """The mailboxes of one host that store an event.

    Attributes:
        host: The host.
        names: The mailboxes.
        session: What its copy is for; None while the host is away.
    """

    host: str
    names: Sequence[str]
    session: Session | None


class StoredEvents:
    """The mailboxes of other hosts that store events, and the answers that are missing."""

    def __init__(self, exchange: Exchange, sessions: RemoteSessions, commits: Commits) -> None:
        self._sessions = sessions
        self._commits = commits
        #: The clients whose mailboxes elsewhere store events, and their patterns.
        self._topics: Topics[Client] = Topics()
        self._patterns: dict[Client, tuple[str, ...]] = {}
        #: By host, publisher's identity and id: the outcomes that wait for the host's
        #: answer, each with the mailboxes there. A publisher may use an id again.
        self._expected: dict[tuple[str, str, int], deque[tuple[Outcome, Sequence[str]]]] = {}
        for client in exchange.clients.values():
            self.configure(client)

    @property
    def largest(self) -> int:
        """Most bytes of a frame for another host."""
        return self._sessions.largest_frame

    def configure(self, client: Client) -> None:
        """Apply the entry of a client, which is new or has changed."""
        self.remove(client)
        patterns = tuple(rule.pattern for rule in client.config.home_subscribe)
        if patterns:
            self._patterns[client] = patterns
        for pattern in patterns:
            self._topics.add(pattern, client)

    def remove(self, client: Client) -> None:
        """Forget a client that is not configured any more."""
        for pattern in self._patterns.pop(client, ()):
            self._topics.discard(pattern, client)

    def clients_of(self, topic: str) -> Sequence[Client]:
        """Return the clients whose mailboxes at other hosts store events on a topic."""
        return tuple(self._topics.find(topic).everyone) if self._patterns else ()

    def homes(self, clients: Sequence[Client]) -> list[Home]:
        """Return the homes of the mailboxes of clients."""
        names: dict[str, list[str]] = {}
        for client in clients:
            names.setdefault(client.config.home, []).append(client.name)
        hosts = {} if self._sessions.is_suspended else self._sessions.hosts
        return [
            Home(name, each, hosts[name].subscriber if name in hosts else None)
            for name, each in names.items()
        ]

    def expect(self, home: Home, outcome: Outcome) -> None:
        """Wait for a home's answer to an event: its copy is on its way."""
        key = home.host, outcome.session.identity.decode(), outcome.id
        self._expected.setdefault(key, deque()).append((outcome, home.names))

    def answer(
        self, host: str, identity: str, message_id: int, refusal: dict[str, Any] | None
    ) -> bool:
        """Take a home's answer; return False if none is expected.

        refusal: what its ERROR says, or None for a RECEIPT.
        """
        found = self._pop(host, identity, message_id)
        if found is None:
            return False
        outcome, names = found
        if refusal is not None:
            code = _CODES.get(str(refusal.get("code")), ErrorCode.IN_DOUBT)
            reason = f"host {host}: {refusal.get('message')}"
            outcome.fail(code, reason, [str(name) for name in refusal.get("names", names)])
        self._commits.answer(outcome)
        return True

    def fail(self, host: str, identity: str, message_id: int, code: ErrorCode, reason: str) -> None:
        """Note that a copy was not accepted, or that this is not known (``in_doubt``)."""
        found = self._pop(host, identity, message_id)
        if found is not None:
            outcome, names = found
            outcome.fail(code, reason, names)
            self._commits.answer(outcome)

    def capture(self, index: Mapping[Session, int]) -> list[list[Any]]:
        """Return the outcomes that wait, for a new process.

        index: the positions of the sessions in the snapshot.
        """
        waiting: dict[Outcome, list[list[Any]]] = {}
        for (host, _, _), expected in self._expected.items():
            for outcome, names in expected:
                waiting.setdefault(outcome, []).append([host, list(names)])
        return [
            [
                index[outcome.session],
                outcome.id,
                outcome.receipt,
                outcome.error,
                outcome.reason,
                outcome.names,
                hosts,
            ]
            for outcome, hosts in waiting.items()
            if outcome.session.open
        ]

    def restore(self, rows: Sequence[Sequence[Any]], sessions: Sequence[Session]) -> None:
        """Go on waiting for the answers that another process waited for."""
        for position, message_id, receipt, error, reason, names, hosts in rows:
            session = sessions[position]
            outcome = Outcome(
                session, message_id, is_event=True, receipt=bool(receipt), missing=len(hosts)
            )
            session.uncommitted += 1
            if error is not None:
                outcome.fail(ErrorCode(error), str(reason), list(names))
            for host, there in hosts:
                self.expect(Home(str(host), tuple(there), None), outcome)

    def _pop(
        self, host: str, identity: str, message_id: int
    ) -> tuple[Outcome, Sequence[str]] | None:
        key = host, identity, message_id
        expected = self._expected.get(key)
        if expected is None:
            return None
        found = expected.popleft()
        if not expected:
            del self._expected[key]
        return found
