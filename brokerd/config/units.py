"""Durations, sizes and rates in readable form: ``30s``, ``8MiB``, ``10000/s``, or a
number.

The units are those of docs/configuration.md, "Units". Every function raises ValueError,
with the fault and, in brackets, its remedy.
"""

from __future__ import annotations

import math
import re
from typing import Final

__all__ = [
    "BYTE_RATE_PATTERN",
    "DURATION_PATTERN",
    "PERCENT_PATTERN",
    "RATE_PATTERN",
    "SIZE_PATTERN",
    "byte_rate",
    "duration",
    "percent",
    "rate",
    "size",
]

_NUMBER: Final = r"[0-9]+(\.[0-9]+)?"
#: The JSON Schema uses these patterns too, so they are limited to the syntax of
#: JavaScript's regular expressions.
DURATION_PATTERN: Final = rf"^{_NUMBER} ?(ms|s|m|h|d)?$"
SIZE_PATTERN: Final = rf"^{_NUMBER} ?(B|[kKMGT]B|[KMGT]iB)?$"
RATE_PATTERN: Final = rf"^{_NUMBER} ?(/(s|m|h))?$"
BYTE_RATE_PATTERN: Final = rf"^{_NUMBER} ?(B|[kKMGT]B|[KMGT]iB)?(/(s|m|h))?$"

PERCENT_PATTERN: Final = rf"^{_NUMBER} ?%$"

_SECONDS: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_BYTES: Final = {
    "": 1,
    "B": 1,
    "kB": 1000,
    **{f"{letter}B": 1000**power for power, letter in enumerate("KMGT", 1)},
    **{f"{letter}iB": 1024**power for power, letter in enumerate("KMGT", 1)},
}
_WRITTEN: Final = re.compile(
    r"(?P<number>[0-9]{1,30}(\.[0-9]{1,30})?) ?(?P<unit>[A-Za-z]*)(?P<per>/[A-Za-z]*)?"
)

#: Limits a duration, in seconds: ten years. No timer needs more, and every clock can
#: represent it.
_LONGEST_S: Final = 3650 * 86400.0
#: Limits a size, in bytes, or a rate, per second: 1 PiB. A larger number is a typing
#: error, and arithmetic on it would hide that.
_LARGEST: Final = 2**50


def duration(value: object) -> float:
    """Return seconds, 0 or more, from a number or a text such as ``500ms 30s 5m 1h
    7d``.
    """
    remedy = "give seconds, or a number with ms, s, m, h or d, such as 30s"
    number, unit, per = _split(value, "duration", remedy)
    if per or unit not in ("", *_SECONDS):
        raise ValueError(f"{_shown(value)} is not a valid duration ({remedy})")
    seconds = number * _SECONDS[unit or "s"]
    if seconds > _LONGEST_S:
        raise ValueError(f"{_shown(value)} is longer than ten years (give at most 3650d)")
    return seconds


def size(value: object) -> int:
    """Return bytes, 0 or more, from a whole number or a text such as ``64KiB 8MiB
    1GB``.
    """
    remedy = "give bytes, or a number with kB, MB, GB, KiB, MiB or GiB, such as 8MiB"
    number, unit, per = _split(value, "size", remedy)
    factor = _BYTES.get(unit)
    if per or factor is None:
        raise ValueError(f"{_shown(value)} is not a valid size ({remedy})")
    return _whole_bytes(number, factor, value, remedy)


def percent(value: object) -> float:
    """Return a share from 0 to 1, from a text such as ``20%``."""
    remedy = "give a share from 0% to 100%, such as 20%"
    match = re.fullmatch(PERCENT_PATTERN, value) if isinstance(value, str) else None
    share = float(str(value).rstrip(" %")) / 100 if match is not None else 2.0
    if share > 1:
        raise ValueError(f"{_shown(value)} is not a valid share ({remedy})")
    return share


def rate(value: object) -> float:
    """Return a rate per second, above 0, from a number or a text such as ``10000/s
    600/m``.
    """
    remedy = "give a number a second, such as 10000/s; /m and /h do too"
    number, unit, per = _split(value, "rate", remedy)
    if unit:
        raise ValueError(f"{_shown(value)} is not a valid rate of messages ({remedy})")
    return _per_second(number, per, value, remedy)


def byte_rate(value: object) -> float:
    """Return bytes per second, above 0, from a number or a text such as ``50MiB/s``."""
    remedy = "give bytes a second, such as 50MiB/s; /m and /h do too"
    number, unit, per = _split(value, "rate", remedy)
    factor = _BYTES.get(unit)
    if factor is None:
        raise ValueError(f"{_shown(value)} is not a valid rate of bytes ({remedy})")
    return _per_second(number * factor, per, value, remedy)


def _split(value: object, kind: str, remedy: str) -> tuple[float, str, str]:
    """Return (number, unit, per), with "" for a missing part."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        # The range is checked first: isfinite raises for an integer beyond the largest
        # float.
        if not 0 <= value <= _LARGEST or not math.isfinite(value):
            raise ValueError(f"this number is not a valid {kind} ({remedy})")
        return value, "", ""
    match = _WRITTEN.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise ValueError(f"{_shown(value)} is not a valid {kind} ({remedy})")
    return float(match["number"]), match["unit"], match["per"] or ""


def _whole_bytes(number: float, factor: int, value: object, remedy: str) -> int:
    total = number * factor
    if total > _LARGEST:
        raise ValueError(f"{_shown(value)} is more than 1024 TiB ({remedy})")
    if total != int(total):
        raise ValueError(f"{_shown(value)} is not a whole number of bytes ({remedy})")
    return int(total)


def _per_second(number: float, per: str, value: object, remedy: str) -> float:
    if per not in ("", "/s", "/m", "/h"):
        raise ValueError(f"{_shown(value)} is not a valid rate ({remedy})")
    if not 0 < number <= _LARGEST:
        raise ValueError(
            f"{_shown(value)} is not greater than 0 and finite ({remedy}; for no limit, take it"
            " out)"
        )
    return number / _SECONDS[per[1:] or "s"]


def _shown(value: object) -> str:
    """Return a short form of the value for an error, on one line.

    Only a text is repeated.
    """
    if isinstance(value, str):
        return repr(value if len(value) <= 40 else value[:40] + "...")
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return "this number"
    return "this"
