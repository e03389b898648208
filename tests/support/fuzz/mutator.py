"""Inputs changed a little, by a seed: what runs the targets where there is no coverage
to be guided by.
"""

from __future__ import annotations

import random

__all__ = ["mutated"]

_EDGES = (0, 1, 2, 3, 4, 5, 7, 11, 12, 15, 16, 17, 20, 31, 32, 63, 64, 127, 128, 200, 254, 255)


def mutated(data: bytes, other: bytes, chance: random.Random) -> bytes:
    """Return the input with one to four changes.

    other: another input, of which a piece may be taken.
    """
    changed = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(changed) + 1)
        size = chance.choice((1, 1, 2, 4, 8, 30))
        match chance.randrange(9):
            case 0 if at < len(changed):
                changed[at] ^= 1 << chance.randrange(8)
            case 1 if at < len(changed):
                changed[at] = chance.choice(_EDGES)
            case 2 if at < len(changed):
                changed[at] = (changed[at] + chance.choice((-1, 1))) % 256
            case 3:
                del changed[at : at + size]
            case 4:
                changed[at:at] = chance.randbytes(size)
            case 5:
                changed[at:at] = changed[at : at + size]
            case 6:
                start = chance.randrange(len(other) + 1)
                changed[at:at] = other[start : start + 4 * size]
            case 7:
                start = chance.randrange(len(other) + 1)
                changed[at : at + 4 * size] = other[start : start + 4 * size]
            case 8:
                value = chance.choice((-2, -1, 0, 2**15, 2**16 - 1, 2**31 - 1, -(2**31))) % 2**32
                width = chance.choice((2, 4))
                changed[at : at + width] = (value % 2 ** (8 * width)).to_bytes(width, "big")
    return bytes(changed)
