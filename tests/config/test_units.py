"""Durations, sizes and rates: accepted values, and refused ones with their hints."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from brokerd.config import units


@pytest.mark.parametrize(
    ("written", "seconds"),
    [
        ("500ms", 0.5),
        ("30s", 30),
        ("5m", 300),
        ("1h", 3600),
        ("7d", 604800),
        ("1.5h", 5400),
        (5, 5),
        (0.25, 0.25),
        ("30", 30),
        ("5 s", 5),
    ],
)
def test_units_duration_gives_seconds(written: object, seconds: float) -> None:
    """Every unit, and a bare number, gives seconds."""
    assert units.duration(written) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("written", "size"),
    [("64KiB", 65536), ("8MiB", 8 * 2**20), ("1GB", 10**9), ("1GiB", 2**30), ("2kB", 2000), ("2KB", 2000),
     ("1.5KiB", 1536), ("7B", 7), ("1TiB", 2**40), (4096, 4096), ("4096", 4096), ("8 MiB", 8 * 2**20)],
)  # fmt: skip
def test_units_size_gives_bytes(written: object, size: int) -> None:
    """Decimal and binary units, and a bare number, give bytes."""
    result = units.size(written)

    assert result == size
    assert type(result) is int


@pytest.mark.parametrize(
    ("read", "written", "each_second"),
    [
        (units.rate, "10000/s", 10000),
        (units.rate, "600/m", 10),
        (units.rate, "3600/h", 1),
        (units.rate, 50, 50),
        (units.byte_rate, "50MiB/s", 50 * 2**20),
        (units.byte_rate, "60kB/m", 1000),
        (units.byte_rate, 100, 100),
    ],
)
def test_units_rate_gives_count_per_second(
    read: object, written: object, each_second: float
) -> None:
    """A rate per second, minute or hour, or a bare number, gives a count per second."""
    assert read(written) == pytest.approx(each_second)  # type: ignore[operator]


@pytest.mark.parametrize(
    "written",
    ["", "s", "5 parsecs", "-1s", "1h30m", "5S", "1e3s", "٣s", "5s/s", -1, True, None, [],
     float("nan"), float("inf"), 10**400, "4000d", "5s\n"],
)  # fmt: skip
def test_units_duration_invalid_is_refused(written: object) -> None:
    """An invalid duration is refused, with an example of a valid one."""
    with pytest.raises(ValueError, match=r"\(give .*d\)$|\(give .*30s\)$"):
        units.duration(written)


@pytest.mark.parametrize(
    "written",
    ["", "8M", "8mib", "8 parsecs", "1.5B", -1, 1.5, True, None, "9999999TB", 2**60, "8MiB/s"],
)
def test_units_size_invalid_is_refused(written: object) -> None:
    """A value that is not a valid size is refused, with an example of a valid one."""
    with pytest.raises(ValueError, match=r"\(give .*8MiB\)$"):
        units.size(written)


@pytest.mark.parametrize(
    "written", ["", "fast", "10/d", "10/ms", "10/", 0, "0/s", -5, True, "10kB/s"]
)
def test_units_rate_invalid_is_refused(written: object) -> None:
    """A value that is not a valid rate of messages is refused. So is a rate that lets
    nothing pass.
    """
    with pytest.raises(ValueError, match=r"\(give .*\)$"):
        units.rate(written)


@given(
    st.text(max_size=30)
    | st.from_regex(r"[0-9]{1,4}(\.[0-9])? ?(ms|s|m|h|d|B|kB|MB|KiB|TiB)?(/[smh])?", fullmatch=True)
)
def test_units_schema_patterns_accept_same_text_as_reader(written: str) -> None:
    """The JSON Schema's patterns and the reader accept the same text, except for
    amounts out of range.
    """
    for pattern, read in (
        (units.DURATION_PATTERN, units.duration),
        (units.SIZE_PATTERN, units.size),
        (units.RATE_PATTERN, units.rate),
        (units.BYTE_RATE_PATTERN, units.byte_rate),
    ):
        try:
            read(written)
        except ValueError as error:
            wrong_amount = re.search("longer than|more than|not a whole|not greater", str(error))
            assert wrong_amount or not re.search(pattern.replace("$", r"\Z"), written)
        else:
            assert re.search(pattern, written)
