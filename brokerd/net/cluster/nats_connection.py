"""The connection to one NATS server of several, which is made again when it is lost.

nats-py connects and authenticates; then :class:`NatsStream` has the connection. A new
client makes each connection. The buffer of nats-py would publish messages that the broker
has reported as lost. Its reconnect waits for a server that does not read.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import itertools
from collections.abc import Callable, Iterable
from typing import Any, Final

from brokerd.config.values import ClusterConfig
from brokerd.core.cluster.cluster import ALL
from brokerd.core.cluster.hub import Outgoing
from brokerd.net.cluster.nats_stream import NatsStream

__all__ = ["NatsConnection", "preload"]

#: Seconds for one attempt to connect.
_ATTEMPT_S: Final = 3
#: Seconds between two attempts, at first and at most.
_FIRST_PAUSE_S: Final = 0.1
_LONGEST_PAUSE_S: Final = 2.0
#: Seconds between two pings to the server, and pings without an answer after which the
#: connection is lost.
_PING_S: Final = 1
_PINGS: Final = 3
#: Seconds for the last messages to leave at the end.
_CLOSE_S: Final = 2.0
#: Seconds for a client that is dropped to close its connection.
_DROP_S: Final = 0.5


class NatsConnection:
    """Connects to NATS as long as it is not closed.

    Args:
        config: The servers, credentials, host and prefix.
        on_connected: Is called with the most bytes of one message.
        on_lost: Is called with the reason; also for the first attempt that fails.
        on_message: Is called with the origin, the kind and the payload of a message.
        on_read: Is called after the messages of one read.
        on_error: Is called with what the server complained about.
    """

    def __init__(
        self,
        config: ClusterConfig,
        *,
        on_connected: Callable[[int], None],
        on_lost: Callable[[str], None],
        on_message: Callable[[str, str, bytes], None],
        on_read: Callable[[], None],
        on_error: Callable[[str], None],
    ) -> None:
        self.config = config
        self._on_connected = on_connected
        self._on_lost = on_lost
        self._on_message = on_message
        self._on_read = on_read
        self._on_error = on_error
        self._stream: NatsStream | None = None
        self._lost = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        #: Clients that are being closed.
        self._closing: set[asyncio.Task[None]] = set()
        self._reason = ""
        self._prefix_size = len(config.prefix.split("."))
        self._subject = f"{config.prefix}.{config.host}"
        #: The subjects of messages of each kind to each host.
        self._subjects: dict[tuple[str, str], bytes] = {}

    def start(self) -> None:
        """Begin to connect."""
        self._task = asyncio.get_running_loop().create_task(self._keep_connected())

    def publish(self, messages: Iterable[Outgoing]) -> None:
        """Publish messages, in order; what can't leave is lost."""
        if self._stream is not None:
            self._stream.publish(
                [(self._subject_of(to, kind), payload) for to, kind, payload in messages]
            )

    def _subject_of(self, to: str, kind: str) -> bytes:
        subject = self._subjects.get((to, kind))
        if subject is None:
            subject = f"{self._subject}.{to}.{kind}".encode()
            self._subjects[to, kind] = subject
        return subject

    async def close(self) -> None:
        """Close the connection once what was published has left."""
        stream, self._stream = self._stream, None
        if stream is not None:
            with contextlib.suppress(TimeoutError, ConnectionError):
                async with asyncio.timeout(_CLOSE_S):
                    await stream.flush()
            stream.abort()
        self.kill()
        if self._closing:
            await asyncio.wait(self._closing, timeout=_CLOSE_S)

    def kill(self) -> None:
        """Close the connection at once."""
        if self._task is not None:
            self._task.cancel()
        self._drop()

    # The task that connects

    async def _keep_connected(self) -> None:
        pause = _FIRST_PAUSE_S
        for url in itertools.cycle(self.config.nats):
            self._lost.clear()
            self._reason = ""
            try:
                async with asyncio.timeout(_ATTEMPT_S):
                    max_payload = await self._connect(url)
            except Exception as error:  # noqa: BLE001 - nats-py raises whatever its parser did
                self._drop()
                self._on_lost(_text(error, url, self._reason))
                await asyncio.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE_S)
                continue
            pause = _FIRST_PAUSE_S
            self._on_connected(max_payload)
            await self._lost.wait()
            self._drop()
            self._on_lost(self._reason or f"the connection to {_shown(url)} was lost")

    async def _connect(self, url: str) -> int:
        """Connect to one server, and subscribe; return its max_payload."""
        from nats.aio.client import Client

        client = Client()
        try:
            await client.connect(
                [url],
                error_cb=self._note_attempt,
                allow_reconnect=False,
                max_reconnect_attempts=1,
                reconnect_time_wait=0,
                connect_timeout=_ATTEMPT_S,
                no_echo=True,
                pending_size=-1,
                name=f"brokerd {self.config.host}",
                **_credentials(self.config),
            )
        except BaseException:
            task = asyncio.get_running_loop().create_task(_close(client))
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)
            raise
        stream = self._stream = NatsStream(
            read_subject=self._read_subject,
            on_message=self._on_message,
            on_read=self._on_read,
            on_error=self._note_error,
            on_lost=lambda reason: self._note_end(stream, reason),
        )
        stream.take_over(client)
        stream.subscribe(f"{self.config.prefix}.*.{to}.>" for to in (self.config.host, ALL))
        await stream.flush()
        stream.keep_alive(_PING_S, _PINGS)
        return int(client.max_payload)

    async def _note_attempt(self, error: Exception) -> None:
        self._note_error(str(error))

    def _note_error(self, text: str) -> None:
        self._reason = text
        self._on_error(text)

    def _note_end(self, stream: NatsStream, reason: str) -> None:
        if stream is self._stream:
            self._reason = self._reason or reason
            self._lost.set()

    def _drop(self) -> None:
        """Close the present connection at once, if there is one."""
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.abort()

    def _read_subject(self, subject: str) -> tuple[str, str] | None:
        """Return the origin and the kind of messages with a subject; None for a foreign one."""
        tokens = subject.split(".")
        if len(tokens) != self._prefix_size + 3:
            return None
        return tokens[self._prefix_size], tokens[-1]


def preload() -> None:
    """Import the client library, which takes a fifth of a second; to be called in a thread."""
    importlib.import_module("nats.aio.client")


async def _close(client: Any) -> None:
    """Close a client that did not connect."""
    try:
        with contextlib.suppress(Exception):
            async with asyncio.timeout(_DROP_S):
                await client.close()
    finally:
        transport = getattr(client, "_transport", None)
        writer = getattr(transport, "_io_writer", None)
        if writer is not None:
            writer.transport.abort()


def _credentials(config: ClusterConfig) -> dict[str, Any]:
    """Return the arguments of ``connect`` for TLS and the host's identity."""
    from nats.aio.client import RawCredentials

    arguments: dict[str, Any] = {}
    if config.tls is not None:
        arguments["tls"] = config.tls.context
    if config.credentials is not None:
        arguments["user_credentials"] = RawCredentials(config.credentials.decode())
    elif config.nkey is not None:
        arguments["nkeys_seed_str"] = config.nkey.decode()
    elif config.user:
        arguments["user"] = config.user
        arguments["password"] = (config.password or b"").decode()
    return arguments


def _shown(url: str) -> str:
    """Return an address without the password that may stand in it."""
    scheme, _, rest = url.partition("://")
    return f"{scheme}://{rest.rpartition('@')[2]}"


def _text(error: Exception, url: str, reason: str) -> str:
    """Return why an attempt failed. reason: what the client of nats-py reported before."""
    if isinstance(error, TimeoutError):
        return f"{_shown(url)} did not answer within {_ATTEMPT_S:g} s"
    return f"{_shown(url)}: {reason or str(error) or type(error).__name__}"
