"""Addresses at which the broker can't listen, found without opening a socket."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from brokerd.config import address_check
from brokerd.config.address_check import obstacle, overlapping
from brokerd.config.load import ConfigError, load_text
from brokerd_client.address import parse

needs_proc = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.fixture
def proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A /proc of a machine with 192.0.2.7 and 2001:db8::7."""
    for name, text in {
        "sys/net/ipv4/ip_unprivileged_port_start": "1024\n",
        "sys/net/ipv4/ip_nonlocal_bind": "0\n",
        "net/fib_trie": "Local:\n  |-- 192.0.2.7\n     /32 host LOCAL\n",
        "net/if_inet6": "20010db8000000000000000000000007 02 40 00 80 eth0\n",
    }.items():
        file = tmp_path / "proc" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    monkeypatch.setattr(address_check, "_PROC", tmp_path / "proc")
    return tmp_path / "proc"


@pytest.mark.parametrize(
    ("address", "wrong"),
    [
        ("192.0.2.7:6000", ""),
        ("192.0.2.8:6000", "no interface of this machine has that address"),
        ("[2001:db8::7]:6000", ""),
        ("[2001:db8::8]:6000", "no interface of this machine has that address"),
        ("127.0.0.9:6000", ""),
        ("0.0.0.0:6000", ""),
        ("broker.example:6000", ""),
        ("192.0.2.7:0", ""),
        ("@abstract", ""),
        ("127.0.0.1:1023", "ports below 1024"),
    ],
)
@needs_proc
@pytest.mark.usefixtures("proc")
def test_obstacle_of_address_is_found_or_empty(address: str, wrong: str) -> None:
    """An address of no interface and a privileged port are obstacles."""
    found = obstacle(parse(address), privileged=False)

    assert wrong in found
    assert bool(wrong) == bool(found)


@needs_proc
def test_obstacle_with_privilege_or_setting_is_none(proc: Path) -> None:
    """A privilege allows any port, and a setting of the system any address."""
    assert obstacle(parse("127.0.0.1:80"), privileged=True) == ""
    (proc / "sys/net/ipv4/ip_nonlocal_bind").write_text("1\n")
    assert obstacle(parse("192.0.2.8:6000"), privileged=False) == ""


@needs_proc
def test_obstacle_of_path_is_other_file_or_missing_directory(tmp_path: Path) -> None:
    """Directories below /run are made when the service starts, and may be missing."""
    (tmp_path / "file.sock").touch()

    assert "not a socket" in obstacle(parse(f"{tmp_path}/file.sock"), privileged=False)
    assert "no directory" in obstacle(parse(f"{tmp_path}/gone/b.sock"), privileged=False)
    assert obstacle(parse(f"{tmp_path}/new.sock"), privileged=False) == ""
    assert obstacle(parse("/run/not-there-yet/b.sock"), privileged=False) == ""


def faults(*listen: str, more: str = "") -> list[str]:
    listed = ", ".join(f"'{each}'" for each in listen)
    try:
        load_text(f"listen: [{listed}]\nclients: {{a: {{key: k}}}}\n{more}", "f")
    except ConfigError as error:
        return str(error).splitlines()
    return []


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("127.0.0.1:6000", "localhost:6000"),
        ("localhost:6000", "127.0.0.1:6000"),
        ("[::1]:6000", "[0:0:0:0:0:0:0:1]:6000"),
    ],
)
def test_address_given_twice_in_two_spellings_is_refused(first: str, second: str) -> None:
    """The error names both, and the place of the first."""
    (fault,) = faults(first, second)

    assert f" is {first}, given at f:1:10 (keep one of them)" in fault


def test_address_of_monitor_and_listener_is_refused() -> None:
    """The monitor's address is one more that has to be free."""
    (fault,) = faults("127.0.0.1:6000", more="monitor: localhost:6000\n")

    assert "monitor: localhost:6000 is 127.0.0.1:6000, given at " in fault


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("127.0.0.1:6000", "localhost:6001"),
        ("127.0.0.1:0", "localhost:0"),
        ("0.0.0.0:6000", "[::]:6000"),
        ("localhost:6000", "[::1]:6000"),
        ("broker.example:6000", "127.0.0.1:6000"),
    ],
)
def test_address_that_may_be_another_is_accepted(first: str, second: str) -> None:
    """Another port, family or address is another; a name is not looked up."""
    assert faults(first, second) == []
    assert not overlapping(parse(first), parse(second))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("0.0.0.0:6000", "10.0.0.1:6000"),
        ("localhost:6000", "0.0.0.0:6000"),
        ("[::]:6000", "[::1]:6000"),
    ],
)
def test_address_that_includes_another_overlaps_it(first: str, second: str) -> None:
    """The order does not matter."""
    assert overlapping(parse(first), parse(second))
    assert overlapping(parse(second), parse(first))
