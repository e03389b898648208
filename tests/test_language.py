"""The language of code and documentation, by the rules of CONTRIBUTING.md.

Docstrings, comments and messages of both packages, of benchmarks/ and .ci/, pages, and
comments of other files are read. Text in backticks, code blocks and doctest examples
are left out.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

import pytest

ROOT: Final = Path(__file__).resolve().parent.parent
SOURCES: Final = [
    path
    for folder in ("brokerd", "client/brokerd_client", "benchmarks", ".ci")
    for path in sorted((ROOT / folder).rglob("*.p*"))
    if path.suffix in (".py", ".pyx", ".pxd")
]
PAGES: Final = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "benchmarks").glob("*.md")),
]
#: Files whose lines that begin with "#" are comments.
COMMENTED: Final = [
    ROOT / "Dockerfile",
    ROOT / "Makefile",
    ROOT / "pyproject.toml",
    *sorted((ROOT / ".ci").glob("*.sh")),
    *sorted((ROOT / "config").rglob("*.yaml")),
    *sorted(path for path in (ROOT / "systemd").iterdir() if path.is_file()),
]

#: Longest sentence of a docstring, in words (CONTRIBUTING.md, rule 5).
LONGEST_SENTENCE: Final = 20
#: Rule 3: a docstring begins with the direct verb.
OPENINGS: Final = re.compile(r"(Have|Let|Be|Say|Whoever|Who|What|Nobody|Somebody)\b")
#: Rules 1 and 4. Each is (what is found, what would be right).
FORBIDDEN: Final = (
    (
        re.compile(r"\b([Ww]hoever|[Nn]obody|[Ss]omebody|[Ee]verybody|[Aa]nybody)\b"),
        "name the client, sender or process",
    ),
    (
        re.compile(
            r"(?:^|[.;:] |, and |, but )(?:[Ww]ho|[Oo]ne|[Oo]thers) "
            r"(?:is|are|has|have|was|were|comes?|came|goes|went|waits?|asks?|asked|leaves?|left|sends?|sent)\b"
        ),
        "name the client, sender or process",
    ),
    (
        re.compile(
            r"\b(?:is|are|was|were) no (?!longer\b|more\b|less\b|larger\b|later\b|other\b)[a-z]"
        ),
        "write 'is not a'",
    ),
    (
        re.compile(r"\banew\b|\bfor ever\b|\bbeforehand\b|\bamiss\b"),
        "write 'again', 'forever', 'before'",
    ),
    (
        re.compile(r"\bso many (?:bytes|seconds|frames|messages|connections|threads|times|more)\b"),
        "write the number's name",
    ),
)
#: Lines that are right although a pattern finds them: (file, words of the line) and the
#: reason.
ALLOWED: Final[dict[tuple[str, str], str]] = {}


class Text(NamedTuple):
    """A piece of prose and where it begins."""

    path: Path
    line: int
    words: str
    is_docstring: bool = False


def docstrings(path: Path, tree: ast.AST) -> Iterator[Text]:
    """Yield every docstring of a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            found = ast.get_docstring(node)
            if found:
                line = node.body[0].lineno
                yield Text(path, line, found, is_docstring=True)


def messages(path: Path, tree: ast.AST) -> Iterator[Text]:
    """Yield the string constants in raised exceptions and log calls."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and node.exc is not None:
            for part in ast.walk(node.exc):
                if isinstance(part, ast.Constant) and isinstance(part.value, str):
                    yield Text(path, part.lineno, part.value)


def comments(path: Path, source: str) -> Iterator[Text]:
    """Yield every comment, consecutive lines as one."""
    block: list[str] = []
    first = last = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT:
            continue
        words = token.string.lstrip("#: ").rstrip()
        if words.startswith(("noqa", "type:", "ruff:", "pragma", "cython", "!")):
            continue
        if block and token.start[0] == last + 1:
            block.append(words)
        else:
            if block:
                yield Text(path, first, " ".join(block))
            block, first = [words], token.start[0]
        last = token.start[0]
    if block:
        yield Text(path, first, " ".join(block))


def hash_comments(path: Path, source: str) -> Iterator[Text]:
    """Yield the comments of a file that is not Python, consecutive lines as one."""
    lines = [*enumerate(source.splitlines(), 1), (0, "")]
    block: list[tuple[int, str]] = []
    for number, line in lines:
        if line.lstrip().startswith("#") and not line.startswith("#!"):
            block.append((number, line.lstrip().lstrip("# ").rstrip()))
            continue
        if block:
            yield Text(path, block[0][0], " ".join(words for _, words in block))
            block = []
        _, mark, words = line.partition("  # ")
        if mark:
            yield Text(path, number, words)


def prose_of(path: Path) -> list[Text]:
    """Return all prose of a file."""
    source = path.read_text(encoding="utf-8")
    if path in COMMENTED:
        return list(hash_comments(path, source))
    if path.suffix == ".md":
        source = re.sub(
            r"```.*?```", lambda block: "\n" * block.group().count("\n"), source, flags=re.DOTALL
        )
        return [Text(path, number, line) for number, line in enumerate(source.splitlines(), 1)]
    if path.suffix in (".pyx", ".pxd"):
        return list(comments(path, source))
    tree = ast.parse(source)
    return [*docstrings(path, tree), *comments(path, source), *messages(path, tree)]


def plain(text: str) -> str:
    """Return the text without what stands in backticks."""
    return re.sub(r"``[^`]*``|`[^`]*`", "X", text)


def sentences(docstring: str) -> Iterator[str]:
    """Yield the sentences of a docstring, without examples, tables and Args sections'
    names.
    """
    for paragraph in re.split(r"\n\s*\n", docstring):
        if re.search(r"::\s*$|^\s*[>|+]|^ {4,}\S", paragraph, re.MULTILINE) and not re.search(
            r"^(Args|Returns|Raises):", paragraph
        ):
            continue
        joined = " ".join(
            line.strip()
            for line in paragraph.splitlines()
            if not re.match(r"\s*(Args|Returns|Raises|Yields):$", line)
        )
        yield from re.split(r"(?<=[.;:?!])\s+", plain(joined))


def problems(path: Path) -> list[str]:
    """Return a line for every place that breaks a rule."""
    name = path.relative_to(ROOT).as_posix()
    found = []
    for text in prose_of(path):
        words = plain(text.words)
        flat = " ".join(words.split())
        for pattern, right in FORBIDDEN:
            found += [
                f"{name}:{text.line}: {hit.group()!r}: {right}"
                for hit in pattern.finditer(flat)
                if not any(name == file and part in flat for file, part in ALLOWED)
            ]
        if text.is_docstring:
            if OPENINGS.match(words) and not re.match(r"What\b.*\?", words):
                found.append(
                    f"{name}:{text.line}: begins with {words.split()[0]!r}: begin with the direct"
                    " verb"
                )
            counts = [(len(sentence.split()), sentence) for sentence in sentences(text.words)]
            found += [
                f"{name}:{text.line}: {count} words: {sentence[:60]}..."
                for count, sentence in counts
                if count > LONGEST_SENTENCE
            ]
    return found


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=path.relative_to(ROOT).as_posix())
        for path in [*SOURCES, *PAGES, *COMMENTED]
    ],
)
def test_language_of_file_follows_contributing_rules(path: Path) -> None:
    """No forbidden subject or opening, and no docstring sentence of more than 20 words."""
    assert problems(path) == []


def test_language_allow_list_entry_is_still_needed() -> None:
    """Every exception is in the file that it names, and has a reason."""
    for (file, part), reason in ALLOWED.items():
        assert reason
        assert part in " ".join(plain((ROOT / file).read_text(encoding="utf-8")).split()), (
            f"{file} has no {part!r}"
        )


@pytest.mark.parametrize(
    "words",
    [
        "Whoever asks is told.",
        "Let the client wait.",
        "The name is no size.",
        "Begin anew.",
        "Who waits is released.",
    ],
)
def test_language_planted_fault_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str
) -> None:
    """The check sees each kind of fault, so that its silence means something."""
    monkeypatch.setattr("test_language.ROOT", tmp_path, raising=False)
    planted = tmp_path / "planted.py"
    planted.write_text(f'"""{words}"""\n', encoding="utf-8")
    monkeypatch.setitem(globals(), "ROOT", tmp_path)

    assert problems(planted)


#: Words of names that the glossary replaced; none may come back as a file's name.
FORMER_WORDS: Final = frozenset(
    [
        "aside",
        "chance",
        "desk",
        "door",
        "doors",
        "elder",
        "farewell",
        "floods",
        "happenings",
        "heir",
        "knock",
        "life",
        "lot",
        "misfit",
        "newcomer",
        "notices",
        "orders",
        "parcel",
        "predecessor",
        "pulse",
        "seat",
        "stamp",
        "strangers",
        "successor",
        "tail",
        "tally",
        "verdict",
    ]
)


def file_name_words() -> Iterator[tuple[str, Path]]:
    """Yield the words in the names of modules and folders of both packages."""
    for package in (ROOT / "brokerd", ROOT / "client" / "brokerd_client"):
        for path in sorted([*package.rglob("*.py"), *package.rglob("*.pyx")]):
            names = list(path.relative_to(package).parts[:-1])
            if not path.stem.startswith("__"):
                names.append(path.stem)
            for name in names:
                for word in name.strip("_").split("_"):
                    yield word, path


def glossary_words() -> set[str]:
    """Return every word of the glossary."""
    text = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
    return set(re.findall(r"[a-z]+", text.lower()))


def test_file_name_words_are_in_the_glossary() -> None:
    """A module is named by a word that the glossary defines or lists."""
    known = glossary_words()

    assert {
        word: path.relative_to(ROOT).as_posix()
        for word, path in file_name_words()
        if not {word, word.rstrip("s"), f"{word}s"} & known
    } == {}


def test_file_name_words_of_the_old_vocabulary_are_gone() -> None:
    """No module has a name of the private vocabulary."""
    assert {word for word, _ in file_name_words()} & FORMER_WORDS == set()
