"""Addresses: every valid form is parsed, and everything else is refused with a hint."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from brokerd_client.address import Address, format_peer, infer_family, parse, validate_family
from brokerd_client.errors import AddressError


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("localhost:6000", Address("AF_INET", host="localhost", port=6000)),
        ("0.0.0.0:0", Address("AF_INET", host="0.0.0.0", port=0)),
        ("broker.example.org:65535", Address("AF_INET", host="broker.example.org", port=65535)),
        ("a" * 63 + ".org.:1", Address("AF_INET", host="a" * 63 + ".org.", port=1)),
        ("b\u00fccher.example:1", Address("AF_INET", host="b\u00fccher.example", port=1)),
        (("", 6000), Address("AF_INET", host="", port=6000)),
        ("[::1]:6000", Address("AF_INET6", host="::1", port=6000)),
        ("[fe80::1%eth0]:1", Address("AF_INET6", host="fe80::1%eth0", port=1)),
        ("[::ffff:1.2.3.4]:1", Address("AF_INET6", host="::ffff:1.2.3.4", port=1)),
        ("1.2.3.4.example:1", Address("AF_INET", host="1.2.3.4.example", port=1)),
        ("127.1:1", Address("AF_INET", host="127.1", port=1)),
        (["localhost", 6000], Address("AF_INET", host="localhost", port=6000)),
        (("::1", 6000), Address("AF_INET6", host="::1", port=6000)),
        (("::1", 6000, 0, 0), Address("AF_INET6", host="::1", port=6000)),
        ("/run/brokerd/brokerd.sock", Address("AF_UNIX", path="/run/brokerd/brokerd.sock")),
        ("brokerd.sock", Address("AF_UNIX", path="brokerd.sock")),
        ("brokerd.socket", Address("AF_UNIX", path="brokerd.socket")),
        ("./6000", Address("AF_UNIX", path="./6000")),
        ("run/localhost", Address("AF_UNIX", path="run/localhost")),
        ("./host:80", Address("AF_UNIX", path="./host:80")),
        ("/a:b/[c]", Address("AF_UNIX", path="/a:b/[c]")),
        ("@brokerd", Address("AF_UNIX", path="\0brokerd")),
        ("\0brokerd", Address("AF_UNIX", path="\0brokerd")),
        ("@host:80", Address("AF_UNIX", path="\0host:80")),
        (r"\\.\pipe\brokerd", Address("AF_PIPE", path=r"\\.\pipe\brokerd")),
    ],
)
def test_address_form_is_parsed(text: Any, address: Address) -> None:
    """Each form has one meaning."""
    assert parse(text) == address


def test_address_path_with_tilde_is_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A path may begin with ~, as in a shell."""
    monkeypatch.setenv("HOME", os.sep + "home")

    assert parse("~/b.sock") == Address("AF_UNIX", path=str(Path("~/b.sock").expanduser()))


@pytest.mark.parametrize(
    "text",
    [
        "localhost:6000",
        "[::1]:6000",
        "/run/b.sock",
        "./a:1",
        "b.sock",
        "@abstract",
        r"\\.\pipe\b",
        ("::1", 1),
        ("h", 0),
    ],
)
def test_address_str_is_parsed_to_same_address(text: Any) -> None:
    """parse accepts str() of an address and gives the same address, whose str() is the
    same.
    """
    address = parse(text)

    assert parse(str(address)) == address
    assert str(parse(str(address))) == str(address)


def test_address_object_parsed_is_returned_unchanged() -> None:
    """parse returns an Address unchanged."""
    address = Address("AF_INET", host="h", port=1)

    assert parse(address) is address


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "can't be empty"),
        ("@", "can't be empty"),
        ("\0", "can't be empty"),
        ("/run/b\0.sock", "NUL character"),
        (
            "a..b:6000",
            "'a..b' is not a valid host: give a name whose parts have 1 to 63 characters",
        ),
        (".a:6000", "'.a' is not a valid host"),
        (".:6000", "'.' is not a valid host"),
        ("a" * 64 + ":6000", "is not a valid host"),
        ("tls://a..b:6000", "'a..b' is not a valid host"),
        ("a\0b:6000", "is not a valid host"),
        ("\u00e4..b:6000", "is not a valid host"),
        (("a..b", 6000), "is not a valid host"),
        ("[zz]:5", r"'zz' is not a valid IPv6 address: give one such as \[::1\]:6000"),
        ("[127.0.0.1]:5", "'127.0.0.1' is not a valid IPv6 address"),
        ("[::zz]:5", "'::zz' is not a valid IPv6 address"),
        ("[1:2:3:4:5:6:7:8:9]:5", "is not a valid IPv6 address"),
        ("[fe80::1%]:5", "is not a valid IPv6 address"),
        ("tls://[zz]:5", "is not a valid IPv6 address"),
        (("::zz", 5), "is not a valid IPv6 address"),
        ("1.2.3.999:5", "'1.2.3.999' is not a valid IPv4 address: give four numbers from 0 to 255"),
        (
            "1.2.3.04:5",
            (
                "'1.2.3.04' is not a valid IPv4 address: give four numbers from 0 to 255,"
                " without zeros before them"
            ),
        ),
        ("tls://1.2.3.256:5", "is not a valid IPv4 address"),
        (("256.1.1.1", 5), "is not a valid IPv4 address"),
        ("tcp://localhost:6000", "leave out tcp:// and give HOST:PORT"),
        ("unix:///run/b.sock", "leave out unix:// and give HOST:PORT"),
        ("localhost:", "HOST:PORT"),
        (":6000", "HOST:PORT"),
        ("localhost:port", "HOST:PORT"),
        ("::1:6000", r"'::1:6000' has no port: give \[HOST\]:PORT"),
        ("::1", r"'::1' has no port: give \[HOST\]:PORT, such as \[::1\]:6000"),
        ("[::1]", r"'\[::1\]' has no port: give \[HOST\]:PORT, such as \[::1\]:6000"),
        ("6000", "^6000 is a port without a host: give HOST:6000, such as localhost:6000$"),
        (6000, "^6000 is a port without a host: give HOST:6000"),
        (
            "localhost",
            (
                "^'localhost' has no port: give localhost:PORT, or ./localhost for the path of a"
                " Unix socket$"
            ),
        ),
        ("127.0.0.1", "^'127.0.0.1' has no port: give 127.0.0.1:PORT, or ./127.0.0.1 for"),
        ("broker.example.org", "^'broker.example.org' has no port: give"),
        ("b\u00fccher", "^'b\u00fccher' has no port: give"),
        ("sock", "^'sock' has no port: give sock:PORT, or ./sock for the path of a Unix socket$"),
        ("b sock", "HOST:PORT"),
        ("123456", "HOST:PORT"),
        ("host:b.sock", "HOST:PORT"),
        ("unix:b.sock", "HOST:PORT"),
        (
            "unix:/run/b.sock",
            "^'unix:/run/b.sock' is not a valid address: give /run/b.sock without 'unix:'$",
        ),
        ("UNIX:/b", "give /b without 'UNIX:'"),
        (
            "localhost:6000/",
            (
                "'localhost:6000/' is not a valid address: give HOST:PORT alone, or begin a path"
                " with ./"
            ),
        ),
        ("tcp:localhost/6000", "give HOST:PORT alone"),
        ("/run/brokerd/", "^'/run/brokerd/' is a directory: give the path of a socket in it$"),
        ("[]:6000", "HOST:PORT"),
        ("host:123456", "HOST:PORT"),
        ("host:-1", "HOST:PORT"),
        ("host name:80", "HOST:PORT"),
        ("host:65536", "65536 is not a valid port"),
        (("host", 65536), "65536 is not a valid port"),
        (("host", -1), "-1 is not a valid port"),
        (("host",), "give a host and a port"),
        ([], "give a host and a port"),
        (("host", "80"), "give a host and a port"),
        (("host", True), "give a host and a port"),
        ((80, "host"), "give a host and a port"),
        (None, "HOST:PORT"),
        (0, "HOST:PORT"),
        (True, "HOST:PORT"),
        (123456, "HOST:PORT"),
        (b"/run/b.sock", "HOST:PORT"),
    ],
)
def test_address_invalid_is_refused_with_hint(text: Any, reason: str) -> None:
    """The error of an invalid address tells how to correct it."""
    with pytest.raises(AddressError, match=reason):
        parse(text)


@given(st.text() | st.lists(st.text() | st.integers(), max_size=3))
def test_address_random_value_is_parsed_or_gives_address_error(text: Any) -> None:
    """No value raises any error but AddressError, and a parsed address has one form."""
    try:
        address = parse(text)
    except AddressError:
        return
    assert isinstance(str(address), str)
    assert address.sockaddr in ((address.host, address.port), address.path)


@pytest.mark.parametrize(
    ("address", "sockaddr", "is_file"),
    [
        ("h:1", ("h", 1), False),
        ("[::1]:1", ("::1", 1), False),
        ("/b.sock", "/b.sock", True),
        ("@b", "\0b", False),
        (r"\\.\pipe\b", r"\\.\pipe\b", False),
    ],
)
def test_address_sockaddr_fits_family(address: str, sockaddr: Any, is_file: bool) -> None:
    """sockaddr is the value that a socket of the family takes. Only a Unix socket with
    a path leaves a file behind.
    """
    assert parse(address).sockaddr == sockaddr
    assert parse(address).is_file is is_file


@pytest.mark.parametrize(
    ("address", "family"),
    [
        (("localhost", 6000), "AF_INET"),
        ((), "AF_INET"),
        (("::1", 6000), "AF_INET6"),
        (r"\\.\pipe\b", "AF_PIPE"),
        ("/b.sock", "AF_UNIX"),
        ("localhost:6000", "AF_UNIX"),
        ("\0b", "AF_UNIX"),
        (b"\0b", "AF_UNIX"),
    ],
)
def test_address_family_is_inferred_as_in_standard_library(address: object, family: str) -> None:
    """A plain string is a path, even a string that looks like a host and a port."""
    assert infer_family(address) == family


@pytest.mark.parametrize("address", [None, 80, ["localhost", 80], b"/b.sock"])
def test_address_family_not_inferable_is_value_error(address: object) -> None:
    """As in the standard library, the error is a ValueError."""
    with pytest.raises(ValueError, match="unrecognized"):
        infer_family(address)


@pytest.mark.parametrize("family", ["AF_INET", "AF_INET6"])
def test_address_family_tcp_is_always_valid(family: str) -> None:
    """Every platform has TCP, so its families give no error."""
    validate_family(family)


@pytest.mark.parametrize(
    ("platform", "family", "reason"),
    [
        ("linux", "AF_PIPE", "Windows only"),
        ("linux", "AF_UNIX", None),
        ("win32", "AF_UNIX", "use AF_PIPE or AF_INET"),
        ("win32", "AF_PIPE", None),
        ("linux", "AF_BLUETOOTH", "one of AF_INET"),
    ],
)
def test_address_family_unavailable_is_value_error(
    monkeypatch: pytest.MonkeyPatch, platform: str, family: str, reason: str | None
) -> None:
    """The error says where the family exists, or what to use instead."""
    monkeypatch.setattr(sys, "platform", platform)
    if reason is None:
        validate_family(family)
    else:
        with pytest.raises(ValueError, match=reason):
            validate_family(family)


@pytest.mark.parametrize(
    ("sockaddr", "text"),
    [
        (("127.0.0.1", 5), "127.0.0.1:5"),
        (("::1", 5, 0, 0), "[::1]:5"),
        ("/b.sock", "/b.sock"),
        (b"\0b\xff", "@b\N{REPLACEMENT CHARACTER}"),
        ("\0b", "@b"),
        ("", "unix"),
        (b"", "unix"),
        (None, "unix"),
    ],
)
def test_address_peer_is_formatted_as_text(sockaddr: object, text: str) -> None:
    """A peer without an address of its own, as on a Unix socket, is called unix."""
    assert format_peer(sockaddr) == text
