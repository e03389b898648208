"""Scalars of YAML as values, by the rules of ``yaml.SafeLoader``."""

from __future__ import annotations

from typing import Final

import yaml
from yaml.constructor import SafeConstructor
from yaml.nodes import ScalarNode

__all__ = ["OTHER_THAN_TEXT", "InvalidScalar", "tagged", "unquoted"]

#: Limits an integer, in bits. No setting needs more, and Python refuses to print it.
_LONGEST_INT_BITS: Final = 1024
#: Digits of an integer that is read without PyYAML.
_FEW_DIGITS: Final = 18
_TAG: Final = "tag:yaml.org,2002:"
_TEXT: Final = _TAG + "str"
_RESOLVERS: Final = yaml.SafeLoader.yaml_implicit_resolvers
#: The first characters of unquoted scalars that may be something else than text.
OTHER_THAN_TEXT: Final = frozenset(_RESOLVERS)
_CONSTRUCTOR: Final = SafeConstructor()
_CONSTRUCT: Final = {
    _TAG + "null": lambda _: None,
    _TAG + "bool": _CONSTRUCTOR.construct_yaml_bool,
    _TAG + "int": _CONSTRUCTOR.construct_yaml_int,
    _TAG + "float": _CONSTRUCTOR.construct_yaml_float,
    _TAG + "timestamp": _CONSTRUCTOR.construct_yaml_timestamp,
    _TAG + "binary": _CONSTRUCTOR.construct_yaml_binary,
}
_BOOLS: Final = {"true": True, "false": False}


class InvalidScalar(Exception):
    """A scalar has no value; the message says why, without the scalar itself."""


def unquoted(text: str) -> object:
    """Return the value of an unquoted scalar. Raises InvalidScalar."""
    if text[:1] not in OTHER_THAN_TEXT:
        return text
    if text in _BOOLS:
        return _BOOLS[text]
    if "1" <= text[:1] <= "9" and len(text) <= _FEW_DIGITS and text.isdecimal():
        return int(text)
    return tagged(_tag_of(text), text)


def tagged(tag: str, text: str) -> object:
    """Return the value of a scalar with a tag. Raises InvalidScalar."""
    if tag == _TEXT:
        return text
    construct = _CONSTRUCT.get(tag)
    if construct is None:
        raise InvalidScalar("a tag without meaning here (text that begins with '!' needs quotes)")
    try:
        value = construct(ScalarNode(tag, text))
        if type(value) is int and value.bit_length() > _LONGEST_INT_BITS:
            raise ValueError
    # The constructors raise these for "0x_", a 13th month, "!!bool perhaps" and
    # "!!timestamp soon".
    except (
        ValueError,
        KeyError,
        AttributeError,
        IndexError,
        OverflowError,
        TypeError,
        yaml.YAMLError,
    ):
        kind = tag.removeprefix(_TAG)
        fault = f"YAML reads this as type {kind}, and it is not valid (put text in quotes)"
        raise InvalidScalar(fault) from None
    return value


def _tag_of(text: str) -> str:
    """Return the tag of an unquoted scalar, by the rules of yaml.SafeLoader."""
    for tag, pattern in _RESOLVERS.get(text[:1], ()):
        if pattern.match(text):
            # In YAML 1.1, 1:30 is 90, and "=" and "<<" are special. People mean text by
            # all three.
            to_base_60 = ":" in text and tag in (_TAG + "int", _TAG + "float")
            return _TEXT if to_base_60 or tag not in _CONSTRUCT else str(tag)
    return _TEXT
