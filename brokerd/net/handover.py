"""A server's sockets with all that belongs to them, taken down for another process and set up again there.

`capture` changes nothing: whether the other process takes over or not is decided later. `Inheritance` is the other
side: it builds everything and touches no socket until `begin`. Facts are plain values, bytes are in the
snapshot's pieces, and the sockets go by their descriptors. Keys are named by their ids and never captured.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Iterable, Sequence
from typing import Any, Final

from brokerd.config.values import Key, ListenConfig, Source
from brokerd.core import snapshot
from brokerd.core.events import announce
from brokerd.core.parcel import SLACK, Parcel
from brokerd.core.precopy import Copier, Copies
from brokerd.core.session import Session
from brokerd.core.snapshot import Facts, Pieces, Snapshot
from brokerd.net.keyring import Credential
from brokerd.net.knock import Knock
from brokerd.net.link import GRACE, Link
from brokerd.net.listening import ListenError, Listening
from brokerd.net.parting import Parting
from brokerd.net.server import Server
from brokerd.net.tally import Outcome
from brokerd_client.address import Address

__all__ = ["Inheritance", "capture", "describe", "let_go_of_bound", "position_of"]

_LOOK_AGAIN_S: Final = 0.02
#: What stands for a key that is not configured any more; no keyring holds it.
_GONE: Final = Key(b"", source="a key that is no longer configured")
_NOWHERE: Final = Source("", 0)


# Out


def capture(server: Server, copier: Copier | None = None) -> tuple[Snapshot, list[int]]:
    """Return everything the server has, and the descriptors of its sockets in the order in which they are described.

    copier: what it has copied is left out.
    Everything decided has to be carried out: ``settle`` comes before. Connections that can't be handed over
    are closed, if there still are any: see ``let_go_of_bound``.
    """
    for link in [link for link in server.links if not link.can_hand_over]:
        link.lost("it came while the broker was being replaced, and can't be handed over")
    links = _ordered(server)
    taken = snapshot.capture(server.broker, [link.session for link in links], server.loop.time(), copier)
    farewells = server.farewells()
    knocks = [knock for knock in server.door.knocks() if knock.can_hand_over]
    taken.facts = {
        "core": taken.facts,
        "listening": [_listening(each) for each in server.listening],
        "links": [_link(link, taken) for link in links],
        "knocks": [_knock(knock, server, taken) for knock in knocks],
        "farewells": [{"socket": _socket(each.sock), "left_s": each.time_left_s} for each in farewells],
        "failures": server.door.failures.ages(server.loop.time()),
        "keys": server.keyring.uses(),
        "tally": server.tally.values(),
    }
    sockets = [each.sock for group in (server.listening, links, knocks, farewells) for each in group]
    return taken, [sock.fileno() for sock in sockets]


def position_of(server: Server, session: Session) -> int:
    """Return which of the captured connections is this session's."""
    return [link.session for link in _ordered(server)].index(session)


async def let_go_of_bound(server: Server, why: str) -> None:
    """Close the connections that no other process can go on with; return when they are closed.

    No other such connection is accepted from now on: see ``Server.accept_bound``.
    """
    server.hold_back_bound()
    parting = Parting(server, lambda link: not link.can_hand_over, why)
    deadline = server.loop.time() + GRACE
    while parting.links() and server.loop.time() < deadline:  # noqa: ASYNC110 - a look is more than waiting
        await asyncio.sleep(await parting.look(deadline))
    await parting.end(deadline + GRACE)
    server.settle()
    while parting.links():  # noqa: ASYNC110 - rare
        # Each has GRACE to take what is written for it.
        await asyncio.sleep(_LOOK_AGAIN_S)


def _ordered(server: Server) -> list[Link]:
    """Return the links in the order they came, in which a pool's connections are kept."""
    return sorted(server.links, key=lambda link: link.session.number)


def _socket(sock: socket.socket) -> list[int]:
    return [int(sock.family), int(sock.type), sock.proto]


def describe(address: Address) -> list[Any]:
    """Return an address as plain values, for ``Address(*values)``."""
    return [address.family, address.host, address.port, address.path, address.tls]


def _listening(each: Listening) -> Facts:
    assert isinstance(each.sock, socket.socket), "there are no named pipes where processes hand over sockets"
    return {
        "socket": _socket(each.sock),
        "configured": describe(each.config.address),
        "address": describe(each.address),
        "inode": each.inode,
        "mode": each.config.mode,
        "group": each.config.group,
        "first_group": each.first_group,
    }


def _link(link: Link, taken: Snapshot) -> Facts:
    parcel = link.parcel
    taken.pieces.append(link.tail)
    if parcel is not None:
        taken.pieces.append(memoryview(parcel)[SLACK : parcel.filled])
    return {
        "socket": _socket(link.sock),
        "client": link.credential.client.name,
        "key": link.credential.key.key_id,
        "tail": len(link.tail),
        "waits": link.waits,
        "parcel": None if parcel is None else [parcel.filled - SLACK, parcel.end - SLACK],
    }


def _knock(knock: Knock, server: Server, taken: Snapshot) -> Facts:
    assert isinstance(knock.sock, socket.socket), "TLS can't be handed over"
    taken.pieces += [knock.nonce, knock.heard]
    welcomed = knock.credential if knock.spoken > 1 else None
    return {
        "socket": _socket(knock.sock),
        "peer": knock.peer,
        "origin": knock.origin,
        "listener": knock.listener,
        "allow_md5": knock.allow_md5,
        "left_s": knock.deadline - server.loop.time(),
        "nonce": len(knock.nonce),
        "heard": len(knock.heard),
        "spoken": knock.spoken,
        "welcomed": welcomed and [welcomed.client.name, welcomed.key.key_id],
    }


# And back


class Inheritance:
    """What another process captured, set up in a new server whose broker is still empty.

    opened: listening sockets that the other one did not have. sockets: every descriptor, in order; they belong to this
    object from now on. copies: what was copied before.
    sessions: the open ones, in the order in which they were captured.
    Raises BadSnapshot, KeyError, ValueError, TypeError or OSError for what can't have been captured.
    """

    def __init__(
        self,
        server: Server,
        facts: Facts,
        pieces: Pieces,
        descriptors: Sequence[int],
        listen: Iterable[ListenConfig],
        opened: Iterable[Listening],
        copies: Copies | None = None,
    ) -> None:
        self._server = server
        self._opened = list(opened)
        self._rest = iter(descriptors)
        self._now = server.loop.time()
        wanted = {entry.address: entry for entry in listen}
        #: Each with its entry of the new configuration, None where that has none.
        self._listening = [(each, wanted.get(each.config.address)) for each in map(self._ear, facts["listening"])]
        self.sessions = snapshot.restore(server.broker, facts["core"], pieces, self._now, copies)
        if len(self.sessions) != len(facts["links"]):
            raise ValueError("there are not as many sockets as connections")
        self.links = [self._link(*each, pieces) for each in zip(self.sessions, facts["links"], strict=True)]
        self._knocks = [(self._knock(each, pieces), each["welcomed"]) for each in facts["knocks"]]
        self._farewells = [(self._socket(each), each["left_s"]) for each in facts["farewells"]]
        if len(pieces):
            raise ValueError(f"{len(pieces)} bytes are left that belong to nobody")
        server.door.failures.remember(facts["failures"], self._now)
        server.keyring.take_uses(facts["keys"])
        # An older process does not tell.
        server.tally.go_on_from(facts.get("tally", {}))

    def _socket(self, facts: Facts) -> socket.socket:
        family, type, proto = facts["socket"]
        sock = socket.socket(family, type, proto, fileno=next(self._rest))
        # It is so already, as it is for the other process; but this object has to know.
        sock.setblocking(False)
        return sock

    def _ear(self, facts: Facts) -> Listening:
        place = Address(*facts["configured"])
        former = ListenConfig(place, facts["mode"], facts["group"], allow_md5=False, source=_NOWHERE)
        inode = None if facts["inode"] is None else (facts["inode"][0], facts["inode"][1])
        return Listening(former, self._socket(facts), Address(*facts["address"]), inode, facts["first_group"])

    def _link(self, session: Session, facts: Facts, pieces: Pieces) -> Link:
        sock = self._socket(facts)
        credential = self._server.keyring.find(facts["client"], facts["key"])
        link = Link(self._server, sock, credential or Credential(session.client.config, _GONE))
        link.session, session.link = session, link
        link.tail = bytes(pieces.take(facts["tail"]))
        link.waits = facts["waits"]
        if facts["parcel"] is not None:
            filled, size = facts["parcel"]
            link.parcel = Parcel(pieces.take(filled), size)
        return link

    def _knock(self, facts: Facts, pieces: Pieces) -> Knock:
        nonce = bytes(pieces.take(facts["nonce"]))
        deadline = self._now + facts["left_s"]
        knock = Knock(
            self._socket(facts), "", facts["listener"], allow_md5=facts["allow_md5"], deadline=deadline, nonce=nonce
        )
        knock.peer, knock.origin = facts["peer"], facts["origin"]
        knock.heard += pieces.take(facts["heard"])
        knock.spoken = facts["spoken"]
        return knock

    def begin(self) -> None:
        """Go on where the other process stopped; from here on this one alone has the sockets."""
        server = self._server
        unwanted = {each.config.address for each, entry in self._listening if entry is None}
        for listening, entry in self._listening:
            if entry is not None:
                self._alter(listening, entry)
        server.start([each for each, _ in self._listening])
        server.start(self._opened)
        server.links.update(self.links)
        for link in self.links:
            server.pulse.watch(link, inherited=True)
            link.go_on()
        for sock, left_s in self._farewells:
            server.farewell(sock, left_s)
        for knock, welcomed in self._knocks:
            if welcomed is not None:
                knock.credential = server.keyring.find(*welcomed)
            if welcomed is not None and knock.credential is None:
                knock.sock.close()
                server.on_refused(knock, "the key it uses was removed from the configuration", Outcome.REJECTED)
            else:
                server.door.take_over(knock)
        server.stop_listening_at(unwanted)
        for session, why in server.misfits():
            server.broker.close(session, why)
        announce(server.broker, "$broker.upgraded", json.dumps({"version": server.broker.version}))
        server.settle()

    def _alter(self, listening: Listening, entry: ListenConfig) -> None:
        """Take over the settings of the new configuration; the connections go on even where that fails."""
        try:
            listening.alter(entry)
        except ListenError as error:
            self._server.log.warning("listener.unchanged", listener=str(listening.address), reason=str(error))
            listening.config = entry
