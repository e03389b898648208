"""The subject of a certificate: its text, and a normal form for comparison.

Text is ``CN=alice,O=Example``, written as in RFC 4514 and ``openssl x509 -subject``.
A backslash precedes each comma, plus or backslash that belongs to a value. The order
of the attributes has no meaning: some programs write it backwards.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

__all__ = ["Subject", "normal", "parse", "show"]

#: Pairs of an attribute's short name and its value, sorted.
Subject = tuple[tuple[str, str], ...]

#: Attribute names as OpenSSL and Python spell them, to their usual short forms (RFC
#: 4514, section 3, and OpenSSL's own).
_SHORT: Final = {
    "commonname": "CN",
    "countryname": "C",
    "domaincomponent": "DC",
    "emailaddress": "EMAILADDRESS",
    "givenname": "GN",
    "localityname": "L",
    "organizationalunitname": "OU",
    "organizationname": "O",
    "stateorprovincename": "ST",
    "streetaddress": "STREET",
    "surname": "SN",
    "userid": "UID",
}
_RIGHT: Final = "give it whole, as in CN=alice,O=Example"
#: One attribute: its name and its value. Special characters in the value are escaped
#: with a backslash.
_PART: Final = re.compile(
    r"\s*([A-Za-z0-9.]+)\s*=\s*((?:[^\\,+]|\\.)*?)\s*(?:([,+])|\Z)", re.DOTALL
)

_SPECIAL: Final = re.compile(r"([\\,+])")
_ESCAPED: Final = r"\\\1"


def normal(pairs: Iterable[tuple[str, str]]) -> Subject:
    """Return the normal form, for comparison, of a subject from the ssl module."""
    return tuple(sorted((_SHORT.get(name.lower(), name.upper()), value) for name, value in pairs))


def parse(text: str) -> Subject:
    """Return the subject in a text. Raises ValueError with the fault and its remedy."""
    attributes: list[tuple[str, str]] = []
    position = 0
    while True:
        match = _PART.match(text, position)
        if match is None or not match[2]:
            raise ValueError(f"is not a valid certificate subject ({_RIGHT})")
        attributes.append((match[1], re.sub(r"\\(.)", r"\1", match[2], flags=re.DOTALL)))
        if not match[3]:
            return normal(attributes)
        position = match.end()


def show(subject: Subject) -> str:
    """Return the subject as text, in the form that a configuration accepts."""
    return ",".join(f"{name}={_SPECIAL.sub(_ESCAPED, value)}" for name, value in subject)
