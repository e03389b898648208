"""The subject of a certificate, as text and as what two of them are compared by.

Text is ``CN=alice,O=Example``: names of attributes and values as RFC 4514 and ``openssl x509 -subject`` write them, a
backslash before a comma, plus or backslash that belongs to a value. The order says nothing here: some programs write
it backwards.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

__all__ = ["Subject", "normal", "parse", "show"]

#: Pairs of an attribute's short name and its value, sorted.
Subject = tuple[tuple[str, str], ...]

#: How OpenSSL, and with it Python, writes names out, to what people write (RFC 4514, 3, and openssl's own).
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
#: One attribute: its name, and a value in which what has a meaning of its own stands behind a backslash.
_PART: Final = re.compile(r"\s*([A-Za-z0-9.]+)\s*=\s*((?:[^\\,+]|\\.)*?)\s*(?:([,+])|\Z)", re.DOTALL)

_SPECIAL: Final = re.compile(r"([\\,+])")
_ESCAPED: Final = r"\\\1"


def normal(pairs: Iterable[tuple[str, str]]) -> Subject:
    """Return a subject, as the ssl module gives it, in the form that is compared."""
    return tuple(sorted((_SHORT.get(name.lower(), name.upper()), value) for name, value in pairs))


def parse(text: str) -> Subject:
    """Return the subject in a text. Raises ValueError: what is wrong (what would be right)."""
    found: list[tuple[str, str]] = []
    position = 0
    while True:
        match = _PART.match(text, position)
        if match is None or not match[2]:
            raise ValueError(f"is no certificate's subject ({_RIGHT})")
        found.append((match[1], re.sub(r"\\(.)", r"\1", match[2], flags=re.DOTALL)))
        if not match[3]:
            return normal(found)
        position = match.end()


def show(subject: Subject) -> str:
    """Return the subject as text, such as could stand in a configuration."""
    return ",".join(f"{name}={_SPECIAL.sub(_ESCAPED, value)}" for name, value in subject)
