"""A table of the monitor's page: rows that are sorted and filtered here.

It is read only while a page shows it, in turns between which messages pass. Only some
rows are sent, so a page of a table with 10,000 rows stays short.
"""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Final, TypeAlias, TypeVar

__all__ = ["ROWS", "SHOWN", "Row", "Table", "in_turns"]

T = TypeVar("T")
#: One row: the value of each column, as JSON has it.
Row: TypeAlias = dict[str, Any]

#: Rows per page of a table.
ROWS: Final = 100
#: Most entries of each list in the details of one row.
SHOWN: Final = 100
#: Seconds for which a reading does for a page that asks for another view.
_FRESH_S: Final = 1.5
#: Rows of which the first are selected in one turn, at least.
_SORTED: Final = 2000
#: Seconds of work in one turn.
_TURN_S: Final = 0.002


class Table:
    """The rows at about one moment.

    COLUMNS: the columns by which it can be sorted, first the one that names the row.
    SEARCHED: the columns in which a filter looks.
    """

    COLUMNS: ClassVar[Sequence[str]]
    SEARCHED: ClassVar[Sequence[str]]

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self._read_at = -_FRESH_S

    async def read(self) -> None:
        """Read all rows."""
        now = asyncio.get_running_loop().time()
        self.rows = await self._read_rows(max(now - self._read_at, 0.001))
        self._read_at = now

    async def read_if_old(self) -> None:
        """Read all rows, unless that was done about a second ago."""
        if asyncio.get_running_loop().time() - self._read_at >= _FRESH_S:
            await self.read()

    async def _read_rows(self, elapsed: float) -> list[Row]:
        """Return all rows. elapsed: seconds since the reading before."""
        raise NotImplementedError

    async def page(self, query: Mapping[str, str]) -> dict[str, Any]:
        """Return some rows, filtered and sorted as the query asks.

        query: may have ``sort``, ``reverse``, ``filter`` and ``from``, the first row.
        """
        column = query.get("sort", "")
        column = column if column in self.COLUMNS else self.COLUMNS[0]
        wanted = query.get("filter", "").lower()
        total, rows = len(self.rows), self.rows
        if wanted:
            rows = [row async for row in in_turns(rows) if self._matches(row, wanted)]
        start = _number(query.get("from", ""), len(rows))
        most = start + ROWS

        def key(row: Row) -> Any:
            value = row[column]
            return value is not None, value, row[self.COLUMNS[0]]

        # Only the rows up to those shown are sorted, some in each turn.
        select = heapq.nlargest if query.get("reverse") == "1" else heapq.nsmallest
        first: list[Row] = []
        part = max(_SORTED, most)
        for begin in range(0, len(rows), part):
            first = select(most, (*first, *rows[begin : begin + part]), key)
            await asyncio.sleep(0)
        return {"total": total, "found": len(rows), "from": start, "rows": first[start:]}

    def _matches(self, row: Row, wanted: str) -> bool:
        return any(wanted in row[column].lower() for column in self.SEARCHED)


async def in_turns(items: Iterable[T]) -> AsyncIterator[T]:
    """Yield the items, and let messages pass after some milliseconds of work."""
    loop = asyncio.get_running_loop()
    until = loop.time() + _TURN_S
    for item in items:
        yield item
        if loop.time() >= until:
            await asyncio.sleep(0)
            until = loop.time() + _TURN_S


def _number(text: str, most: int) -> int:
    return min(int(text), max(0, most - 1)) if text.isascii() and text[:9].isdigit() else 0
