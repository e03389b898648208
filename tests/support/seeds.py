"""Seeds of tests that try something else in every run."""

from __future__ import annotations

import os
import random

__all__ = ["random_seeds"]


def random_seeds(count: int) -> list[int]:
    """Return seeds that no other run has. They are the same in all processes of one run,
    which must agree on the names of the tests.
    """
    rng = random.Random(os.environ.get("PYTEST_XDIST_TESTRUNUID"))
    return [rng.randrange(2**32) for _ in range(count)]
