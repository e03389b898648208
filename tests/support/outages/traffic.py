"""Traffic between processes, for faults to happen to, and the account of every message."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Self

from support.keys import key_of
from support.waiting import WAIT_S, until

__all__ = ["RECIPIENTS", "SENDERS", "Account", "Traffic"]

MEMBER = Path(__file__).with_name("member.py")
SENDERS = ("s0", "s1")
RECIPIENTS = ("r0", "r1")
#: The outcome is not known, and the sender got an error that says so.
_IN_DOUBT = frozenset({"InDoubt", "StoreInDoubt", "TimedOut"})
#: A message: the recipient has it or will have it. A request: it was answered.
_GOOD = frozenset({"Receipt", "Reply"})


@dataclass
class Account:
    """The outcomes of all messages and requests, counted together.

    Attributes:
        refused: The sender got an error: not delivered, or, for a request, not
            answered.
        in_doubt: The sender got an error that the outcome is not known.
        died: Messages with a receipt that were in the memory of a killed process.
    """

    fault: str
    seen: str = ""
    sent: int = 0
    delivered: int = 0
    refused: int = 0
    in_doubt: int = 0
    died: int = 0
    twice: int = 0
    out_of_order: int = 0
    unaccounted: int = 0
    delivered_and_refused: int = 0

    @property
    def balances(self) -> bool:
        return not (
            self.twice or self.out_of_order or self.unaccounted or self.delivered_and_refused
        )

    def record(self, seen: str = "") -> Account:
        """Check that the account balances, print it, and add it to $BROKERD_FAULTS, the
        rows of docs/reliability.md.
        """
        self.seen = seen or self.seen
        print(f"\n{self}")
        assert self.sent > 0
        assert self.balances, self
        if file := os.environ.get("BROKERD_FAULTS"):
            with Path(file).open("a") as lines:
                lines.write(json.dumps(asdict(self)) + "\n")
        return self


class Member:
    """One process of the traffic.

    Args:
        command: The arguments that member.py describes.
        inside: Called first in the new process, for example to enter a network.
    """

    def __init__(
        self, name: str, note_file: Path, command: list[str], inside: Callable[[], None] | None
    ) -> None:
        self.name = name
        self.note_file = note_file
        note_file.touch()
        self.popen = subprocess.Popen(
            [sys.executable, str(MEMBER), *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            preexec_fn=inside,
        )

    def wait_for(self, word: str) -> None:
        """Wait for the next line, which must be this word."""
        printed: list[str] = []
        assert self.popen.stdout is not None
        stdout = self.popen.stdout
        reader = threading.Thread(target=lambda: printed.append(stdout.readline()), daemon=True)
        reader.start()
        reader.join(WAIT_S)
        assert printed == [f"{word}\n"], f"{self.name} said {printed} instead of {word}"

    def tell(self) -> None:
        assert self.popen.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.popen.stdin.write("go on\n")

    def lines(self) -> list[list[str]]:
        """Return the member's notes, without a last line that is being written."""
        return [line.split() for line in self.note_file.read_text().split("\n")[:-1]]

    def end(self) -> None:
        self.popen.kill()
        self.popen.communicate()


class Traffic:
    """Senders that send to every recipient all the time.

    Args:
        address: Where clients connect: one for all, or one for each name.
        ca: The CA of the broker's certificate, for TLS.
        blocking: The members that use the blocking client; the others use asyncio.
    """

    def __init__(
        self,
        directory: Path,
        address: str | Mapping[str, str],
        *,
        senders: Sequence[str] = SENDERS,
        recipients: Sequence[str] = RECIPIENTS,
        ca: Path | None = None,
        blocking: Iterable[str] = (),
        inside: Callable[[], None] | None = None,
        inside_senders: Callable[[], None] | None = None,
    ) -> None:
        self._directory = directory
        self._address = address
        self._ca = "-" if ca is None else str(ca)
        self._blocking = frozenset(blocking)
        self._inside = inside
        self.recipients = {name: self._start("receive", name, ()) for name in recipients}
        for each in self.recipients.values():
            each.wait_for("ready")
        self._inside = inside_senders or inside
        self.senders = {name: self._start("send", name, recipients) for name in senders}
        for each in self.senders.values():
            each.wait_for("ready")
        self.goes_on()

    def _start(self, role: str, name: str, others: Iterable[str]) -> Member:
        note_file = self._directory / f"{name}.ledger"
        face = "blocking" if name in self._blocking else "asyncio"
        address = self._address if isinstance(self._address, str) else self._address[name]
        command = [
            face,
            role,
            address,
            name,
            key_of(name).decode(),
            str(note_file),
            self._ca,
            *others,
        ]
        return Member(name, note_file, command, self._inside)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        for each in (*self.senders.values(), *self.recipients.values()):
            each.end()

    def restart(self, name: str) -> None:
        """Start a killed recipient again; it appends to its notes."""
        self.recipients[name].end()
        self.recipients[name] = self._start("receive", name, ())
        self.recipients[name].wait_for("ready")

    def good(self, sender: str, to: str) -> int:
        """Return how many of the sender's messages and requests to this recipient have
        succeeded so far.
        """
        return sum(line[1] == to and line[3] in _GOOD for line in self.senders[sender].lines())

    def goes_on(
        self,
        *,
        but: Iterable[str] = (),
        pairs: Iterable[tuple[str, str]] = (),
        more: int = 24,
    ) -> None:
        """Wait until each sender has sent ``more`` to each recipient, except to those
        in ``but``.

        Args:
            pairs: The pairs of a sender and a recipient to wait for, instead of all.
        """
        pairs = list(pairs) or [
            (sender, to) for sender in self.senders for to in self.recipients if to not in but
        ]
        before = {pair: self.good(*pair) for pair in pairs}
        until(
            lambda: all(self.good(*pair) >= before[pair] + more for pair in pairs),
            "the traffic stands still",
        )

    def finish(self, fault: str, *, killed: Iterable[str] = ()) -> Account:
        """Stop all members in order, and return the account.

        Args:
            killed: The members that were killed and lost their memory, or "broker".
        """
        for group in (self.senders, self.recipients):
            for each in group.values():
                each.tell()
            for each in group.values():
                each.wait_for("done")
        for group in (self.recipients, self.senders):
            for each in group.values():
                each.tell()
                assert each.popen.wait(WAIT_S) == 0, each.name
        return self._account(fault, set(killed))

    def _account(self, fault: str, killed: set[str]) -> Account:
        account = Account(fault)
        got: dict[tuple[str, str, str], list[int]] = defaultdict(list)
        for name, recipient in self.recipients.items():
            for kind, sender, number in recipient.lines():
                got[kind, sender, name].append(int(number))
        for numbers in got.values():
            account.delivered += len(set(numbers))
            account.twice += len(numbers) - len(set(numbers))
            account.out_of_order += sum(later <= earlier for earlier, later in pairwise(numbers))
        there = defaultdict(set, {which: set(numbers) for which, numbers in got.items()})
        for name, sender in self.senders.items():
            outcomes: dict[tuple[str, str, int], str] = {}
            for kind, to, number, word in sender.lines():
                outcomes[kind, to, int(number)] = word
            account.sent += len(outcomes)
            for (kind, to, number), word in outcomes.items():
                self._judge(
                    account, kind, to, word, killed, delivered=number in there[kind, name, to]
                )
            print(name, dict(Counter(outcomes.values())))
        return account

    def _judge(
        self, account: Account, kind: str, to: str, word: str, killed: set[str], *, delivered: bool
    ) -> None:
        if word in _GOOD:
            if not delivered and kind == "message" and killed & {to, "broker"}:
                account.died += 1
            else:
                account.unaccounted += not delivered
        elif word in _IN_DOUBT:
            account.in_doubt += 1
        else:
            account.refused += 1
            # A request may have arrived before its recipient left.
            account.delivered_and_refused += delivered and kind == "message"
