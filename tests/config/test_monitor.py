"""The ``monitor:`` section: its forms, and the warning about public addresses."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest

from brokerd.config.diff import compare
from brokerd.config.lint import lint_warnings
from brokerd.config.load import ConfigError, load, load_text

LISTEN = "listen: [/run/b.sock]\nclients: {a: {key: k}}\n"


@pytest.mark.parametrize(
    ("written", "address", "per_client"),
    [
        ("127.0.0.1:6060", "127.0.0.1:6060", False),
        ("'[::1]:6060'", "[::1]:6060", False),
        ("[localhost, 6060]", "localhost:6060", False),
        ("'@monitor'", "@monitor", False),
        ("monitor.sock", "/etc/b/monitor.sock", False),
        ("{address: 127.0.0.1:6060}", "127.0.0.1:6060", False),
        ("{address: [127.0.0.1, 0], per_client: true}", "127.0.0.1:0", True),
    ],
)
def test_monitor_address_in_any_form_is_accepted(
    written: str, address: str, per_client: bool
) -> None:
    """The monitor takes an address alone in any form, or a mapping. A path is relative
    to its file.
    """
    monitor = load_text(f"{LISTEN}monitor: {written}\n", "/etc/b/brokerd.yaml").monitor

    assert monitor is not None
    assert (str(monitor.address), monitor.per_client) == (address, per_client)


def test_monitor_not_configured_is_off() -> None:
    """A configuration without the key has no monitor."""
    assert load_text(LISTEN).monitor is None


def test_monitor_in_included_file_is_refused(tmp_path: Path) -> None:
    """An included file can't switch the monitor on."""
    (tmp_path / "b.yaml").write_text("listen: [./s]\ninclude: [c.yaml]\n")
    (tmp_path / "c.yaml").write_text("monitor: 127.0.0.1:6060\n")

    with pytest.raises(ConfigError, match=r"c\.yaml:1:1: monitor: belongs in the main file only"):
        load(tmp_path / "b.yaml")


@pytest.mark.parametrize(
    ("address", "local"),
    [
        ("127.0.0.1:1", True),
        ("127.9.9.9:1", True),
        ("'[::1]:1'", True),
        ("localhost:1", True),
        ("/run/m", True),
        ("'@m'", True),
        ("0.0.0.0:1", False),
        ("'[::]:1'", False),
        ("192.0.2.1:1", False),
        ("localhost.example.org:1", False),
    ],
)
def test_monitor_address_not_local_is_warned_of(address: str, local: bool) -> None:
    """``brokerd check`` names the risk and the remedy, once. A local address gives no
    warning.
    """
    config = load_text(f"{LISTEN}monitor: {{address: {address}, page: false}}\n", "b.yaml")

    warnings = lint_warnings(config, datetime.now(UTC))

    shown = address.strip("'")
    port = shown.rpartition(":")[2]
    expected = (
        f"b.yaml:3: the monitor at {shown} has no password: every machine that reaches"
        f" it can read the metrics (give 127.0.0.1:{port}, or restrict access with a firewall)"
    )
    assert warnings == ([] if local else [expected])


@pytest.mark.parametrize(
    ("before", "after", "changes", "opened", "closed"),
    [
        ("", "", [], [], []),
        ("", "monitor: localhost:1\n", ["address: none -> localhost:1"], ["localhost:1"], []),
        ("monitor: localhost:1\n", "", ["address: localhost:1 -> none"], [], ["localhost:1"]),
        (
            "monitor: localhost:1\n",
            "monitor: localhost:2\n",
            ["address: localhost:1 -> localhost:2"],
            ["localhost:2"],
            ["localhost:1"],
        ),
        (
            "monitor: localhost:1\n",
            "monitor: {address: localhost:1, per_client: true}\n",
            ["per_client: false -> true"],
            [],
            [],
        ),
        (
            "monitor: localhost:1\n",
            "monitor: {address: localhost:1, hosts: [b.example]}\n",
            ["hosts: [] -> [b.example]"],
            [],
            [],
        ),
        ("monitor: localhost:1\n", "# moved\nmonitor: {address: localhost:1}\n", [], [], []),
    ],
)
def test_monitor_address_changed_is_opened_and_closed_by_reload(
    before: str, after: str, changes: list[str], opened: list[str], closed: list[str]
) -> None:
    """Only a new address is opened, and every change is described in words. An entry
    that only moved is not a change.
    """
    plan = compare(load_text(LISTEN + before), load_text(LISTEN + after))

    assert plan.as_fields()["monitor"] == changes
    assert [str(entry.address) for entry in plan.monitor_opened] == opened
    assert [str(entry.address) for entry in plan.monitor_closed] == closed
    assert plan.restart == ()


def test_monitor_answered_hosts_are_configured_hosts_and_address() -> None:
    """The names are in small letters and without the last dot, as a Host header is
    compared.
    """
    monitor = load_text(
        LISTEN + "monitor: {address: H:1, page: false, hosts: [B.Example., c_d]}\n"
    ).monitor
    assert monitor is not None
    assert monitor.answered_hosts == {"h", "b.example", "c_d"}
