"""The monitor's page in a real Chromium: what it shows is what the broker says.

It needs Debian's chromium, and playwright, which `make test-system` installs; its own
browsers are not used.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.channels import channel
from support.cluster_brokers import brokers
from support.nats_server import nats_server, needs_nats
from support.raw_client import ACK, ERROR, JSON, MESSAGE, RECEIPT, WANT_RECEIPT, Raw
from support.running_daemon import RunningDaemon
from support.scraping import samples, watched
from support.system.packages import install_missing
from support.waiting import until

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")

pytestmark = pytest.mark.system

#: Where screenshots for docs/ are written, if anywhere.
SCREENSHOTS = os.environ.get("BROKERD_SCREENSHOTS", "")
TIMEOUT_MS = 30_000


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """A headless browser."""
    install_missing({"chromium": "chromium"})
    program = shutil.which("chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def new_page(chromium: Any) -> Iterator[Callable[..., Any]]:
    """Open pages; an error of a script or of the policy, or a foreign request, fails."""
    opened, faults = [], []

    def make(broker: RunningDaemon, at: str = "", **options: Any) -> Any:
        context = chromium.new_context(**options)
        opened.append(context)
        page = context.new_page()
        page.set_default_timeout(TIMEOUT_MS)
        origin = f"http://127.0.0.1:{broker.daemon.monitor_addresses[0].port}/"
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on(
            "console",
            lambda message: (
                faults.append(message.text)
                if message.type == "error" and "ERR_" not in message.text
                else None
            ),
        )
        page.on(
            "request",
            lambda request: None if request.url.startswith(origin) else faults.append(request.url),
        )
        page.goto(origin + at)
        page.wait_for_selector("#rows tr")
        return page

    yield make
    for context in opened:
        context.close()
    assert faults == []


def cells(page: Any, kind: str, name: str) -> list[str]:
    """Return the cells of a row."""
    found: list[str] = page.locator(f"tr:has(button[data-{kind}='{name}']) td").all_inner_texts()
    return found


def row(page: Any, name: str) -> list[str]:
    """Return the cells of a client's row."""
    return cells(page, "client", name)


def with_mailboxes(directory: Path, clients: dict[str, Any]) -> Any:
    """Run a broker with a monitor and a store."""
    return watched(clients, store={"path": str(directory / "store"), "min_free": 0})


def fail_first(sender: Raw, recipient: Raw, reason: str) -> None:
    """Store three messages; the recipient opens its mailbox and fails the first one."""
    recipient.ask("open_mailbox")
    for number in (1, 2, 3):
        sender.send(MESSAGE, "bob", b"x", message_id=number, flags=WANT_RECEIPT)
        assert sender.recv().kind == RECEIPT
        assert recipient.recv().kind == MESSAGE
    verb = json.dumps({"verb": "dead", "reason": reason}).encode()
    recipient.send(ACK, "", verb, message_id=1, codec=JSON, flags=WANT_RECEIPT)
    assert recipient.recv().kind == RECEIPT


def shot(page: Any, name: str) -> None:
    """Keep a picture for docs/, if that is wanted."""
    if SCREENSHOTS:
        page.screenshot(path=str(Path(SCREENSHOTS) / f"{name}.png"))


def test_page_values_are_those_of_the_broker_and_change_live(new_page: Any) -> None:
    """Names, states, errors and refusals are the broker's; a change shows by itself."""
    clients = {"alice": {"send_to": ["bob"]}, "bob": {"expected": True}, "carol": {}}
    with watched(clients) as broker, broker.login("alice") as alice:
        page = new_page(broker)
        assert row(page, "alice")[:3] == ["alice", "online", "1"]
        assert row(page, "bob")[:3] == ["bob", "expected, offline", "0"]

        for _ in range(3):
            alice.send(1, "carol", b"x")
            assert alice.recv().code == "denied"
        page.wait_for_selector("figcaption output:has-text('denied')")
        until(lambda: row(page, "alice")[-1] == "3")
        assert samples(broker)["brokerd_refused_total{code=denied}"] == 3
        with broker.login("bob"):
            until(lambda: row(page, "bob")[1] == "online")
        until(lambda: row(page, "bob")[1] == "expected, offline")


def test_page_client_shows_why_and_is_closed_by_keyboard(new_page: Any) -> None:
    """Enter on a name opens the client, whose address can be kept; Escape closes it."""
    clients = {"alice": {"send_to": ["bob", "jobs-*"]}, "bob": {}, "carol": {}}
    with watched(clients) as broker, broker.login("alice") as alice:
        alice.send(1, "carol", b"x")
        alice.recv()
        page = new_page(broker)
        page.focus("button[data-client=carol]")
        page.keyboard.press("Enter")
        page.wait_for_selector("#detail[open] td:has-text('alice may not send to carol')")
        assert "send_to: [bob, jobs-*]" in page.inner_text("#detail-body")
        assert page.url.endswith("#client=carol")
        page.keyboard.press("Escape")
        page.wait_for_selector("#detail:not([open])", state="hidden")
        again = new_page(broker, "#client=alice")
        again.wait_for_selector("#detail[open] h2:has-text('alice')")
        page.keyboard.press("/")
        page.keyboard.type("car")
        until(lambda: page.locator("#rows tr").count() == 1)
        page.click("#tab-topics")
        page.wait_for_selector("#found:has-text('0 topics')")
        page.click("#tab-broker")
        page.wait_for_selector("#broker:has-text('routing loop')")


def test_page_lists_topics_and_channels_live(new_page: Any) -> None:
    """Each view keeps its own order and filter."""
    with watched() as broker, broker.login("alice") as alice:
        alice.ask("subscribe", topic="jobs.>")
        page = new_page(broker)
        page.fill("#filter", "bob")
        until(lambda: page.locator("#rows tr").count() == 1)
        page.click("#tab-topics")
        page.wait_for_selector("#rows tr:has-text('jobs.>'):has-text('1')")
        page.click("#tab-channels")
        page.wait_for_selector("#found:has-text('0 channels')")
        with channel(broker, "alice", "bob") as (caller, recipient):
            caller.write(bytes(4096))
            recipient.read(4096)
            page.wait_for_selector("#rows tr:has-text('alice'):has-text('4.0 KiB')")
            with channel(broker, "alice", "carol"):
                # Of two rows with one name, that which had the focus keeps it.
                page.wait_for_selector("#rows tr:nth-child(2) button")
                page.focus("#rows tr:nth-child(2) button")
                caller.write(bytes(4096))
                page.wait_for_selector("#rows tr:has-text('8.0 KiB')")
                assert page.evaluate("document.activeElement.closest('tr').rowIndex") == 2
            page.wait_for_selector("#found:has-text('1 channels')")
            page.click("#rows tr button")
            page.wait_for_selector("#detail[open] h3:has-text('Channels') + div td:has-text('bob')")
            page.keyboard.press("Escape")
        page.wait_for_selector("#found:has-text('0 channels')")
        page.click("#tab-clients")
        assert page.input_value("#filter") == "bob"
        page.wait_for_selector("#found:has-text('1 of 3 clients')")


def test_page_shows_mailboxes_with_dead_letters_by_keyboard(new_page: Any, tmp_path: Path) -> None:
    """The counts are the broker's; the client's details lead to its mailbox."""
    with with_mailboxes(tmp_path, {"alice": {}, "bob": {"mailbox": True}}) as broker:
        with broker.login("alice") as alice, broker.login("bob") as bob:
            fail_first(alice, bob, "no such order")
            page = new_page(broker)
            assert row(page, "bob")[-3:] == ["2", "1", "0"]
            assert row(page, "alice")[-3:] == ["", "", "0"]
            page.focus("button[data-client=bob]")
            page.keyboard.press("Enter")
            page.wait_for_selector("#detail[open] a:has-text('0 ready, 2 held, 0 delayed, 1 dead')")
            page.focus("#detail a")
            page.keyboard.press("Enter")
            page.wait_for_selector("#detail td:has-text('no such order')")
            assert page.url.endswith("#mailbox=bob")
            page.keyboard.press("Escape")
        page.click("#tab-mailboxes")
        page.wait_for_selector("#rows tr:has-text('bob'):has-text('not open')")
        until(lambda: cells(page, "mailbox", "bob")[2:6] == ["2", "0", "0", "1"])


def test_page_reconnects_after_a_restart(new_page: Any) -> None:
    """Meanwhile it says that there is no connection."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with watched(monitor=f"127.0.0.1:{port}") as broker:
        page = new_page(broker)
    page.wait_for_selector("#link.lost")
    with watched({"dave": {}}, monitor=f"127.0.0.1:{port}"):
        page.wait_for_selector("button[data-client=dave]")
        assert page.inner_text("#link") == "live"


def test_page_with_ten_thousand_clients_is_sorted_and_filtered(new_page: Any) -> None:
    """It shows a hundred rows at a time, and finds one of all."""
    clients = {f"c{number:05}": {} for number in range(10_000)}
    with watched(clients) as broker, broker.login("c07777"):
        page = new_page(broker)
        assert page.locator("#rows tr").count() == 100
        assert page.inner_text("#found") == "10000 clients"
        page.click("th[data-name=connections] button")
        page.wait_for_selector("#rows tr:first-child button[data-client=c07777]")
        page.click("#next")
        page.wait_for_selector("#range:has-text('101 to')")
        page.fill("#filter", "c0999")
        until(lambda: page.locator("#rows tr").count() == 10)
        assert page.inner_text("#found") == "10 of 10000 clients"


def test_page_on_phone_in_dark_mode_needs_no_sideways_scrolling(new_page: Any) -> None:
    """Only the table itself may be wider than the screen; the ground is dark."""
    with watched() as broker:
        page = new_page(broker, viewport={"width": 390, "height": 844}, color_scheme="dark")
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        for name in ("topics", "channels", "mailboxes", "broker"):
            page.click(f"#tab-{name}")
            page.wait_for_selector(f"#tab-{name}[aria-pressed=true]")
            assert page.evaluate("document.documentElement.scrollWidth") <= 390
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert all(int(part) < 60 for part in re.findall(r"\d+", ground)[:3])


def test_page_with_password_is_shown_to_those_who_have_it(new_page: Any, tmp_path: Path) -> None:
    """The stream has the password too."""
    file = tmp_path / "password"
    file.touch(mode=0o600)
    file.write_text("correct horse")
    monitor = {"address": "127.0.0.1:0", "password_file": str(file)}
    with watched(monitor=monitor) as broker:
        credentials = {"username": "me", "password": "correct horse"}
        page = new_page(broker, http_credentials=credentials)
        page.wait_for_selector("#link:has-text('live')")


def fill(gateway: Any) -> bool:
    """Send to a client that does not read; return whether its queue is full."""
    for _ in range(20):
        gateway.send(1, "billing", bytes(60_000), flags=WANT_RECEIPT)
        if gateway.recv().kind == ERROR:
            return True
    return False


def leave_dead_letters(sender: Raw, orders: Raw) -> None:
    """Fail some of the messages to a mailbox, and hold some of them."""
    orders.ask("open_mailbox", window=6)
    for number in range(40):
        payload = b"order %d" % number * 20
        sender.send(MESSAGE, "orders", payload, message_id=number, flags=WANT_RECEIPT)
        assert sender.recv().kind == RECEIPT
    for seq, reason in ((1, "no such article: 8813"), (3, "the address is not complete")):
        verb = json.dumps({"verb": "dead", "reason": reason}).encode()
        orders.send(ACK, "", verb, message_id=seq, codec=JSON, flags=WANT_RECEIPT)
        while orders.recv().kind != RECEIPT:
            pass


def test_page_of_busy_broker_for_the_documentation(new_page: Any, tmp_path: Path) -> None:
    """A slow client, refusals, traffic and dead letters, as in the pictures in docs/."""
    workers = [f"worker-{number:02}" for number in range(30)]
    allowed = ["gateway", "orders", "report-*"]
    clients: dict[str, Any] = {name: {"send_to": allowed} for name in workers}
    clients |= {"gateway": {}, "report-1": {"expected": True}}
    clients |= {name: {"mailbox": True} for name in ("invoices", "orders")}
    clients["billing"] = {"queue": "64KiB", "when_full": "refuse"}
    with with_mailboxes(tmp_path, clients) as broker:
        connections = [broker.login(name) for name in workers]
        gateway, billing, orders = map(broker.login, ("gateway", "billing", "orders"))
        leave_dead_letters(connections[7], orders)
        page = new_page(broker, viewport={"width": 1280, "height": 860})
        full = False
        for round_number in range(60 if SCREENSHOTS else 5):
            for number, worker in enumerate(connections):
                worker.send(1, "gateway", bytes(50 + 10 * number))
                gateway.recv()
                if (number + round_number) % 20 == 0:
                    worker.send(1, "billing", b"x")
                    worker.recv()
            full = full or fill(gateway)
            page.wait_for_timeout(400 if SCREENSHOTS else 50)
        page.click("th[data-name=waiting] button")
        page.wait_for_selector("#rows tr:first-child:has-text('slow')")
        shot(page, "page")
        page.click("button[data-client=billing]")
        page.wait_for_selector("#detail[open] td:has-text('denied')")
        shot(page, "client")
        page.keyboard.press("Escape")
        page.click("#tab-mailboxes")
        page.click("button[data-mailbox=orders]")
        page.wait_for_selector("#detail[open] td:has-text('no such article')")
        shot(page, "mailbox")
        for each in (*connections, gateway, billing, orders):
            each.close()


@needs_nats
def test_page_shows_the_other_hosts_and_that_nats_is_away(new_page: Any, tmp_path: Path) -> None:
    """The table is that of `brokerctl hosts`, and changes by itself."""
    with (
        nats_server(tmp_path) as server,
        brokers(server, "alice bob", prefix="page", names="b") as others,
        watched(
            "alice bob", cluster={"host": "a", "nats": [server.url], "prefix": "page"}
        ) as broker,
    ):
        others.connect("bob", "b")
        page = new_page(broker)
        assert "host a" in page.inner_text("body")
        page.click("#tab-hosts")
        page.wait_for_selector("tr:has(td:text-is('b')):has(td:text-is('up'))")
        shown = page.locator("tr:has(td:text-is('b')) td").all_inner_texts()
        assert shown[0] == "b"
        shot(page, "page-hosts")
        server.kill()
        page.wait_for_selector("text=no other host: nats://")
        page.wait_for_selector("tr:has(td:text-is('b')):has(td:text-is('away'))")
