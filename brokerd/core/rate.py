"""Rate limits of one client: token buckets that hold one second's worth.

They implement `rate` in docs/configuration.md. Time comes in as an argument.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from brokerd.config.values import RateConfig

__all__ = ["Bucket", "Meter"]


class Bucket:
    """A token bucket: it gains ``per_second`` tokens a second and can hold as many.

    It can hold at least one token, so that one message may always pass in time.
    """

    __slots__ = ("_at", "_per_second", "_tokens")

    def __init__(self, per_second: float) -> None:
        self._per_second = per_second
        self._tokens = max(1.0, per_second)
        self._at = -math.inf

    def refill(self, now: float) -> None:
        """Add the tokens gained since the last call; none for a time before it."""
        if now > self._at:
            self._tokens = min(
                max(1.0, self._per_second), self._tokens + (now - self._at) * self._per_second
            )
            self._at = now

    def has(self, amount: float) -> bool:
        """Return whether the bucket holds ``amount`` tokens.

        For an amount larger than a full bucket, the bucket must be full.
        """
        return self._tokens >= min(amount, max(1.0, self._per_second))

    @property
    def most(self) -> int:
        """The tokens of a full bucket."""
        return int(max(1.0, self._per_second))

    def debt_s(self) -> float:
        """Return the seconds until the bucket has no debt."""
        return max(0.0, -self._tokens / self._per_second)

    def level(self, now: float) -> float:
        """Return the number of tokens at ``now``."""
        self.refill(now)
        return self._tokens

    def fill_to(self, level: float, now: float) -> None:
        """Set the number of tokens at ``now``, taken from another bucket."""
        self._tokens, self._at = level, now

    def take(self, amount: float) -> None:
        """Remove ``amount`` tokens; more than a full bucket holds leaves a debt."""
        self._tokens -= amount


#: More bytes than any buffer has.
_UNLIMITED = 2**31


class Meter:
    """The message rate and the byte rate of one client.

    changes: how often the levels were changed by something else than time.
    """

    __slots__ = ("_bytes", "_messages", "changes")

    def __init__(self, message_rate: float | None, byte_rate: float | None) -> None:
        self._messages = None if message_rate is None else Bucket(message_rate)
        self._bytes = None if byte_rate is None else Bucket(byte_rate)
        self.changes = 0

    @classmethod
    def for_rate(cls, rate: RateConfig) -> Meter | None:
        """Return a meter, or None if neither rate is limited."""
        if rate.messages is None and rate.bytes is None:
            return None
        return cls(rate.messages, rate.bytes)

    @property
    def burst(self) -> int:
        """Most bytes that may be sent at once; very many without a limit."""
        return _UNLIMITED if self._bytes is None else self._bytes.most

    def charge(self, size: int, now: float) -> float:
        """Count bytes that were sent already; return the seconds until more may be sent."""
        if self._bytes is None:
            return 0.0
        self.changes += 1
        self._bytes.refill(now)
        self._bytes.take(size)
        return self._bytes.debt_s()

    def levels(self, now: float) -> list[float | None]:
        """Return the messages and the bytes that may be sent now; None for no limit."""
        return [
            None if bucket is None else bucket.level(now)
            for bucket in (self._messages, self._bytes)
        ]

    def fill_to(self, levels: list[float | None], now: float) -> None:
        """Set both levels to those of another meter of the same rate."""
        self.changes += 1
        for bucket, level in zip((self._messages, self._bytes), levels, strict=True):
            if bucket is not None and level is not None:
                bucket.fill_to(level, now)

    def allows(self, size: int, now: float) -> bool:
        """Return whether a message of ``size`` bytes may pass now; if so, count it."""
        messages, size_bucket = self._messages, self._bytes
        if messages is not None:
            messages.refill(now)
            if not messages.has(1):
                return False
        if size_bucket is not None:
            size_bucket.refill(now)
            if not size_bucket.has(size):
                return False
            size_bucket.take(size)
        if messages is not None:
            messages.take(1)
        self.changes += 1
        return True
