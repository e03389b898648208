"""Which pending connections are dropped when there are too many. A crowd of clients
logs in, and a flood locks out no client.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.broker_process import BrokerProcess
from support.keys import key_of
from support.raw_client import CHALLENGE, WELCOME, Raw, Rejected, prefixed
from support.running_daemon import configuration, running_daemon

from brokerd.net.handshake import admission as admission_module
from brokerd.net.handshake.admission import GRACE_S, Admission, Rank
from brokerd_client.address import Address

LOAD = Path(__file__).resolve().parents[1] / "support" / "load"
CROWD = LOAD / "connection_crowd.py"
FLOODER = LOAD / "connection_flooder.py"


def peer(origin: str, admission: Admission, now: float = 0.0) -> Any:
    """Return a pending connection with the attributes that the admission reads."""

    class Peer(SimpleNamespace):
        __hash__ = object.__hash__

    pending = Peer(origin=origin, rank=Rank.SILENT, moved_at=0.0)
    admission.add(pending, now)
    return pending


# The decision


def test_admission_origin_with_most_handshakes_gives_way() -> None:
    """The oldest handshake of the busiest origin is dropped, even if another origin's
    only handshake is older.
    """
    admission = Admission()
    peer("lonely", admission)
    crowd = [peer("crowd", admission, 1.0 + number) for number in range(3)]
    assert admission.least(now=100.0) == (crowd[0], 0.0)
    admission.remove(crowd[0])
    assert admission.least(now=100.0) == (crowd[1], 0.0)


def test_admission_peer_further_in_handshake_is_dropped_later() -> None:
    """Among peers of one origin, a failed peer is dropped first. Then come a silent
    peer, a peer whose answer is being judged, and a peer with a proved key.
    """
    admission = Admission()
    peers = {rank: peer("a", admission) for rank in reversed(Rank)}
    for rank, each in peers.items():
        admission.advance(each, rank, 0.0)
    dropped = []
    while (least := admission.least(now=100.0)[0]) is not None:
        dropped.append(least.rank)
        admission.remove(least)
    assert dropped == [Rank.FAILED, Rank.SILENT, Rank.JUDGED, Rank.PROVED]


def test_admission_judged_peers_leave_half_of_places_to_silent_peers() -> None:
    """Otherwise a client would have no time to answer: each new peer would push out the
    oldest of a few silent peers.
    """
    admission = Admission()
    judged = [peer("a", admission) for _ in range(200)]
    for each in judged:
        admission.advance(each, Rank.JUDGED, 0.0)
    silent = [peer("a", admission) for _ in range(20)]
    dropped: list[Any] = []
    for _ in range(200):
        least, _ = admission.least(now=100.0)
        assert least is not None
        admission.remove(least)
        dropped.append(least)
        peer("a", admission, 50.0)
    assert dropped[:90] == judged[:90]
    assert dropped[90:110] == silent


def test_admission_proved_peer_outranks_silent_peer_of_another_origin() -> None:
    """With one handshake from each of two origins, the peer with a proved key stays."""
    admission = Admission()
    proved, silent = peer("a", admission), peer("b", admission, 5.0)
    admission.advance(proved, Rank.PROVED, 0.0)
    assert admission.least(now=100.0)[0] is silent


def test_admission_peer_within_grace_is_not_dropped() -> None:
    """Each step of the handshake starts the grace again. A peer that has failed has no
    grace.
    """
    admission = Admission()
    first = peer("a", admission)
    assert admission.least(0.25) == (first, GRACE_S - 0.25)
    admission.advance(first, Rank.JUDGED, 0.5)
    assert admission.least(0.5) == (first, GRACE_S)
    admission.advance(first, Rank.FAILED, 0.5)
    assert admission.least(0.5) == (first, 0.0)


def test_admission_grace_halves_on_drop_and_doubles_on_login() -> None:
    """Each dropped peer halves the grace of its origin, and each login doubles it.
    After a minute the origin has the full grace again.
    """
    admission = Admission()
    admission.got_in("b", 0.0)
    for _ in range(3):
        admission.gave_way("a", 0.0)
    assert admission.grace("a", 0.0) == GRACE_S / 16
    assert admission.grace("b", 0.0) == GRACE_S
    admission.got_in("a", 0.0)
    assert admission.grace("a", 0.0) == GRACE_S / 8
    assert admission.grace("a", 61.0) == GRACE_S


def test_admission_flood_from_many_origins_shortens_grace_of_unknown_ones() -> None:
    """A thousand addresses do not get a thousand graces. An origin whose clients have
    logged in keeps its own grace.
    """
    admission = Admission()
    admission.got_in("home", 0.0)
    for number in range(20):
        admission.gave_way(f"bot {number}", 0.0)
    assert admission.grace("a bot not seen yet", 0.0) < 0.001
    assert admission.grace("bot 19", 0.0) < 0.001
    assert admission.grace("home", 0.0) == GRACE_S


def test_admission_remembered_origins_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The latest origins are kept, and an origin without handshakes takes no memory."""
    monkeypatch.setattr(admission_module, "_REMEMBERED", 3)
    admission = Admission()
    for number in range(10):
        admission.gave_way(f"{number}", 0.0)
        one = peer(f"{number}", admission)
        assert admission.least(0.0)[0] is one
        admission.remove(one)
    assert list(admission._halvings) == ["7", "8", "9"]
    assert (admission._by_origin, admission._by_weight, admission._most) == ({}, {}, 0)


# A crowd


def test_admission_more_clients_than_places_all_log_in(socket_dir: Path) -> None:
    """Five times as many clients as places connect at once, and none is refused."""
    names = [f"c{number}" for number in range(40)]
    listen = str(socket_dir / "sock")
    with running_daemon(
        configuration(listen, dict.fromkeys(names), limits={"handshakes": 8})
    ) as broker:
        with contextlib.ExitStack() as stack:
            crowd = {name: stack.enter_context(broker.raw()) for name in names}
            assert broker.call(lambda: broker.daemon.server.handshakes) <= 8
            for name, raw in crowd.items():
                raw.log_in(key_of(name), name.encode()).ping()
        assert broker.log.named("client.refused") == []


def test_admission_peer_disconnected_while_full_shortens_grace() -> None:
    """Otherwise a flood whose connections end within their grace could lock clients out
    permanently.
    """
    with running_daemon(configuration("127.0.0.1:0", limits={"handshakes": 3})) as broker:
        handshakes = broker.daemon.server.pending_handshakes

        def grace() -> float:
            return handshakes._admission.grace("127.0.0.1", handshakes._loop.time())

        for taken in (2, 3):
            crowd = [broker.raw() for _ in range(taken)]
            for each in crowd:
                each.read_body()
            before = broker.call(lambda: grace())
            assert before == GRACE_S
            for each in crowd:
                each.close()
            deadline = time.monotonic() + 30
            while broker.call(lambda: len(handshakes)):
                assert time.monotonic() < deadline
        assert broker.call(grace) < GRACE_S


def test_admission_listeners_with_pending_connections_take_turns() -> None:
    """With one place, a crowd at one listener leaves every second place to the other
    listener.
    """
    names = [f"c{number}" for number in range(12)]
    listen = ["127.0.0.1:0", "127.0.0.1:0"]
    with running_daemon(
        configuration(listen, dict.fromkeys(names), limits={"handshakes": 1})
    ) as broker:
        first, second = broker.addresses
        with contextlib.ExitStack() as stack:
            places = [first] * 9 + [second] * 3
            crowd = [stack.enter_context(Raw(each)) for each in places]
            waiting = dict(zip(crowd, names, strict=True))
            order = []
            while waiting:
                # Find a connection that has a challenge to read.
                for raw in waiting:
                    raw.sock.settimeout(0.005)
                    with contextlib.suppress(TimeoutError):
                        if raw.sock.recv(1, socket.MSG_PEEK):
                            break
                else:
                    continue
                raw.sock.settimeout(30)
                name = waiting.pop(raw)
                raw.log_in(key_of(name), name.encode()).ping()
                order.append(raw.sock.getpeername()[1])
        last = max(position for position, port in enumerate(order) if port == second.port)
        assert last <= 7, order
        assert broker.log.named("client.refused") == []


def _connect_at_once(address: Address, face: str, ca: Path | None, crowd: int) -> Counter[str]:
    """Connect clients at once, a thousand in each process, and return how they ended."""
    outcomes: Counter[str] = Counter()
    environ = {**os.environ, "PYTHONPATH": str(LOAD.parents[1])}
    with contextlib.ExitStack() as stack:
        members = []
        for first in range(0, crowd, 1000):
            command = [
                sys.executable,
                str(CROWD),
                str(address),
                face,
                str(ca or ""),
                str(first),
                "1000",
            ]
            member = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environ
            )
            members.append(stack.enter_context(member))
            stack.callback(member.kill)
        for member in members:
            assert member.stdout is not None
            assert member.stdout.readline() == "ready\n"
        for member in members:
            assert member.stdin is not None
            member.stdin.write("go\n")
            member.stdin.flush()
        for member in members:
            assert member.stdout is not None
            outcomes.update(json.loads(member.stdout.readline()))
    return outcomes


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "face", "crowd"),
    [
        *((kind, face, 1000) for kind in ("unix", "tcp", "tls") for face in ("aio", "threads")),
        ("unix", "aio", 3000),
        ("tcp", "aio", 3000),
    ],
)
def test_admission_thousands_of_clients_at_once_all_log_in(
    socket_dir: Path, kind: str, face: str, crowd: int
) -> None:
    """All clients log in within the default timeout, over every transport."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < crowd + 1000:
        pytest.skip(f"needs {crowd + 1000} file descriptors, and {hard} are allowed")
    trustme = pytest.importorskip("trustme")
    authority = trustme.CA()
    issued = authority.issue_cert("localhost", "127.0.0.1")
    ca, certificate, key = (socket_dir / name for name in ("ca.pem", "cert.pem", "key.pem"))
    authority.cert_pem.write_to_path(str(ca))
    certificate.write_bytes(b"".join(each.bytes() for each in issued.cert_chain_pems))
    key.write_bytes(issued.private_key_pem.bytes())
    key.chmod(0o600)
    listen = [
        "127.0.0.1:0",
        {"address": "127.0.0.1:0", "tls": {"certificate": str(certificate), "key": str(key)}},
    ]
    with BrokerProcess(
        socket_dir, [f"c{number}" for number in range(crowd)], listen=listen
    ) as broker:
        address = dict(zip(("unix", "tcp", "tls"), broker.addresses(), strict=True))[kind]
        began = time.monotonic()
        outcomes = _connect_at_once(address, face, ca if kind == "tls" else None, crowd)
        refused = len(broker.events("client.refused"))
        refused += sum(event["count"] for event in broker.events("client.refused_more"))
    print(
        f"\n{crowd} over {kind}, {face}: {time.monotonic() - began:.2f} s, {refused} handshakes"
        " gave way"
    )
    assert outcomes == {"in": crowd}


# A flood


@contextlib.contextmanager
def flood(
    address: Address, rate: float, seconds: float, kind: str, source: str = "127.0.0.1"
) -> Iterator[None]:
    """Make connections from the source in a process, until the end of the block at the
    latest.
    """
    command = [
        sys.executable,
        str(FLOODER),
        address.host,
        str(address.port),
        source,
        str(rate),
        str(seconds),
        kind,
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as flooder:
        assert flooder.stdout is not None
        assert flooder.stdout.readline() == "ready\n"
        try:
            yield
        finally:
            flooder.kill()


def far_away(address: Address, name: str, key: bytes, source: str, latency_s: float) -> float:
    """Log in from the source with a delay before each answer, and return the seconds it
    took. Raises what Raw.log_in does.
    """
    began = time.monotonic()
    raw = Raw.__new__(Raw)
    raw.sock = socket.socket()
    raw.sock.settimeout(10)
    with raw:
        raw.sock.bind((source, 0))
        raw.sock.connect(address.sockaddr)
        answer = raw.answer(key, name.encode())
        time.sleep(latency_s)
        raw.write(prefixed(answer))
        if raw.read_body() != WELCOME:
            raise Rejected
        time.sleep(latency_s)
        raw.write(prefixed(CHALLENGE + b"{sha256}" + os.urandom(40)))
        raw.read_body()
        time.sleep(latency_s)
        raw.write(prefixed(WELCOME))
        raw.ping()
    return time.monotonic() - began


def _succeed(
    address: Address, names: list[str], key: Any, source: str, latency_s: float, tries: int = 1
) -> list[float | str]:
    """Return the seconds of each login in turn, or the error of its last try. tries:
    per client.
    """
    outcomes: list[float | str] = []
    for name in names:
        for left in reversed(range(tries)):
            try:
                outcomes.append(far_away(address, name, key(name), source, latency_s))
                break
            except (OSError, EOFError, Rejected) as error:
                if not left:
                    outcomes.append(f"{type(error).__name__}: {error}")
    return outcomes


def test_admission_silent_flood_does_not_lock_out_another_address() -> None:
    """A client 50 ms away logs in while another address fills every place 30 times a
    second.
    """
    names = ["alice", "bob", "carol"]
    with (
        running_daemon(configuration("127.0.0.1:0", limits={"handshakes": 8})) as broker,
        flood(broker.address, 250, 20, "nothing"),
    ):
        broker.log.wait("client.refused", 10)
        outcomes = _succeed(broker.address, names, key_of, "127.0.0.2", 0.05)
        assert [type(each) for each in outcomes] == [float] * 3, outcomes


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nothing", "half", "wrong", "hello"])
@pytest.mark.parametrize("source", ["127.0.0.2", "127.0.0.1"], ids=["elsewhere", "same address"])
def test_admission_flood_of_2500_connections_per_second_locks_out_no_client(
    socket_dir: Path, kind: str, source: str
) -> None:
    """All of ten clients 50 ms away log in. From the flood's own address they need a
    few more tries, which the library makes.
    """
    names = [f"c{number}" for number in range(10)]
    with BrokerProcess(socket_dir, names, listen=["127.0.0.1:0"]) as broker:
        address = broker.addresses()[1]
        with flood(address, 2500, 60, kind):
            time.sleep(2)
            outcomes = _succeed(
                address, names, key_of, source, 0.05, tries=1 if source == "127.0.0.2" else 5
            )
        refused = sum(event["count"] for event in broker.events("client.refused_more"))
    took = [round(each, 3) for each in outcomes if isinstance(each, float)]
    print(
        f"\n{kind} from 127.0.0.1, clients from {source}: in after {took} s; {refused} refused"
        " meanwhile"
    )
    assert [type(each) for each in outcomes] == [float] * 10, outcomes
