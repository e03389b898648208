"""Mutations of inputs by a seed, for runs of the targets without coverage."""

from __future__ import annotations

import random

__all__ = ["mutated"]

_EDGES = (0, 1, 2, 3, 4, 5, 7, 11, 12, 15, 16, 17, 20, 31, 32, 63, 64, 127, 128, 200, 254, 255)


def mutated(data: bytes, other: bytes, rng: random.Random) -> bytes:
    """Return the input with one to four changes.

    Args:
        other: Another input, from which a piece may be copied.
    """
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(changed) + 1)
        size = rng.choice((1, 1, 2, 4, 8, 30))
        match rng.randrange(9):
            case 0 if at < len(changed):
                changed[at] ^= 1 << rng.randrange(8)
            case 1 if at < len(changed):
                changed[at] = rng.choice(_EDGES)
            case 2 if at < len(changed):
                changed[at] = (changed[at] + rng.choice((-1, 1))) % 256
            case 3:
                del changed[at : at + size]
            case 4:
                changed[at:at] = rng.randbytes(size)
            case 5:
                changed[at:at] = changed[at : at + size]
            case 6:
                start = rng.randrange(len(other) + 1)
                changed[at:at] = other[start : start + 4 * size]
            case 7:
                start = rng.randrange(len(other) + 1)
                changed[at : at + 4 * size] = other[start : start + 4 * size]
            case 8:
                value = rng.choice((-2, -1, 0, 2**15, 2**16 - 1, 2**31 - 1, -(2**31))) % 2**32
                width = rng.choice((2, 4))
                changed[at : at + width] = (value % 2 ** (8 * width)).to_bytes(width, "big")
    return bytes(changed)
