"""What is to be seen of AF_PIPE (and of sockets) on Windows; runs in a Windows Python
and prints a line for each.

python windows_pipes.py LIBRARY_DIRECTORY
"""

import os
import socket
import sys
import time

sys.path.insert(0, sys.argv[1])

import multiprocessing.connection as standard

from windows_cases import TIMEOUT_S, aside, case, raised, run_cases

from brokerd_client.connection import (
    AuthenticationError,
    Client,
    Listener,
    Pipe,
    TimedOut,
    XmlClient,
    XmlListener,
    wait,
)

KEY = b"the key"


def exchange(one, other):
    one.send(["an", "object"])
    assert other.recv() == ["an", "object"]
    other.send_bytes(b"")
    assert one.recv_bytes() == b""
    big = os.urandom(5_000_000)
    sent = aside(one.send_bytes, big)
    assert other.recv_bytes() == big
    sent()
    one.close()
    try:
        other.recv()
    except (EOFError, ConnectionResetError):
        pass
    else:
        raise AssertionError("the end was not seen")
    other.close()


@case
def pipes_are_the_default_family():
    with Listener() as listener:
        assert listener.address.startswith("\\\\.\\pipe\\"), listener.address
        assert raised(ValueError, Listener, family="AF_UNIX")


@case
def handshake_with_right_key_succeeds():
    for family in ("AF_PIPE", "AF_INET"):
        with Listener(family=family, authkey=KEY) as listener:
            accepted = aside(listener.accept, TIMEOUT_S)
            dialer = Client(listener.address, authkey=KEY, timeout=TIMEOUT_S)
            exchange(dialer, accepted())


@case
def connection_without_key_works():
    for family in ("AF_PIPE", "AF_INET"):
        with Listener(family=family) as listener:
            accepted = aside(listener.accept, TIMEOUT_S)
            dialer = Client(listener.address, timeout=TIMEOUT_S)
            exchange(dialer, accepted())


@case
def handshake_with_standard_library_succeeds():
    with Listener(family="AF_PIPE", authkey=KEY) as listener:
        accepted = aside(listener.accept, TIMEOUT_S)
        dialer = standard.Client(listener.address, authkey=KEY)
        exchange(dialer, accepted())
    with standard.Listener(family="AF_PIPE", authkey=KEY) as listener:
        accepted = aside(listener.accept)
        dialer = Client(listener.address, authkey=KEY, timeout=TIMEOUT_S)
        exchange(dialer, accepted())


@case
def handshake_with_wrong_key_is_refused():
    with Listener(family="AF_PIPE", authkey=KEY) as listener:
        accepted = aside(listener.accept, TIMEOUT_S)
        assert "the peer rejected" in raised(
            AuthenticationError, Client, listener.address, authkey=b"x", timeout=TIMEOUT_S
        )
        assert "not accepted here" in raised(AuthenticationError, accepted)
        accepted = aside(listener.accept, TIMEOUT_S)
        exchange(Client(listener.address, authkey=KEY, timeout=TIMEOUT_S), accepted())


@case
def accept_among_bad_peers_succeeds():
    with Listener(family="AF_PIPE", authkey=KEY) as listener:
        accepted = aside(listener.accept, TIMEOUT_S)
        bad = [
            Client(listener.address, timeout=TIMEOUT_S) for _ in range(20)
        ]  # no key: they never answer
        bad[0].close()
        bad[1].send_bytes(bytes(1000))
        bad[2].recv_bytes()
        bad[2].close()
        exchange(Client(listener.address, authkey=KEY, timeout=TIMEOUT_S), accepted())
        for peer in bad:
            peer.close()


@case
def accept_among_80_silent_peers_succeeds():
    with Listener(family="AF_PIPE", authkey=KEY) as listener:
        accepted = aside(listener.accept, TIMEOUT_S)
        bad = [
            Client(listener.address, timeout=TIMEOUT_S) for _ in range(80)
        ]  # more than Windows can wait for at once
        exchange(Client(listener.address, authkey=KEY, timeout=TIMEOUT_S), accepted())
        for peer in bad:
            peer.close()


@case
def handshake_timeout_ends_silent_peer():
    with Listener(family="AF_PIPE", authkey=KEY, handshake_timeout=0.2) as listener:
        accepted = aside(listener.accept)
        silent = Client(listener.address, timeout=TIMEOUT_S)
        assert silent.recv_bytes().startswith(b"#CHALLENGE#")
        raised((EOFError, OSError), silent.recv_bytes)
        silent.close()
        listener.close()
        raised(OSError, accepted)


@case
def accept_and_connect_time_out():
    with Listener(family="AF_PIPE") as listener:
        begun = time.monotonic()
        raised(TimedOut, listener.accept, 0.2)
        assert 0.1 < time.monotonic() - begun < 5
        raised(TimedOut, listener.accept, 0)
        raised(TimedOut, Client, listener.address, authkey=KEY, timeout=0.3)


@case
def listener_close_wakes_accept():
    for family in ("AF_PIPE", "AF_INET"):
        for key in (None, KEY):
            listener = Listener(family=family, authkey=key)
            accepted = aside(listener.accept)
            raised(TimedOut, listener.accept, 0.1)
            listener.close()
            raised(OSError, accepted)
            raised(OSError, listener.accept)


@case
def connect_without_listener_fails():
    # That a second listener can't take the name is not to be seen under wine 8, which
    # lets it.
    with Listener(family="AF_PIPE") as listener:
        pass
    raised(OSError, Client, listener.address, timeout=1)


@case
def message_above_limit_is_refused():
    with Listener(family="AF_PIPE", max_message=1000) as listener:
        dialer = Client(listener.address, timeout=TIMEOUT_S)
        accepted = listener.accept(TIMEOUT_S)
        dialer.send_bytes(bytes(1000))
        assert accepted.recv_bytes() == bytes(1000)
        dialer.send_bytes(bytes(1001))
        raised(OSError, accepted.recv)
        dialer.close()
        accepted.close()


@case
def frames_of_threads_do_not_mix():
    one, other = Pipe()
    senders = [
        aside(lambda n=n: [one.send_bytes(bytes([n]) * (n * 5000 + 1)) for _ in range(30)])
        for n in range(4)
    ]
    for _ in range(120):
        message = other.recv_bytes()
        assert message == message[:1] * (message[0] * 5000 + 1)
    for sender in senders:
        sender()
    one.close()
    other.close()


@case
def wait_poll_and_old_names_work():
    one, other = Pipe()
    assert not one.poll()
    assert wait([one, other], 0.05) == []
    other.sendBytes(b"hello")
    assert wait([one, other], TIMEOUT_S) == [one]
    assert one.poll(TIMEOUT_S)
    buffer = bytearray(5)
    assert one.recvBytesInto(buffer) == 5
    assert buffer == b"hello"
    one.close()
    other.close()
    reader, writer = Pipe(duplex=False)
    writer.send(1)
    assert reader.recv() == 1
    raised(OSError, reader.send, 2)
    reader.close()
    writer.close()


@case
def xml_listener_and_client_work():
    with XmlListener(authkey=KEY) as listener:
        accepted = aside(listener.accept, TIMEOUT_S)
        dialer = XmlClient(listener.address, authkey=KEY, timeout=TIMEOUT_S)
        dialer.send([1, "text"])
        assert accepted().recv() == [1, "text"]
        dialer.close()


@case
def tcp_addresses_are_exclusive():
    with Listener(("127.0.0.1", 0)) as listener, socket.socket() as sock:
        raised(OSError, sock.bind, listener.address)


run_cases()
