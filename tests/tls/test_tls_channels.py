"""Channels with TLS at one end or at both."""

from __future__ import annotations

import os
import ssl
import threading
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from typing import Self

import pytest
from support.channels import JOIN, OPEN
from support.keys import key_of
from support.raw_client import RECEIPT, Raw, packed
from support.running_daemon import RunningDaemon, configuration, running_daemon
from support.tls.authority import Issued
from support.tls.raw_client import TlsRaw, tls_login
from support.waiting import until

MIB = 1024 * 1024


@pytest.fixture
def broker(server: Issued) -> Iterator[RunningDaemon]:
    """A broker with a TLS listener and a plain one."""
    entry = {**server.entry(), "minimum": "1.2"}
    listen = [{"address": "127.0.0.1:0", "tls": entry}, "127.0.0.1:0"]
    with running_daemon(configuration(listen)) as broker:
        yield broker


class Ends:
    """The two ends of a channel from alice to bob."""

    def __init__(self, broker: RunningDaemon, context: ssl.SSLContext, tls: str) -> None:
        self._broker = broker
        self._context = context
        self._stack = ExitStack()
        self.bob_in = self._keep(tls_login(broker.addresses[0], context, "bob"))
        self.bob_in.ask("listen")
        self.alice = self._dialed("alice", packed(OPEN, "bob", message_id=1), "alice" in tls)
        token = self.bob_in.recv().id
        self.bob = self._dialed("bob", packed(JOIN, "", message_id=token), "bob" in tls)
        assert self.alice.recv().kind == self.bob.recv().kind == RECEIPT

    def _keep(self, raw: Raw) -> Raw:
        self._stack.enter_context(raw)
        return raw

    def _dialed(self, name: str, first: bytes, tls: bool) -> Raw:
        raw = TlsRaw(self._broker.addresses[0], self._context) if tls else None
        raw = self._keep(raw or Raw(self._broker.addresses[1]))
        return raw.log_in(key_of(name), name.encode() + b" channel", behind=first)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stack.close()


def number_open(broker: RunningDaemon) -> int:
    return broker.call(lambda: len(broker.daemon.broker.channels.open))


@pytest.mark.parametrize("tls", ["alice", "bob", "alice bob"])
def test_tls_channel_relays_both_ways(
    tls: str, broker: RunningDaemon, trusting: ssl.SSLContext
) -> None:
    """More than one buffer, at the same time."""
    data = os.urandom(2 * MIB)
    with Ends(broker, trusting, tls) as ends:
        pairs = ((ends.alice, ends.bob), (ends.bob, ends.alice))
        for writer, reader in pairs:
            thread = threading.Thread(target=writer.write, args=(data,), daemon=True)
            thread.start()
            assert reader.read(len(data)) == data
            thread.join(30)


def test_tls_channel_open_within_connections_leaves_the_pool(
    broker: RunningDaemon, trusting: ssl.SSLContext
) -> None:
    """Its TLS goes on."""
    with (
        tls_login(broker.addresses[0], trusting, "bob") as bob,
        tls_login(broker.addresses[0], trusting, "alice") as alice,
        Raw(broker.addresses[1]) as joining,
    ):
        bob.ask("listen")
        alice.write(packed(OPEN, "bob", message_id=1))
        first = packed(JOIN, "", message_id=bob.recv().id)
        joining.log_in(key_of("bob"), b"bob channel", behind=first)
        assert alice.recv().kind == joining.recv().kind == RECEIPT
        joining.write(b"hello")
        assert alice.read(5) == b"hello"


@pytest.mark.parametrize("tls", ["alice", "bob"])
def test_tls_channel_half_close_is_passed_on(
    tls: str, broker: RunningDaemon, trusting: ssl.SSLContext
) -> None:
    """From the plain end to that of TLS 1.3, and back."""
    with Ends(broker, trusting, tls) as ends:
        secret, plain = (ends.alice, ends.bob) if tls == "alice" else (ends.bob, ends.alice)
        plain.write(b"first")
        plain.sock.shutdown(1)
        assert secret.read_to_end() == b"first"
        secret.write(b"an answer")
        assert plain.read(9) == b"an answer"
        secret.close()
        assert plain.read_to_end() == b""
        until(lambda: not number_open(broker))


def test_tls_channel_half_close_of_its_own_is_passed_on(
    broker: RunningDaemon, trusting: ssl.SSLContext
) -> None:
    """The end over TLS 1.3 sends its close_notify, and still reads."""
    with Ends(broker, trusting, "alice") as ends:
        assert isinstance(ends.alice.sock, ssl.SSLSocket)
        ends.alice.write(b"first")
        ends.alice.sock.settimeout(0.05)
        with pytest.raises((ssl.SSLWantReadError, TimeoutError)):
            # It sends the close_notify, and would wait for that of the other end.
            ends.alice.sock.unwrap()
        assert ends.bob.read_to_end() == b"first"
        ends.bob.write(b"an answer")
        ends.alice.sock.settimeout(30)
        assert ends.alice.read(9) == b"an answer"


@pytest.mark.parametrize("closes", ["alice", "bob"])
def test_tls_1_2_channel_has_no_half_close(
    closes: str, broker: RunningDaemon, trusting: ssl.SSLContext
) -> None:
    """The end of one direction ends both; bytes that were sent before arrive."""
    trusting.maximum_version = ssl.TLSVersion.TLSv1_2
    with Ends(broker, trusting, "alice") as ends:
        one, other = (ends.alice, ends.bob) if closes == "alice" else (ends.bob, ends.alice)
        one.write(b"last words")
        if closes == "alice":
            one.close()
        else:
            one.sock.shutdown(1)
        assert other.read_to_end() == b"last words"
        until(lambda: not number_open(broker))


def test_tls_channel_end_that_does_not_read_stops_its_sender(
    broker: RunningDaemon, trusting: ssl.SSLContext
) -> None:
    with Ends(broker, trusting, "alice") as ends:
        ends.bob.sock.settimeout(0.2)
        sent = 0
        with suppress(TimeoutError):
            while True:
                sent += ends.bob.sock.send(bytes(65536))
        ends.alice.sock.settimeout(30)
        assert ends.alice.read(sent) == bytes(sent)
