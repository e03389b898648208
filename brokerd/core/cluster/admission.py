"""Names that may have one connection only, where several hosts could admit one.

A host that admits a connection asks the hosts where the name is online first: each checks
whether its client is still there, or closes its connection, by ``when_connected``. Where
two hosts have admitted a connection each, unseen by each other, both close the same one:
the newer, or the older with ``replace``. The age is a pair of the time and the host.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import TYPE_CHECKING, Any, Final

from brokerd.config.values import WhenConnected
from brokerd_client.wire.envelope import ErrorCode

if TYPE_CHECKING:
    from brokerd.core.exchange import Client, Exchange
    from brokerd.core.replies import Replies

__all__ = ["Admission", "Verdict"]

#: Seconds for which an answer that no connection has used is kept.
_KEPT_S: Final = 1.0
#: What a host asks another one, by the treatment of a connection more than allowed.
_QUESTIONS: Final = {WhenConnected.REFUSE: "check", WhenConnected.REPLACE: "replace"}


class Verdict(Enum):
    """Whether a connection may join as a name."""

    FREE = "no other host has a connection of the name"
    TAKEN = "the name is connected at another host"
    ASKING = "another host is asked"


class _Question:
    """A question to other hosts.

    waiting: the hosts that have not answered.
    alive: whether a connection of one of them stays.
    """

    __slots__ = ("alive", "deadline", "waiting")

    def __init__(self, hosts: set[str], deadline: float) -> None:
        self.waiting = hosts
        self.alive = False
        self.deadline = deadline


class Admission:
    """Admits connections of names with ``connections: 1`` in a cluster.

    tell: sends a JSON object to another host.
    timeout: returns the seconds that a host has to answer.
    """

    def __init__(
        self,
        exchange: Exchange,
        replies: Replies,
        host: str,
        tell: Callable[[str, dict[str, Any]], None],
        timeout: Callable[[], float],
    ) -> None:
        self._exchange = exchange
        self._replies = replies
        self._host = host
        self._tell = tell
        self._timeout = timeout
        self._questions: dict[str, _Question] = {}

    def judge(self, name: str, now: float) -> Verdict:
        """Return whether one more connection may join as a name that has none here.

        ASKING: the caller asks again in another turn. Other verdicts are given once.
        """
        client = self._exchange.resolve(name)
        if client is None or client.config.connections != 1 or client.sessions:
            return Verdict.FREE
        question = self._questions.get(name)
        if question is not None and question.deadline + _KEPT_S <= now:
            question = None
        if question is None:
            self._questions.pop(name, None)
            if not client.hosts:
                return Verdict.FREE
            question = self._ask(client, now)
        # A host that is away has no connections.
        question.waiting &= client.hosts.keys()
        if question.waiting and now < question.deadline:
            return Verdict.ASKING
        del self._questions[name]
        return Verdict.TAKEN if question.waiting or question.alive else Verdict.FREE

    def needs_answer(self, name: str) -> bool:
        """Return whether other hosts have to be asked before a connection joins as a name."""
        client = self._exchange.resolve(name)
        return client is not None and client.config.connections == 1 and bool(client.hosts)

    def _ask(self, client: Client, now: float) -> _Question:
        question = _Question(set(client.hosts), now + self._timeout())
        self._questions[client.name] = question
        for host in client.hosts:
            self._tell(host, {"op": _QUESTIONS[client.config.when_connected], "name": client.name})
        return question

    def told(self, host: str, body: dict[str, Any]) -> None:
        """Take what another host asks or answers."""
        op, name = body.get("op"), body.get("name")
        if not isinstance(name, str):
            return
        if op in _QUESTIONS.values():
            alive = self._check(host, name, ends=op == "replace")
            self._tell(host, {"op": "answer", "name": name, "alive": alive})
        elif op == "answer":
            question = self._questions.get(name)
            if question is not None:
                question.waiting.discard(host)
                question.alive = question.alive or body.get("alive") is not False

    def _check(self, host: str, name: str, *, ends: bool) -> bool:
        """Return whether a connection of the name stays here. ends: close it."""
        client = self._exchange.resolve(name)
        for session in [] if client is None else list(client.sessions.values()):
            # None: it has closed, and its earlier input is still routed.
            if session.connection.is_gone() is not False or session.closing:
                continue
            if not ends:
                return True
            reason = f"connection replaced by a new one at host {host}"
            self._replies.close(session, reason, code=ErrorCode.REPLACED)
        return False

    def note_other(self, client: Client, host: str, since: float) -> None:
        """Close the connection here if the one at another host stays.

        since: when that was made, in seconds since the epoch.
        """
        if client.config.connections != 1:
            return
        keeps_newer = client.config.when_connected is WhenConnected.REPLACE
        for session in list(client.sessions.values()):
            is_newer = (session.since, self._host) > (since, host)
            if is_newer is not keeps_newer and not session.closing:
                reason = f"the name is connected at host {host} too, and that connection stays"
                self._replies.close(session, reason, code=ErrorCode.REPLACED)
