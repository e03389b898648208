"""The programs of docs/channels.md, docs/cookbook.md, docs/mailboxes.md and docs/porting.md
run as they stand, each in a terminal of its own, and print what the page shows.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.pages import code_blocks, write_files
from support.terminals import Terminal, commands_in, type_and_compare
from support.waiting import until

#: A page begins with a configuration and the commands that start the broker.
PAGES = {
    name: list(code_blocks(f"docs/{name}.md"))
    for name in ("cookbook", "mailboxes", "porting", "channels")
}
SECTIONS = [
    (page, section)
    for page, blocks in PAGES.items()
    for section in dict.fromkeys(block.section for block in blocks if block.file.endswith(".py"))
]


@pytest.fixture(scope="module")
def place(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, dict[str, str]]]:
    """Return a directory with the files of the page and its broker, and an environment."""
    page: str = request.param
    directory = tmp_path_factory.mktemp(page)
    environ = commands_in(directory / "bin")
    write_files(f"docs/{page}.md", directory)
    setup = next(block for block in PAGES[page] if block.language == "console")
    *before, last = setup.text.replace("$ ", "").splitlines()
    preparation = Terminal(f"sh -e -c '{'; '.join(before)}'", directory, environ)
    preparation.wait_for_end()
    broker = Terminal(last, directory, environ)
    try:
        until(lambda: (directory / "brokerd.sock").exists())
        yield directory, environ
    finally:
        broker.close()


@pytest.mark.parametrize(("place", "section"), SECTIONS, indirect=["place"], scope="module")
def test_programs_of_section_print_what_the_page_shows(
    place: tuple[Path, dict[str, str]], section: str, request: pytest.FixtureRequest
) -> None:
    """Every program of the section is typed into a terminal, and none is left out."""
    callspec: Any = request.node.callspec  # type: ignore[attr-defined]  # pytest's own, untyped
    blocks = [block for block in PAGES[callspec.params["place"]] if block.section == section]
    shown = [block for block in blocks if block.language == "console"]
    programs = {block.file for block in blocks if block.language == "python"}
    typed = {word for block in shown for word in block.text.split() if word.endswith(".py")}
    assert typed == programs
    type_and_compare(shown, *place)
