"""Requests to the monitor, as a health check or Prometheus sends them, and its answers."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from contextlib import AbstractContextManager
from http.client import HTTPConnection
from typing import Any, NamedTuple

from prometheus_client.core import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as read_openmetrics
from prometheus_client.parser import text_string_to_metric_families as read_prometheus
from support.running_daemon import RunningDaemon, configuration, running_daemon

from brokerd_client.address import Address

TIMEOUT_S = 30.0


class Page(NamedTuple):
    """A response of the monitor.

    Attributes:
        headers: The headers; their names are in lower case.
    """

    status: int
    headers: dict[str, str]
    body: str


class _UnixConnection(HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=TIMEOUT_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(TIMEOUT_S)
        self.sock.connect(self._path)


def watched(
    clients: Mapping[str, Any] | str = "alice bob carol",
    *,
    monitor: Any = "127.0.0.1:0",
    **more: Any,
) -> AbstractContextManager[RunningDaemon]:
    """Run a broker with a monitor."""
    return running_daemon(configuration(["127.0.0.1:0"], clients, monitor=monitor, **more))


def get(
    where: RunningDaemon | Address,
    page: str,
    *,
    method: str = "GET",
    headers: Mapping[str, str] | None = None,
    body: Any = None,
) -> Page:
    """Return one page of a broker's monitor."""
    at = where.daemon.monitor_addresses[0] if isinstance(where, RunningDaemon) else where
    if at.family == "AF_UNIX":
        connection: HTTPConnection = _UnixConnection(at.path)
    else:
        connection = HTTPConnection(at.host, at.port, timeout=TIMEOUT_S)
    try:
        connection.request(method, page, headers=dict(headers or {}), body=body)
        response = connection.getresponse()
        named = {name.lower(): value for name, value in response.getheaders()}
        return Page(response.status, named, response.read().decode())
    finally:
        connection.close()


def families(where: RunningDaemon, *, openmetrics: bool = False) -> dict[str, Metric]:
    """Return the metrics of /metrics by name, as Prometheus's own parser reads them."""
    accept = (
        "application/openmetrics-text; version=1.0.0"
        if openmetrics
        else "text/plain; version=0.0.4"
    )
    page = get(where, "/metrics", headers={"Accept": accept})
    assert page.status == 200, page
    read = list((read_openmetrics if openmetrics else read_prometheus)(page.body))
    found = {family.name: family for family in read}
    assert len(found) == len(read), "a family is given twice"
    return found


def samples(where: RunningDaemon) -> dict[str, float]:
    """Return every series of /metrics with its value, named ``name`` or
    ``name{label=value,...}``.
    """
    found = {}
    for family in families(where).values():
        for sample in family.samples:
            labels = ",".join(f"{key}={value}" for key, value in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


def connect(where: RunningDaemon) -> socket.socket:
    """Return a connection to the monitor that has sent nothing yet."""
    return socket.create_connection(where.daemon.monitor_addresses[0].sockaddr, timeout=TIMEOUT_S)


def ended(sock: socket.socket) -> bool:
    """Wait until the monitor closes the connection; return True, whatever it sent
    before.
    """
    try:
        while sock.recv(65536):
            pass
    except ConnectionError:
        pass
    return True
