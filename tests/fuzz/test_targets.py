"""Every target on every input of its corpus, and on some thousands of mutated ones;
``make fuzz`` goes further.
"""

from __future__ import annotations

import importlib
import os
import random

import pytest
from support.fuzz.corpus import CORPUS, TARGETS, inputs
from support.fuzz.mutator import mutated
from support.seeds import random_seeds

#: How many times as many inputs a longer run mutates.
FACTOR = int(os.environ.get("BROKERD_FUZZ_FACTOR", "1"))
#: How many changed inputs each gets: what takes less than two seconds.
CHANGED = {
    "framing": 8000,
    "handshake": 8000,
    "envelope": 8000,
    "certificate": 8000,
    "configuration": 4000,
    "loops": 250,
    "snapshot": 1500,
    "dialog": 1500,
    "channels": 600,
}


def needs(target: str) -> None:
    if target == "loops":
        if os.environ.get("BROKERD_PURE") == "1":
            pytest.skip("BROKERD_PURE=1 leaves the compiled loop out")
        pytest.importorskip("brokerd.core._routing_c", reason="the compiled loop was not built")


@pytest.mark.parametrize("target", TARGETS)
def test_fuzz_corpus_raises_no_error(target: str) -> None:
    """No input of the corpus makes a target fail."""
    needs(target)
    run = importlib.import_module(f"fuzz.targets.{target}").target

    for name, content in inputs(target):
        try:
            run(content)
        except Exception as error:
            error.add_note(f"input: {CORPUS / target / name}")
            raise


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("seed", random_seeds(1))
def test_fuzz_corpus_mutated_raises_no_error(target: str, seed: int) -> None:
    """Inputs changed in a few places; the seed is in the name."""
    needs(target)
    module = importlib.import_module(f"fuzz.targets.{target}")
    change = getattr(module, "mutated", mutated)
    corpus = [content for _, content in inputs(target)]
    rng = random.Random(seed)

    for _ in range(FACTOR * CHANGED[target]):
        content = change(rng.choice(corpus), rng.choice(corpus), rng)
        try:
            module.target(content)
        except Exception as error:
            error.add_note(f"input: {content!r}")
            raise


def test_fuzz_corpus_equals_seeds_of_targets() -> None:
    """Every seed that is the same in every run is in the corpus. A changed seed must be
    written again.
    """
    for target in sorted(set(TARGETS) - {"certificate", "configuration"}):
        corpus = dict(inputs(target))
        for name, content in importlib.import_module(f"fuzz.targets.{target}").seeds():
            assert corpus.get(name) == content, (
                f"{target}/{name}: run python -m fuzz.corpus in tests"
            )
