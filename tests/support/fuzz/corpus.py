"""The first inputs of every fuzzing run, in ``corpus/TARGET``: real encodings, and
inputs that once made a target fail.

In ``tests``, ``python -m support.fuzz.corpus`` writes those that the targets' ``seeds``
describe; it removes nothing.
"""

from __future__ import annotations

import importlib
from pathlib import Path

__all__ = ["CORPUS", "TARGETS", "inputs"]

CORPUS = Path(__file__).resolve().parents[2] / "fuzz" / "corpus"
TARGETS = (
    "framing",
    "handshake",
    "envelope",
    "certificate",
    "configuration",
    "loops",
    "snapshot",
    "dialog",
    "channels",
)


def inputs(target: str) -> list[tuple[str, bytes]]:
    """Return (name, content) of every input of a target, in the same order everywhere."""
    return [(path.name, path.read_bytes()) for path in sorted((CORPUS / target).iterdir())]


def main() -> None:
    """Write the files."""
    for target in TARGETS:
        folder = CORPUS / target
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in importlib.import_module(f"fuzz.targets.{target}").seeds():
            (folder / name).write_bytes(content)
        print(f"{target}: {len(list(folder.iterdir()))} files")


if __name__ == "__main__":
    main()
