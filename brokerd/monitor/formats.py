"""Metrics as text, in Prometheus's format or OpenMetrics, written in pieces."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator
from typing import Final

from prometheus_client.core import Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

__all__ = ["Encoder", "chosen", "written"]

Encoder = Callable[[Collector], bytes]

_END: Final = b"# EOF\n"
_OPENMETRICS: Final = "application/openmetrics-text; version=1.0.0"
_VERSIONS: Final = {"version=0.0.1", "version=1.0.0"}


class _One(Collector):
    """A collector of one family."""

    def __init__(self, family: Metric) -> None:
        self._family = family

    def collect(self) -> Iterator[Metric]:
        yield self._family


def chosen(accept: str) -> tuple[Encoder, str]:
    """Return the encoder for the format that an Accept header asks for, and its content
    type.

    It is OpenMetrics if the header lists it in a version that the monitor supports.
    Otherwise it is Prometheus's own format, which every scraper reads.
    """
    for media_range in accept.lower().split(","):
        kind, *parameters = (part.strip() for part in media_range.split(";"))
        versions = [part for part in parameters if part.startswith("version=")]
        if kind == "application/openmetrics-text" and set(versions) <= _VERSIONS:
            return choose_encoder(_OPENMETRICS)
    return choose_encoder("")


async def written(families: Iterable[Metric], encoder: Encoder) -> bytes:
    """Return the text; other tasks run between two families, and between pieces of a
    long one.

    Consecutive families with the same name are one: the lines that describe it are
    written once.
    """
    page = bytearray()
    name, ends = "", b""
    for family in families:
        text = encoder(_One(family))
        if text.endswith(_END):
            text, ends = text[: -len(_END)], _END
        while family.name == name and text.startswith(b"# "):
            text = text.partition(b"\n")[2]
        name = family.name
        page += text
        await asyncio.sleep(0)
    return bytes(page + ends)
