"""docs/tracing.md: its examples run as they stand."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from support.pages import code_blocks

from brokerd.testing import running

FIRST, LOOP = (block for block in code_blocks("docs/tracing.md") if block.language == "python")
TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def test_tracing_page_first_example_prints_connected_spans() -> None:
    """It prints the answer and three spans of one trace."""
    done = subprocess.run(
        [sys.executable, "-c", FIRST.text], capture_output=True, text=True, timeout=60, check=True
    )
    for part in ('"name": "work"', '"name": "request bob"', '"name": "handle bob"', "\n42\n"):
        assert part in f"\n{done.stdout}"
    assert len({line for line in done.stdout.splitlines() if '"trace_id"' in line}) == 1


def test_tracing_page_loop_takes_the_trace_from_the_message(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The work of a message belongs to its trace, and other extensions do no harm."""
    monkeypatch.setattr(trace, "get_tracer", TracerProvider(shutdown_on_exit=False).get_tracer)
    traces: list[int] = []

    def work(payload: Any) -> None:
        traces.append(trace.get_current_span().get_span_context().trace_id)
        if payload == "last":
            client.close()

    with running(clients={"alice": {}, "bob": {}}) as broker, broker.connect("bob") as client:
        with broker.connect("alice") as alice:
            alice.send("bob", 1, extension={"traceparent": TRACEPARENT})
            alice.send("bob", 2, extension={"traceparent": 5})
            alice.send("bob", "last")
        exec(LOOP.text, {"client": client, "work": work})

    assert traces[0] == 0x0AF7651916CD43DD8448EB211C80319C
    assert len(set(traces)) == 3
