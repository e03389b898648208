"""The monitor's HTTP pages, and the limits that keep requests from slowing the broker.

Any peer that can reach the address can connect. So connections are few and short: one
request each, some seconds at most, and a bounded number of answers per second. Reading
the counters takes a small share of the event loop's time, however often it is
requested. Connections without a request give way to newer ones (pending_requests.py).
"""

from __future__ import annotations

import asyncio
import logging
import platform
import socket
import time
import traceback
from collections.abc import Awaitable, Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Final

from aiohttp import web
from prometheus_client import ProcessCollector
from prometheus_client.core import Metric

from brokerd.config.model import Config, MonitorConfig
from brokerd.core.session import Session
from brokerd.daemon.threads import run_in_thread
from brokerd.log.logger import in_words
from brokerd.monitor import formats as exposition
from brokerd.monitor import metrics
from brokerd.monitor.collect import Departed, take
from brokerd.monitor.history import History
from brokerd.monitor.hosts import fits
from brokerd.monitor.key_expiry import ends_of_keys, expiry_of
from brokerd.monitor.live import MOST_STREAMS, Live
from brokerd.monitor.loop_lag import Lag
from brokerd.monitor.password import is_right
from brokerd.monitor.pending_requests import Pending
from brokerd.monitor.sources import Sources
from brokerd.net.handshake.penalties import origin_of
from brokerd.net.listen.listener import Listening
from brokerd_client.address import Address

__all__ = ["MonitorServer"]

#: Most connections that are answered at once. They share the process's descriptors with
#: the clients.
_MOST: Final = 16
#: Most connections at once without a complete request: at 2,500 new connections a
#: second, each has 25 milliseconds to send its request.
_MOST_SILENT: Final = 64
#: Most connections at once whose complete request waits for the next second.
_MOST_WHOLE: Final = 64
#: Longest time that a connection may last, in seconds.
_LONGEST: Final = 10.0
#: Most requests answered per second: some thirty milliseconds' work.
_A_SECOND: Final = 100
#: Most connections accepted per second, mostly silent ones: some two hundred
#: milliseconds' work.
_ACCEPTED: Final = 4000
#: For every second of reading the counters, seconds until they are read again.
_REST: Final = 9
#: Bytes of a page given to the system at once, so that a slow reader does not cause a
#: copy of the whole page.
_PIECE: Final = 64 * 1024
#: Most bytes of one header, and of the request's first line.
_LINE: Final = 4096
_MISDIRECTED: Final = (
    "this monitor answers where it is asked for by an IP address, as localhost, or by a name of its"
    " configuration: ask so, or add the name to monitor.hosts\n"
)
_HEADERS: Final = {
    "Server": "brokerd",
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    # No other page may show this one, run a script in it, or read from it.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self';"
        " base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
}
#: The files of the page for browsers.
_WEB: Final = Path(__file__).parent / "web"
_FILES: Final = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
#: Pages that need no password: probes have none.
_OPEN: Final = frozenset({"/livez", "/readyz"})

_Page = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]


class MonitorServer:
    """The monitor of one daemon, at its current addresses."""

    def __init__(self, sources: Sources) -> None:
        self._sources = sources
        self._loop = asyncio.get_running_loop()
        self.listening: list[Listening] = []
        self._http_server = _HttpServer(self._answer)
        self._pending = Pending(_MOST_SILENT, _MOST_WHOLE, _LONGEST, self._on_complete)
        self._arrivals: set[asyncio.Task[object]] = set()
        #: Connections accepted, and requests answered, in the current second.
        self._accepted = 0
        self._answered = 0
        self._paused = False
        self._hosts: frozenset[str] | None = frozenset()
        self._second: asyncio.TimerHandle | None = None
        self._pages: dict[str, _Page] = {
            "/livez": self._livez,
            "/readyz": self._readyz,
            "/metrics": self._metrics,
        }
        self._password: bytes | None = None
        self._history: History | None = None
        self._live: Live | None = None
        self._lag = Lag(self._loop)
        self._process = ProcessCollector(registry=None)
        self._departed: Departed | None = None
        self._ends: tuple[Config, list[tuple[str, str, float]]] | None = None
        self._reading = asyncio.Lock()
        self._rested_at = 0.0
        sources.server().on_left = self._on_left

    @property
    def addresses(self) -> list[Address]:
        """Addresses that the monitor listens at, with ports chosen by the system filled
        in.
        """
        return [listening.address for listening in self.listening]

    # Called by the daemon

    def move(self, opened: list[Listening]) -> None:
        """Listen at these sockets instead of the previous ones."""
        self._stop_listening()
        self.listening = opened
        for listening in opened:
            self._listen_at(listening)
        self._sources.log.info(
            "monitor.listening", addresses=[str(address) for address in self.addresses]
        )

    def apply(self, config: MonitorConfig) -> None:
        """Apply settings. The sockets are moved by :meth:`move`."""
        self._password = config.password
        self._switch_page(config.page)
        if not config.is_local and config.password is None:
            self._sources.log.warning(
                "monitor.exposed",
                address=str(config.address),
                reason="monitor needs no password: every peer that reaches it can read the metrics",
            )
        # A browser can't connect to a Unix socket, so the header has no meaning there.
        self._hosts = None if config.address.family == "AF_UNIX" else config.answered_hosts
        if not config.per_client:
            self._departed = None
        elif self._departed is None:
            self._departed = Departed()

    def _switch_page(self, on: bool) -> None:
        """Turn the page for browsers on or off."""
        if on and self._history is None:
            self._history = History(self._sources, self._lag)
            self._live = Live(self._sources, self._history)
            self._pages |= dict.fromkeys(_FILES, self._file) | {"/live": self._stream}
        elif not on and self._history is not None:
            self._stop_page()
            for page in (*_FILES, "/live"):
                del self._pages[page]

    def _stop_page(self) -> None:
        if self._history is not None and self._live is not None:
            self._history.close()
            self._live.close()
        self._history = self._live = None

    def close(self) -> None:
        """Stop listening and close every connection."""
        self._sources.log.info(
            "monitor.closed", addresses=[str(address) for address in self.addresses]
        )
        self._stop_listening()
        self._pending.close()
        self._http_server.close()
        self._stop_page()
        self._lag.close()
        if self._second is not None:
            self._second.cancel()
            self._second = None
        self._sources.server().on_left = lambda session: None

    # Accepting

    def _listen_at(self, listening: Listening) -> None:
        if not self._paused:
            self._loop.add_reader(listening.sock.fileno(), self._on_acceptable, listening)

    def _stop_listening(self) -> None:
        for listening in self.listening:
            self._loop.remove_reader(listening.sock.fileno())
            listening.close()
        self.listening = []

    def _on_acceptable(self, listening: Listening) -> None:
        self._begin_second()
        try:
            sock, peer = listening.sock.accept()
        except (BlockingIOError, InterruptedError, ConnectionError):
            return
        except OSError:
            # No descriptor is left, for example. Pending connections can wait.
            self._accepted = _ACCEPTED
        else:
            self._accepted += 1
            sock.setblocking(False)
            # This also bounds the bytes that the system keeps for a slow reader.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _PIECE)
            self._pending.add(sock, origin_of(peer, None))
        self._pause_at_bound()

    def _pause_at_bound(self) -> None:
        """Stop accepting connections for this second once it reaches the limit."""
        if self._accepted >= _ACCEPTED and not self._paused:
            self._paused = True
            for listening in self.listening:
                self._loop.remove_reader(listening.sock.fileno())

    def _begin_second(self) -> None:
        if self._second is None:
            self._accepted = self._answered = 0
            self._second = self._loop.call_later(1.0, self._on_second)

    def _on_second(self) -> None:
        self._second = None
        if len(self._pending):
            self._on_complete()
        if self._paused:
            self._paused = False
            for listening in self.listening:
                self._listen_at(listening)

    def _on_complete(self) -> None:
        """Answer complete requests up to this second's limit; the rest wait for the
        next second.
        """
        self._begin_second()
        while self._answered < _A_SECOND and (request := self._pending.take()) is not None:
            self._answered += 1
            task = self._loop.create_task(self._arrive(*request))
            self._arrivals.add(task)
            task.add_done_callback(self._arrivals.discard)

    async def _arrive(self, sock: socket.socket, head: bytes) -> None:
        self._http_server.heads[sock.fileno()] = head
        try:
            await self._loop.connect_accepted_socket(self._http_server, sock)
        except OSError:
            # The peer disconnected before the connection was set up.
            self._http_server.heads.pop(sock.fileno(), None)
            sock.close()

    # Answering

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        try:
            page = self._pages.get(request.path)
            if not self._may_answer(request):
                response: web.StreamResponse = _text(_MISDIRECTED, 421)
            elif not self._is_trusted(request):
                response = _text("give the password of monitor.password_file\n", 401)
                response.headers["WWW-Authenticate"] = 'Basic realm="brokerd", charset="UTF-8"'
            elif page is None:
                response = _text(f"there are {self._listed_pages()}\n", 404)
            elif request.method not in ("GET", "HEAD"):
                response = _text("GET and HEAD only\n", 405)
                response.headers["Allow"] = "GET, HEAD"
            else:
                response = await page(request)
        except ConnectionError:
            raise
        except Exception as error:  # noqa: BLE001 - an error in the monitor must not end the broker
            self._sources.log.error(
                "monitor.bug",
                page=request.path,
                error=in_words(error),
                trace=traceback.format_exception(error),
            )
            response = _text("a bug in the monitor; the log says more\n", 500)
        response.force_close()
        return response

    def _may_answer(self, request: web.BaseRequest) -> bool:
        """Return whether the request names this monitor, not a foreign name that
        resolves here.
        """
        if self._hosts is None:
            return True
        # A whole URL in the first line takes precedence over the header (RFC 9112,
        # 3.2.2).
        _, colons, after_scheme = request.raw_path.partition("://")
        outgoing_requests = (
            after_scheme.partition("/")[0].rpartition("@")[2]
            if colons and request.raw_path[0] != "/"
            else ""
        )
        return fits([*request.headers.getall("Host", ()), outgoing_requests], self._hosts)

    def _is_trusted(self, request: web.BaseRequest) -> bool:
        """Return whether the request has the password, or needs none."""
        return (
            self._password is None
            or request.path in _OPEN
            or is_right(request.headers.get("Authorization", ""), self._password)
        )

    def _listed_pages(self) -> str:
        parts = [page for page in self._pages if page == "/" or page not in (*_FILES, "/live")]
        return ", ".join(sorted(parts))

    async def _file(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer with a file of the page for browsers."""
        name, content_type = _FILES[request.path]
        body = await run_in_thread((_WEB / name).read_bytes)
        response = web.Response(body=body, headers=_HEADERS)
        response.content_type, response.charset = content_type, "utf-8"
        return response

    async def _stream(self, request: web.BaseRequest) -> web.StreamResponse:
        """Send the page's events until the browser leaves."""
        live = self._live
        if request.headers.get("Sec-Fetch-Site", "same-origin") not in ("same-origin", "none"):
            return _text("only the monitor's own page may ask for this\n", 403)
        if live is None or live.streams >= MOST_STREAMS:
            return _text(f"{MOST_STREAMS} pages are open already: close one\n", 503)
        response = web.StreamResponse(headers={**_HEADERS, "Content-Type": "text/event-stream"})
        response.force_close()
        if request.method == "GET":
            self._http_server.let_last(request.protocol)
            await live.serve(request, response)
        return response

    async def _livez(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer; an answer shows that the event loop turns."""
        return _text("live\n")

    async def _readyz(self, request: web.BaseRequest) -> web.StreamResponse:
        reason = self._sources.not_ready()
        if reason:
            return _text(f"not ready: {reason}\n", 503)
        # This host's own clients are served without the others.
        failure = self._sources.cluster_failure()
        return _text(f"ready\nno other host can be reached: {failure}\n" if failure else "ready\n")

    async def _metrics(self, request: web.BaseRequest) -> web.StreamResponse:
        encoder, content_type = exposition.chosen(request.headers.get("Accept", ""))
        async with self._reading:
            await asyncio.sleep(self._rested_at - self._loop.time())
            began = self._loop.time()
            try:
                text = await exposition.written(await self._families(), encoder)
            finally:
                ended = self._loop.time()
                self._rested_at = ended + min(_REST * (ended - began), _LONGEST / 2)
        response = web.StreamResponse(headers={**_HEADERS, "Content-Type": content_type})
        response.content_length = len(text)
        response.force_close()
        await response.prepare(request)
        if request.method == "GET":
            for start in range(0, len(text), _PIECE):
                await response.write(text[start : start + _PIECE])
        return response

    async def _families(self) -> Iterator[Metric]:
        """Return all families; those of each client are made when the iterator reaches
        them.
        """
        sources, departed = self._sources, self._departed
        # In a thread: with many descriptors or keys these take a while.
        process, expiry = await run_in_thread(
            lambda: (list(self._process.collect()), expiry_of(sources.key_expiries(), time.time()))
        )
        reading = await take(sources, departed)
        of_broker = metrics.of_the_broker(
            sources, reading, self._lag, expiry, python=platform.python_version()
        )
        if departed is None:
            return chain(of_broker, process)
        return chain(
            of_broker,
            process,
            metrics.of_the_clients(reading, await self._ends_of_keys(sources.config())),
        )

    async def _ends_of_keys(self, config: Config) -> list[tuple[str, str, float]]:
        if self._ends is None or self._ends[0] is not config:
            self._ends = config, await run_in_thread(lambda: ends_of_keys(config))
        return self._ends[1]

    def _on_left(self, session: Session) -> None:
        if self._departed is not None:
            self._departed.note(session)


class _HttpServer(web.Server):
    """Serves the monitor's pages on few connections at once, each for a short time."""

    def __init__(self, answer: _Page) -> None:
        # A faulty request is reported to its sender; the log does not need it.
        silent = logging.getLogger("brokerd.monitor")
        silent.disabled = True
        super().__init__(
            answer,
            # A peer that has disconnected needs no page.
            handler_cancellation=True,
            access_log=None,
            logger=silent,
            keepalive_timeout=_LONGEST,
            lingering_time=0.0,
            max_line_size=_LINE,
            max_field_size=_LINE,
            read_bufsize=_LINE,
        )
        self._open_connections: dict[
            web.RequestHandler, tuple[asyncio.Transport, asyncio.TimerHandle]
        ] = {}
        self._streams: dict[web.RequestHandler, asyncio.Transport] = {}
        #: Bytes already read from each connection, by its descriptor.
        self.heads: dict[int, bytes] = {}

    def connection_made(self, handler: web.RequestHandler, transport: asyncio.Transport) -> None:
        super().connection_made(handler, transport)
        if len(self._open_connections) >= _MOST:
            oldest, first_timer = self._open_connections.pop(next(iter(self._open_connections)))
            first_timer.cancel()
            oldest.abort()
        timer = asyncio.get_running_loop().call_later(_LONGEST, transport.abort)
        self._open_connections[handler] = transport, timer
        sock = transport.get_extra_info("socket")
        handler.data_received(self.heads.pop(sock.fileno(), b""))

    def let_last(self, handler: web.RequestHandler) -> None:
        """Allow a stream to last, and not count among the connections that are answered."""
        connection = self._open_connections.pop(handler, None)
        if connection is not None:
            connection[1].cancel()
            self._streams[handler] = connection[0]

    def connection_lost(
        self, handler: web.RequestHandler, exc: BaseException | None = None
    ) -> None:
        super().connection_lost(handler, exc)
        self._streams.pop(handler, None)
        connection = self._open_connections.pop(handler, None)
        if connection is not None:
            connection[1].cancel()

    def close(self) -> None:
        """Close every connection."""
        for transport, timer in self._open_connections.values():
            timer.cancel()
            transport.abort()
        for transport in self._streams.values():
            transport.abort()


def _text(text: str, status: int = 200) -> web.Response:
    return web.Response(text=text, status=status, headers=_HEADERS)
