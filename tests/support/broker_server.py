"""Runs a broker for the tests of a Python that is too old for one.

It reads calls from standard input, each a JSON object in a line: ``call`` is the method
of RunningBroker, ``args`` and ``options`` are its arguments. It answers each with a line
that has ``result``, or ``error``. It ends with its input.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from brokerd.testing import RunningBroker


def answer_to(broker: RunningBroker, line: str) -> dict[str, Any]:
    """Return the answer to a call."""
    call = json.loads(line)
    try:
        result = getattr(broker, call["call"])(*call["args"], **call["options"])
    except Exception as error:  # noqa: BLE001 - the caller raises it
        return {"error": f"{type(error).__name__}: {error}"}
    return {
        "result": result.hex() if isinstance(result, bytes) else result,
        "address": broker.address,
    }


def main() -> None:
    """Serve until the input ends."""
    broker = RunningBroker(**json.loads(sys.stdin.readline()))
    try:
        for line in sys.stdin:
            print(json.dumps(answer_to(broker, line)), flush=True)
    finally:
        broker.close()


if __name__ == "__main__":
    main()
