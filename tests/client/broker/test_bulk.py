"""Messages that are sent together: the checks of their recipients and payloads, the
same for the usual bulk as for any other.
"""

from __future__ import annotations

import pytest

from brokerd_client.errors import InvalidName, PayloadError
from brokerd_client.protocol.bulk import encode_many


def test_bulk_of_mixed_payloads_keeps_order() -> None:
    """Each payload has the codec it would have alone."""
    to, codecs, bodies = encode_many(
        iter([("a", b"1"), ["b/x", {"k": 2}], ("c", bytearray(b"3"))]), None
    )
    assert (list(to), list(codecs), list(bodies)) == (
        ["a", "b/x", "c"],
        [0, 2, 0],
        [b"1", b'{"k":2}', b"3"],
    )


def test_bulk_given_codec_applies_to_all_payloads() -> None:
    """A given codec takes precedence over the payload's own."""
    assert encode_many([("a", b"1"), ("b", b"2")], 128)[1] == [128, 128]


@pytest.mark.parametrize("messages", [[], iter(())])
def test_bulk_without_messages_is_empty(messages: list[tuple[str, object]]) -> None:
    """An empty bulk is valid."""
    assert encode_many(messages, None) == ((), (), ())


@pytest.mark.parametrize("payload", [b"", "text"])
def test_bulk_with_invalid_recipients_names_first(payload: object) -> None:
    """Of several invalid recipients, the error names the first, whatever the payloads
    are.
    """
    names = ["a", *(f"no name {number}" for number in range(20))]
    with pytest.raises(InvalidName, match="'no name 0'"):
        encode_many([(name, payload) for name in names], None)


def test_bulk_payload_without_codec_raises() -> None:
    """A payload without a codec is refused, wherever it stands."""
    with pytest.raises(PayloadError, match="object"):
        encode_many([("a", b""), ("a", object())], None)


@pytest.mark.parametrize("message", [("a",), ("a", b"", b""), 5])
def test_bulk_message_that_is_not_pair_raises(message: object) -> None:
    """A message that is not a pair is the caller's mistake, also among pairs."""
    for messages in ([message], [("a", b""), message]):
        with pytest.raises((ValueError, TypeError)):
            encode_many(messages, None)  # type: ignore[arg-type]
