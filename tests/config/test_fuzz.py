"""Any bytes give either a configuration or a ConfigError with whole lines."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from brokerd.config import yaml_reader
from brokerd.config.load import ConfigError, load_text

ROOT = Path(__file__).resolve().parents[2]
VALID = (
    (ROOT / "config" / "examples" / "team.yaml")
    .read_text(encoding="utf-8")
    .replace("key_file:", "key:")
)

_LINE = re.compile(r"f:[1-9][0-9]*:[1-9][0-9]*: [^\n]+: [^\n]+ \([^\n]+\)")


@pytest.fixture(scope="module", autouse=True)
def empty_directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Run the tests where ``include: ["*"]`` finds no files."""
    with chdir(tmp_path_factory.mktemp("empty")):
        yield


def judge(text: str | bytes) -> None:
    """Load the text, and check the form of an error."""
    try:
        load_text(text, "f", {})
    except ConfigError as error:
        problems = error.problems
        lines = str(error).splitlines()
    else:
        return
    assert len(lines) == len(problems) > 0
    for line in lines:
        assert line.isprintable()
        assert _LINE.fullmatch(line), line
    places = [(problem.place.line, problem.place.column) for problem in problems]
    assert places == sorted(places)


@given(st.binary(max_size=300))
def test_config_random_bytes_load_or_give_config_error(content: bytes) -> None:
    """Random bytes load as a configuration or raise a well-formed ConfigError."""
    judge(content)


@given(st.text(max_size=300))
def test_config_random_text_loads_or_gives_config_error(text: str) -> None:
    """Random text loads as a configuration or raises a well-formed ConfigError."""
    judge(text)


_TOKENS = st.sampled_from(
    [
        "listen",
        "clients",
        "include",
        "limits",
        "log",
        "monitor",
        "key",
        "keys",
        "key_file",
        "send_to",
        "rate",
        "queue",
        "messages",
        "not_after",
        "peer_uid",
        "mode",
        "address",
        "<<",
        "&a",
        "*a",
        "!!str",
        "!!binary",
        "!!int",
        "!x",
        "null",
        "~",
        "true",
        "0",
        "-1",
        "1e999",
        ".nan",
        "0x",
        "1:2:3",
        "2026-01-01",
        "2026-13-01",
        "8MiB",
        "5s",
        "'",
        '"',
        "|",
        ">",
        ":",
        "[",
        "]",
        "{",
        "}",
        ",",
        "#",
        "%",
        "---",
        "...",
        "?",
        "é",
        "$broker",
        "*",
        ": ",
        "- ",
        "\n",
        "\n  ",
        "\n    ",
        "\t",
        " ",
        "a" * 70,
        "\x85",
        "\u2028",
        "\ufeff",
    ]
)
_SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.dates()
    | st.datetimes()
    | st.binary(max_size=3)
)
_KEYS = st.sampled_from(
    [
        "listen",
        "clients",
        "a",
        "b",
        "key",
        "keys",
        "send_to",
        "rate",
        "limits",
        "log",
        "include",
        "address",
        "mode",
        "group",
        "file",
        "not_after",
        "peer_uid",
        "queue",
        "level",
        "connections",
    ]
)


@settings(max_examples=400)
@given(st.lists(_TOKENS, max_size=40))
def test_config_random_yaml_tokens_load_or_give_config_error(words: list[str]) -> None:
    """The configuration's own words and YAML's punctuation are joined in any order."""
    judge("".join(words))


@settings(max_examples=400)
@given(st.data())
def test_config_valid_file_mutated_loads_or_gives_config_error(data: st.DataObject) -> None:
    """Pieces of a valid file are removed, doubled, swapped or overwritten."""
    text = VALID
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(text)))
        end = data.draw(st.integers(start, min(len(text), start + 60)))
        piece = data.draw(
            _TOKENS | st.just("") | st.just(text[start:end] * 2) | st.text(max_size=3)
        )
        text = text[:start] + piece + text[end:]

    judge(text)


@settings(max_examples=200)
@given(
    st.recursive(
        _SCALARS,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_KEYS, inner, max_size=6),
        max_leaves=30,
    )
)
def test_config_random_value_tree_loads_or_gives_config_error(tree: object) -> None:
    """Every kind of value is tried in every place of the model."""
    try:
        text = yaml.safe_dump(tree)
    except yaml.YAMLError:
        return
    judge(text)


@pytest.mark.parametrize("name", ["brokerd.yaml", "examples/team.yaml", "examples/channels.yaml"])
def test_config_file_truncated_loads_or_gives_config_error(name: str) -> None:
    """A file that ends too early is judged like any other file. Every seventh byte is
    tried.
    """
    content = (ROOT / "config" / name).read_bytes()

    for end in range(0, len(content), 7):
        judge(content[:end])


def test_config_without_libyaml_gives_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without libyaml a valid file gives the same configuration, and a truncated file
    is judged in the same form.
    """
    compiled = load_text(VALID, "f", {})
    monkeypatch.setattr(yaml_reader, "_LOADER", yaml.SafeLoader)

    assert load_text(VALID, "f", {}) == compiled
    for end in range(0, len(VALID), 31):
        judge(VALID[:end])
