"""YAML to plain values with places: the types of yaml.SafeLoader, and harmful texts."""

from __future__ import annotations

import re
import time
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from brokerd.config import yaml_reader
from brokerd.config.yaml_reader import Document, read


def problem_of(text: str) -> str:
    """Return the only problem of the text, as printed."""
    found = read(text, "f").problems
    assert len(found) == 1, found
    return str(found[0])


@pytest.fixture(params=["compiled", "plain"])
def parser(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both of PyYAML's parsers: the compiled one where it exists, and the plain one."""
    if request.param == "plain":
        monkeypatch.setattr(yaml_reader, "_LOADER", yaml.SafeLoader)
    elif not yaml.__with_libyaml__:
        pytest.skip("PyYAML was built without libyaml")
    return str(request.param)


@pytest.mark.usefixtures("parser")
@pytest.mark.parametrize(
    "text",
    [
        "a: 1\nb: [x, 'y', \"z\", 2.5, true, no, 0x1f, 0o17, 017, 1_000]",
        "a: {b: {c: [1, {d: e}]}}",
        "when: 2026-12-31T00:00:00Z\nday: 2026-12-31\nzone: 2026-12-31 10:00:00+02:00",
        "a: !!str 5\nb: !!int '7'\nc: !!binary aGVsbG8=\nd: !!float 3",
        "a: &x {p: 1, q: 2}\nb: *x\nc: {<<: *x, q: 3}",
        "a: &x {p: 1}\nb: &y {p: 2, r: 3}\nc: {<<: [*x, *y], s: 4}",
        "a: |\n  two\n  lines\nb: >\n  folded\n  text\n",
        "- 1\n- [2, 3]\n-   x: y\n",
        "a: '='\nb: '<<'\n",
    ],
)
def test_yaml_reader_values_equal_safe_load(text: str) -> None:
    """Scalars of every type, nesting, anchors and merges are the same as from
    yaml.safe_load.
    """
    document = read(text, "f")

    assert document.problems == []
    assert document.root == yaml.safe_load(text)


_SCALARS = (
    st.integers(-(2**60), 2**60) | st.booleans() | st.text(max_size=12) | st.floats(allow_nan=False)
)
_TREES = st.recursive(
    _SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(min_size=1, max_size=8), inner, max_size=4)
    ),
    max_leaves=20,
)


@given(st.dictionaries(st.text(min_size=1, max_size=8), _TREES, max_size=4), st.booleans())
def test_yaml_reader_dumped_values_are_read_back(tree: dict[str, Any], flow: bool) -> None:
    """Plain values that PyYAML writes are read back as the same values."""
    text = yaml.safe_dump(tree, default_flow_style=flow)

    document = read(text, "f")

    assert document.problems == []
    assert (document.root or {}) == tree


@pytest.mark.usefixtures("parser")
def test_yaml_reader_places_count_from_one() -> None:
    """Lines and columns count from 1. A scalar's place is its own, a container's is its
    key, an item's is its beginning.
    """
    document = read("a:\n  b: [x,\n    yy]\n  c:\n  - {d: 1}\n", "f")

    assert [
        (str(document.place(path)[0]), document.place(path)[1])
        for path in (("a",), ("a", "b"), ("a", "b", 1), ("a", "c", 0), ("a", "c", 0, "d"))
    ] == [
        ("f:1:1", "a"),
        ("f:2:3", "a.b"),
        ("f:3:5", "a.b[1]"),
        ("f:5:5", "a.c[0]"),
        ("f:5:9", "a.c[0].d"),
    ]


def test_yaml_reader_place_of_missing_path_is_its_container() -> None:
    """A path that leads out of the text ends at the last existing item."""
    document = read("a:\n  b: x\n", "f")

    assert document.place(("a", "z")) == (document.place(("a",))[0], "a.z")
    assert document.place(("a", "b", "c")) == (document.place(("a", "b"))[0], "a.b")
    assert document.place(("a", "b"), at_key=True)[0].column == 3


@pytest.mark.usefixtures("parser")
@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: 1\nb: 2\n a: 3\n", "f:3:3: b: not YAML: mapping values are not allowed"),
        ("a: 1\na: 2\n", "f:2:1: a: is given twice, first at f:1:1 (keep one of them)"),
        ("x:\n  a: 1\n  'a': 2\n", "f:3:3: x.a: is given twice, first at f:2:3 (keep one of them)"),
        ("a:\n\t- b\n", "f:2:1: a: not YAML: a tab (indent with spaces)"),
        ("a: 'never ends\nb: c\n", "f:1:4: a: not YAML: found unexpected end of stream"),
        ("a: [1,\n", "f:"),
        ("a:\n  5: x\n", "f:2:3: a: holds a key that is a number to YAML (put it in quotes)"),
        ("a:\n  on: x\n", "f:2:3: a: holds a key that is true or false to YAML (put it in quotes)"),
        ("a:\n  [b]: x\n", "f:2:3: a: holds a key that is not text to YAML (put it in quotes)"),
        ("a:\n", "f:1:1: a: is empty (give a value, or take the key out)"),
        ("a: [b, ~]\n", "f:1:8: a[1]: is empty (give a value, or take the item out)"),
        ("a: *b\n", "f:1:4: a: an alias to an unknown anchor (text that begins with '*' needs quotes)"),
        ("a: &a [*a]\n", "f:1:8: a[0]: an alias is inside its own anchor (take it out)"),
        ("a: &a {b: {<<: *a}}\n", "f:1:16: a.b.<<: an alias is inside its own anchor (take it out)"),
        ("a: !b c\n", "f:1:4: a: a tag without meaning here (text that begins with '!' needs quotes)"),
        ("a: !!python/object/apply:os.system [x]\n", "f:1:4: a: a tag without meaning here"),
        ("a: !!set {b, c}\n", "f:"),
        ("a: 2026-13-45\n", "f:1:4: a: YAML reads this as type timestamp, and it is not valid (put text in quotes)"),
        ("a: !!bool perhaps\n", "f:1:4: a: YAML reads this as type bool, and it is not valid"),
        ("a: !!timestamp soon\n", "f:1:4: a: YAML reads this as type timestamp, and it is not valid"),
        ("a: !!binary é\n", "f:1:4: a: YAML reads this as type binary, and it is not valid"),
        ("a: 0x" + "f" * 1000 + "\n", "f:1:4: a: YAML reads this as type int, and it is not valid"),
        ("a: " + "9" * 5000 + "\n", "f:1:4: a: YAML reads this as type int, and it is not valid"),
        ("a: {<<: 5}\n", "f:1:9: a.<<: only a mapping can be merged"),
        ("a: 1\n---\nb: 2\n", "f:2:1: (file): a second document begins here (one file holds one)"),
        ("a: b\x07c\n", "f:1:5: (file): a text file can't hold the character U+0007 (take it out)"),
        ("a: b\n\x00", "f:2:1: (file): a text file can't hold the character U+0000"),
        ("a: \ud800", "f:1:4: (file): a text file can't hold the character U+D800"),
        ("a: %b\n", "f:1:4: a: not YAML: found character"),
    ],
)  # fmt: skip
def test_yaml_reader_mistake_is_one_problem_with_place(text: str, problem: str) -> None:
    """Each mistake of the text is one problem with its line, column and path."""
    problems = [str(found) for found in read(text, "f").problems]

    assert any(found.startswith(problem) for found in problems), problems
    if problem != "f:":
        assert len(problems) == 1


@pytest.mark.usefixtures("parser")
@pytest.mark.parametrize(("text", "bracket"), [("a: [1\nb: {c\n", "]"), ("a: {b: c\nd: e\n", "}")])
def test_yaml_reader_unclosed_bracket_is_named(text: str, bracket: str) -> None:
    (problem,) = read(text, "f").problems
    assert f"not YAML: ',' or '{bracket}' is missing" in str(problem)


@pytest.mark.parametrize("size", [1, 3, 100])
def test_yaml_reader_unprintable_character_is_found_in_every_piece(
    monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """A long text is searched in pieces, and the place counts from its beginning."""
    monkeypatch.setattr(yaml_reader, "_SEARCHED", size)
    for column in range(4, 12):
        text = f"# first\na: {'b' * (column - 4)}\x07"
        assert problem_of(text).startswith(f"f:2:{column}: (file): a text file can't hold")
    assert read("a: b\n", "f").root == {"a": "b"}


def test_yaml_reader_number_with_colons_is_text() -> None:
    """1:30 is not 90: an address or a time of day is not a number to base 60."""
    document: Document = read("a: 1:30\nb: 12:30:45\nc: 1:30.5\nd: =\n", "f")

    assert document.root == {"a": "1:30", "b": "12:30:45", "c": "1:30.5", "d": "="}


@pytest.mark.timing
@pytest.mark.usefixtures("parser")
@pytest.mark.parametrize("opening", ["[", "{a: ", "- ", "? ", "[{a: ", "&a [", "a:\n"])
def test_yaml_reader_deep_nesting_is_refused(opening: str) -> None:
    """100,000 levels are refused after twenty. The compiled composer would end the
    process.
    """
    text = opening * 100_000
    if opening == "a:\n":
        text = "".join(" " * level + "a:\n" for level in range(2000))
    began = time.monotonic()

    document = read(text, "f")

    assert not document.complete
    # The second is the error of libyaml 0.2.6 and later, after 1,000 brackets.
    assert re.search(
        "nested more than 20 deep|exceeded maximum nesting depth", str(document.problems[-1])
    )
    assert time.monotonic() - began < 30


@pytest.mark.parametrize(
    "text",
    [
        # Each level holds the one before ten times: 10 ** 12 values.
        "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
        + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12)),
        # A wide mapping merged into many: 4,000 times 4,000 keys.
        "a: &a {"
        + ", ".join(f"k{n}: 1" for n in range(4000))
        + "}\nb:\n"
        + "  - {<<: *a}\n" * 4000,
        # A key that is a wide list.
        "a: &a [" + "x, " * 5000 + "]\nb:\n" + "  - *a\n" * 5000,
    ],
    ids=["laughs", "merges", "lists"],
)
def test_yaml_reader_aliases_expanding_too_much_are_refused(text: str) -> None:
    """A small text that expands to a huge one is refused before it is expanded."""
    assert "the aliases up to here repeat too much" in problem_of(text)


def test_yaml_reader_ordinary_aliases_are_accepted() -> None:
    """One anchor merged into 20,000 entries is ordinary."""
    text = "a: &a {p: 1, q: [x, y, z]}\nb:\n" + "".join(
        f"  c{n}: {{<<: *a, r: {n}}}\n" for n in range(20_000)
    )

    document = read(text, "f")

    assert document.problems == []
    assert document.root["b"]["c19999"] == {"p": 1, "q": ["x", "y", "z"], "r": 19999}  # type: ignore[index]


@given(
    st.text(max_size=200) | st.text(st.sampled_from("ab:-[]{}&*!|>'\"%@`,?# \n\t<0~"), max_size=60)
)
def test_yaml_reader_random_text_never_raises(text: str) -> None:
    """Reading any text gives values and problems, each problem on one line."""
    document = read(text, "f")

    assert all("\n" not in str(problem) for problem in document.problems)
    assert document.complete or document.problems
