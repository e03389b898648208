"""A frame enters the broker once: its parts use each other in one direction only."""

from __future__ import annotations

import ast
import json
import re
import sys
from pathlib import Path
from types import FrameType
from typing import Any, Final

import pytest
from support.fake_network import FakeNet, client

from brokerd.config.values import RateConfig, WhenFull
from brokerd.core import broker as broker_module
from brokerd.core.operations import _ADMIN, _OPEN
from brokerd_client.wire.envelope import Envelope, Flag, Kind, encode

CORE: Final = Path(broker_module.__file__).parent
#: The parts of the broker; each may use only the parts before it.
PARTS: Final = (
    "requests",
    "replies",
    "held_senders",
    "reports",
    "mailboxes",
    "delivery",
    "events",
    "goaway",
    "operations",
    "broker",
)
#: Modules that use the broker: the routing loops and the slow path hand frames to it,
#: and the snapshot is taken of it.
ABOVE: Final = {"_routing_py", "_routing_c", "slow_path", "snapshot", "precopy"}


def modules_used(source: str) -> set[str]:
    """Return the modules of the core that a source imports, also for annotations only."""
    used = set()
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            if name.startswith("brokerd.core."):
                used.add(name.split(".")[2])
    return used


def names_broker(source: str) -> bool:
    """Return whether a source names the class Broker, also within a string annotation."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name) and node.id == "Broker":
            return True
        if isinstance(node, ast.Attribute) and node.attr == "Broker":
            return True
        text = node.value if isinstance(node, ast.Constant) else None
        if isinstance(text, str) and re.search(r"\bBroker\b[\],|]|^Broker$", text):
            return True
    return False


def problems_of(module: str, source: str) -> list[str]:
    """Return a line for each use of a part that the module must not have."""
    allowed = PARTS[: PARTS.index(module)] if module in PARTS else ()
    problems = [
        f"{module} uses {used}"
        for used in sorted(modules_used(source) & set(PARTS))
        if module in PARTS and used not in allowed
    ]
    if module not in ABOVE and module != "broker":
        if "broker" in modules_used(source):
            problems.append(f"{module} imports the broker")
        if names_broker(source):
            problems.append(f"{module} names Broker")
    return problems


@pytest.mark.parametrize("path", sorted(CORE.glob("*.py")), ids=lambda path: path.stem)
def test_core_module_imports_only_lower_modules(path: Path) -> None:
    """Imports for type annotations count too."""
    assert problems_of(path.stem, path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("replies", "from brokerd.core.delivery import Delivery"),
        ("delivery", "from brokerd.core import events"),
        ("events", "if True:\n    from brokerd.core.operations import Operations"),
        ("delivery", "from brokerd.core.broker import CoreLimits"),
        ("session", "import brokerd.core.broker"),
        ("exchange", "def send(broker: Broker) -> None: ..."),
        ("exchange", "def send(broker: core.Broker) -> None: ..."),
        ("exchange", "Operation = 'Callable[[Broker, int], None]'"),
    ],
)
def test_core_module_importing_higher_module_is_reported(module: str, line: str) -> None:
    """The check detects each kind of fault."""
    assert problems_of(module, line)


class Entries:
    """Counts the calls of the broker from other modules while it handles a frame."""

    def __init__(self) -> None:
        self.frames = 0
        self.returns: list[str] = []
        self._inside = 0

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        """Note a call or a return, as a profile function of the interpreter."""
        if event not in ("call", "return") or not self._is_broker(frame):
            return
        outer = frame.f_back
        assert outer is not None
        if frame.f_code.co_name == "handle":
            self._inside += 1 if event == "call" else -1
            self.frames += event == "call"
        elif event == "call" and self._inside and not self._is_broker(outer):
            self.returns.append(f"{frame.f_code.co_name} from {outer.f_code.co_qualname}")

    @staticmethod
    def _is_broker(frame: FrameType) -> bool:
        return frame.f_code.co_filename == broker_module.__file__


def test_broker_handling_frame_is_not_entered_again() -> None:
    """Every kind of frame is tried: delivered, held, refused and answered."""
    net = FakeNet(
        client("ann", admin=True, requests=1),
        client("bob", queue=200),
        client("pool", connections=2, when_full=WhenFull.DROP_OLDEST, queue=200),
        client("full", when_full=WhenFull.DISCONNECT, queue=100),
        client("metered", rate=RateConfig(1, None)),
        client("mute", send_to=(), publish=()),
    )
    peers = {name: net.connect(name) for name in ("ann", "bob", "full", "metered", "mute")}
    pool = [net.connect("pool") for _ in range(2)]
    ann = peers["ann"]
    for name in ("bob", "full"):
        peers[name].ask("subscribe", topic="t.>")
        peers[name].block(1)
    for member in pool:
        member.block(1)
    entries = Entries()
    sys.setprofile(entries)
    try:
        for source in (ann, peers["metered"], peers["mute"]):
            for kind in Kind:
                for name in ("bob", "pool", "full", "nobody", "$broker", "$else", "bob/x", "!"):
                    for flags in (0, Flag.RECEIPT):
                        topic = "t.x" if kind is Kind.EVENT else ""
                        envelope = Envelope(
                            kind, 7, "" if topic else name, b"x" * 150, topic=topic, flags=flags
                        )
                        if not source.gone and not source.session.closing:
                            source.session.charged = False
                            net.broker.handle(source.session, memoryview(encode(envelope)), net.now)
                            net.broker.held.release(source.session)
        for op in (*_OPEN, *_ADMIN, "nothing"):
            payload = json.dumps({"op": op, "topic": "t.x", "address": "mute"}).encode()
            body = encode(Envelope(Kind.REQUEST, 8, "$broker", payload, codec=2))
            net.broker.handle(ann.session, memoryview(body), net.now)
    finally:
        sys.setprofile(None)

    assert entries.frames > 100
    assert entries.returns == []
