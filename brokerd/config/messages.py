"""Pydantic's errors in the words of this program: the fault, and its remedy in
brackets.

An error names only the type of a value: the value may be a secret key in the wrong
place. Only unknown field names are repeated, with a hint at the name that was meant.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from datetime import date
from typing import Any, Final, get_args

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from brokerd.config.problems import Path, name_alone

__all__ = ["complaint", "did_you_mean", "unknown_key"]


def complaint(error: ErrorDetails, model: type[BaseModel]) -> str:
    """Return the message for one of pydantic's errors.

    model: the model that raised it.
    """
    if error["type"] == "extra_forbidden":
        return unknown_key(str(error["loc"][-1]), known_at(model, error["loc"][:-1]))
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    if error["type"] == "enum":
        # The expected words are in the form 'a', 'b' or 'c'.
        words = error["ctx"]["expected"].replace("'", "").replace(" or ", ", ").split(", ")
        return f"is not one of {', '.join(words)}{_meant(error['input'], words)}"
    words_for = _WORDS.get(error["type"])
    return words_for(error) if words_for else f"is not valid here ({error['msg']})"


def unknown_key(key: str, keys: Iterable[str]) -> str:
    """Return the message for a key that the model does not have."""
    short = name_alone(key)
    keys = sorted(keys)
    if short.removesuffix(":...") in keys:
        return f"unknown key {short!r} (put a space after the colon)"
    meant = did_you_mean(short, keys)
    return f"unknown key {short!r} ({meant or 'known here: ' + ', '.join(keys)})"


def did_you_mean(word: str, words: Iterable[str]) -> str:
    """Return ``did you mean 'that'?`` with the most similar word, or "" without one."""
    import difflib

    # A comparison costs the product of the lengths; a longer word is not a typing
    # error.
    close = difflib.get_close_matches(word, words, n=1, cutoff=0.6) if len(word) <= 64 else []
    return f"did you mean {close[0]!r}?" if close else ""


def known_at(model: type[BaseModel], path: Path) -> list[str]:
    """Return the keys that the mapping at the path may have."""
    for step in path:
        if isinstance(step, str) and step in model.model_fields:
            model = _model_in(model.model_fields[step].annotation) or model
    return list(model.model_fields)


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """Return the model inside an annotation such as ``Annotated[list[KeyEntry], ...] |
    None``.
    """
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_model_in, get_args(annotation))), None)


def _meant(value: object, words: list[str]) -> str:
    meant = did_you_mean(value, words) if isinstance(value, str) else ""
    return f" ({meant or 'give one of these words'})"


def _kind(value: object) -> str:
    """Return the readable name of the value's type; never the value."""
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, (int, float)):
        return "a number"
    if isinstance(value, str):
        return "text"
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, (list, tuple)):
        return "a list"
    if isinstance(value, date):
        return "a date"
    return "empty" if value is None else "something else"


def _wants(kind: str, remedy: str) -> Callable[[ErrorDetails], str]:
    def words(error: ErrorDetails) -> str:
        return f"is {_kind(error['input'])}, not {kind} ({remedy})"

    return words


def _text(error: ErrorDetails) -> str:
    plain = isinstance(error["input"], (bool, int, float, date))
    return f"is {_kind(error['input'])}, not text ({'put it in quotes' if plain else 'give text'})"


_WORDS: Final[Mapping[str, Callable[[ErrorDetails], str]]] = {
    "missing": lambda _: "is missing (give it)",
    "string_type": _text,
    "string_too_short": lambda _: "is empty (give a value, or take the key out)",
    "int_type": _wants("a whole number", "give a whole number"),
    "int_from_float": _wants("a whole number", "give a whole number"),
    "float_type": _wants("a number", "give a number"),
    "bool_type": _wants("true or false", "give true or false"),
    "tuple_type": _wants("a list", "give a list: [one, other], or one '- item' a line"),
    "dict_type": _wants("a mapping", "give keys with values"),
    "model_type": _wants("a mapping", "give keys with values"),
    "too_short": lambda _: "is an empty list (give at least one item, or take the key out)",
    "greater_than_equal": lambda error: f"is too small (give {error['ctx']['ge']} or more)",
    "less_than_equal": lambda error: f"is too large (give {error['ctx']['le']} or less)",
    "less_than": lambda error: f"is too large (give less than {error['ctx']['lt']})",
}
