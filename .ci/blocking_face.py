"""Writes the part of the blocking face that is the same in both faces.

``client.py``, ``listener.py``, ``rpc.py``, ``subscriptions.py`` and ``traced.py`` are
written by hand for asyncio, in ``aio/``.
This program makes those of ``blocking/`` from them: it removes ``async`` and ``await``,
and makes the replacements below. With ``--check`` it writes nothing and returns 1 if a
file is not up to date.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = ROOT / "client" / "brokerd_client"

HEAD = """
# Written by .ci/blocking_face.py from aio/{name}: change that file, and run `make faces`.
"""
#: Patterns that hold for all files, and their replacements.
PATTERNS = (
    (r"async def ", "def "),
    (r"async (with|for) ", r"\1 "),
    (r"\bawait ", ""),
    (r"\b__a(enter|exit)__", r"__\1__"),
    (r"brokerd_client\.aio\b", "brokerd_client.blocking"),
    (r"# ruff: noqa: ASYNC109.*\n", ""),
    (r"from brokerd_client\.\w+\.opening import Opening\n", ""),
    (r'\s*"Opening",', ""),
    (r"\bOpening\[(\w+)\]", r"\1"),
    (
        r"return Opening\(\s*lambda: self\._open\(([^\n]*), timeout\),\s*\"\w+\"\s*\)\n",
        # The guard stands in the outermost call: an exception of a signal handler can
        # strike behind the inner one.
        """subscription = \\1
        try:
            self._open(subscription, timeout)
            return subscription
        except BaseException:
            self._take_back(subscription)
            raise
""",
    ),
    (r"return Opening\(\s*lambda: (.*?),\s*\"\w+\"\s*\)\n(?=\n)", r"return \1\n"),
    (r"\bAwaitable\[(\w+)\]", r"\1"),
    (r"import Awaitable, Callable", "import Callable"),
    (r"An async iterator", "An iterator"),
    (r"an async iterator", "an iterator"),
    (r"an asyncio client", "a blocking client"),
    (r"the asyncio face", "the blocking face"),
)
#: For each file, texts of the asyncio face and what the blocking face has instead. Each
#: stands once in its file.
TEXTS = {
    "client.py": {
        "The broker client for asyncio: coroutines and async iterators, on one event loop.": (
            "The blocking broker client: threads may share it, and its calls block."
        ),
        """ A task
that is cancelled while it waits leaves nothing behind. The client works with any event
loop that has transports: asyncio's own and uvloop.
""": "\n",
        """
    Any task of its event loop may use it. Every call raises Closed after close(),
    WrongProcess in a fork, and WrongLoop in another event loop or thread.
""": """
    Any thread may use it, but a fork of the process may not. Every call raises Closed
    after close(), and WrongProcess in a fork.
""",
        """ KeyboardInterrupt and SystemExit then end the
        event loop, as in every task.
""": """ The handler runs on a thread
        of the client.
""",
        "for each message, in order.\n": "for each message, in order, on a thread.\n",
        "handler: The function or coroutine function to call for each message.": (
            "handler: The function to call for each message."
        ),
        "handler: The function or coroutine function to call for each request.": (
            "handler: The function to call for each request."
        ),
        "Subscribe to topics, once the result is awaited, entered or iterated over.": (
            "Subscribe to topics."
        ),
        "callback: The function or coroutine function to call for each event.": (
            "callback: The function to call for each event, on a thread of the client."
        ),
        "The subscription, to be opened: an": "The subscription: an",
        "async iterator of Presence, to be opened.": "iterator of Presence.",
        "        # An event loop's own clock may stand still within one turn.\n": "",
        "end every task of the client": "end every thread of the client",
        "    from brokerd_client.aio.streams import Stream\n": (
            "    from brokerd_client.connection.stream import Connection\n"
        ),
        "async def open_stream(": "def open(",
        "-> Stream:": "-> Connection:",
        "The channel: a pair of asyncio's stream reader and writer.": (
            "The channel: a connection, as of the direct API."
        ),
        "Listen for channels, once the result is awaited, entered or iterated over.": (
            "Listen for channels."
        ),
        "The listener, to be opened: an": "The listener: an",
        "Connect to a broker, once the result is awaited or entered.": (
            "Connect to a broker and return the client."
        ),
        "    Write ``async with connect(...) as client``.\n\n": "",
        "delivers no more of them. The default is 256.": (
            "delivers no more of them, beside those whose handler waits for the broker.\n"
            "            The default is 4."
        ),
        "The client, to be opened; authenticated and introduced once it is open.": (
            "The client, authenticated and introduced."
        ),
    },
    "listener.py": {
        "    from brokerd_client.aio.streams import Stream\n": (
            "    from brokerd_client.connection.stream import Connection\n"
        ),
        "accept(self, timeout: float | None = None) -> Stream:": (
            "accept(self, timeout: float | None = None) -> Connection:"
        ),
        "timeout: float | None = 10.0) -> Stream:": "timeout: float | None = 10.0) -> Connection:",
        """    async def __anext__(self) -> Stream:  # type: ignore[override]
        try:
            return await self.accept()
        except Closed:
            raise StopAsyncIteration from None
""": """    def __iter__(self) -> Iterator[Connection]:  # type: ignore[override]
        with contextlib.suppress(Closed):
            while True:
                yield self.accept()
""",
        "import time\n": "import time\nfrom collections.abc import Iterator\n",
    },
    "traced.py": {
        "Subscribe to topics, once the result is awaited, entered or iterated over.": (
            "Subscribe to topics."
        ),
    },
    "rpc.py": {
        "            result = method(*args, **kwargs)\n"
        "            return await result if inspect.isawaitable(result) else result\n": (
            "            return method(*args, **kwargs)\n"
        ),
        "import inspect\n": "",
    },
    "subscriptions.py": {
        """    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> T:
        try:
            return await self.recv()
        except Closed:
            raise StopAsyncIteration from None
""": """    def __iter__(self) -> Iterator[T]:
        with contextlib.suppress(Closed):
            while True:
                yield self.recv()
""",
        "import Callable\n": "import Callable, Iterator\n",
        "\nfrom collections.abc": "\nimport contextlib\nfrom collections.abc",
        "passes the events to it, one after the other": (
            "passes the events to it on a thread of its own,\n    one after the other"
        ),
    },
}


def main(arguments: list[str]) -> int:
    """Write or check the files; return the exit status."""
    stale = []
    for name in TEXTS:
        path = LIBRARY / "blocking" / name
        text = blocking_text(name)
        if path.read_text(encoding="utf-8") != text:
            stale.append(path)
            if "--check" not in arguments:
                path.write_text(text, encoding="utf-8")
    for path in stale:
        print(f"{path}: {'not up to date' if '--check' in arguments else 'written'}")
    return int(bool(stale) and "--check" in arguments)


def blocking_text(name: str) -> str:
    """Return the text of a file of the blocking face, formatted."""
    text = (LIBRARY / "aio" / name).read_text(encoding="utf-8")
    for here, there in TEXTS[name].items():
        if text.count(here) != 1:
            raise ValueError(f"aio/{name} has {text.count(here)} times, not once: {here!r}")
        text = text.replace(here, there)
    for pattern, replacement in PATTERNS:
        text = re.sub(pattern, replacement, text, flags=re.DOTALL if "lambda" in pattern else 0)
    end = text.index('"""\n', 3) + len('"""\n')
    text = text[:end] + HEAD.format(name=name) + text[end:].lstrip("\n")
    done = subprocess.run(
        [sys.executable, "-m", "ruff", "format", "--stdin-filename", str(LIBRARY / name), "-"],
        input=text,
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    return done.stdout


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
