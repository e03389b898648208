"""The code blocks of a page of the documentation, to be run as they stand."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

ROOT: Final = Path(__file__).resolve().parents[2]
#: The first line of a block that is a file of its own: its name.
_FILE_NAME: Final = re.compile(r"# ([\w.]+)\n")


class CodeBlock(NamedTuple):
    """A code block, and where it stands.

    Attributes:
        section: The heading above it.
        file: The file name in its first line, or "".
    """

    section: str
    language: str
    text: str
    line: int

    @property
    def file(self) -> str:
        name = _FILE_NAME.match(self.text)
        return name[1] if name else ""


def code_blocks(page: str) -> Iterator[CodeBlock]:
    """Yield the code blocks of a page, given by its path below the project."""
    section, language = "", ""
    begin, lines = 0, list[str]()
    for number, line in enumerate((ROOT / page).read_text(encoding="utf-8").splitlines(), 1):
        if line.startswith("```"):
            if begin:
                text = "".join(f"{each}\n" for each in lines)
                yield CodeBlock(section, language, text, begin)
                begin, lines = 0, []
            else:
                begin, language = number, line[3:]
        elif begin:
            lines.append(line)
        elif line.startswith("#"):
            section = line.lstrip("# ")


def write_files(page: str, directory: Path, section: str | None = None) -> list[str]:
    """Write the blocks that are files, of one section or all, and return their names."""
    names = []
    for block in code_blocks(page):
        if block.file and section in (None, block.section):
            (directory / block.file).write_text(block.text, encoding="utf-8")
            names.append(block.file)
    return names
