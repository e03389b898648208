"""parse and encode: a frame that one accepts is encoded to the same bytes by the other."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace

from brokerd_client.errors import InvalidName, MalformedEnvelope, PayloadError
from brokerd_client.wire.envelope import (
    HEADER,
    CodecId,
    Envelope,
    ErrorCode,
    Flag,
    Kind,
    encode,
    error_payload,
    parse,
    split,
)


def target(data: bytes) -> None:
    """Parse the bytes: an envelope that encodes to them again, or MalformedEnvelope
    with the id if it was there.

    The broker reads a client's frame likewise, but knows no deliveries from clients.
    """
    try:
        envelope, start = split(data, from_client=True)
    except MalformedEnvelope:
        pass
    else:
        assert start == len(data) or envelope == replace(parse(data), payload=b"")
    try:
        envelope = parse(data)
    except MalformedEnvelope as error:
        assert str(error).isprintable()
        expected = HEADER.unpack_from(data)[4] if len(data) >= HEADER.size else 0
        assert error.message_id == expected
        return
    assert parse(memoryview(b"\1" + data + b"\2")[1:-1]) == envelope
    try:
        again = encode(envelope)
    except InvalidName:
        # A topic of no bytes has a form on the wire; that nothing can be published on
        # it is for the receiver to say.
        assert envelope.kind is Kind.EVENT
        assert not envelope.topic
        return
    except PayloadError as error:
        # JSON may be written shorter than it is written here.
        assert "at most 65535 bytes" in str(error)
        assert envelope.extension is not None
        return
    if envelope.extension is None:
        assert again == data
    else:
        # There is more than one way to write the same JSON; the second time it is ours.
        assert parse(again) == envelope
        assert encode(parse(again)) == again


def seeds() -> Iterator[tuple[str, bytes]]:
    """Yield a frame of each kind, with and without what may be in it, and broken ones."""
    for kind in Kind:
        topic = "jobs.new" if kind is Kind.EVENT else ""
        plain = Envelope(kind, 2**63 + kind, "" if topic else "bob", b"payload", topic=topic)
        yield f"plain-{kind.name.lower()}", encode(plain)
        extended = Envelope(
            kind,
            1,
            "$broker",
            b"",
            CodecId.JSON,
            Flag.RECEIPT,
            topic or "",
            {"ttl": 5, "a": [1, "ü"]},
        )
        yield f"extended-{kind.name.lower()}", encode(extended)
        if kind in (Kind.MESSAGE, Kind.EVENT):
            delivery = replace(extended, flags=Flag.ACK, seq=2**40, attempt=2)
            yield f"delivery-{kind.name.lower()}", encode(delivery)
    yield "seq-beyond", HEADER.pack(1, Flag.ACK, 0, 3, 5) + b"bob" + b"123456789"
    yield "ack", encode(Envelope(Kind.ACK, 9, "", b'{"verb":"back","delay":5}', 2, Flag.RECEIPT))
    yield (
        "error",
        encode(
            Envelope(Kind.ERROR, 7, "$broker", error_payload(ErrorCode.OFFLINE, "gone", "bob"), 2)
        ),
    )
    yield (
        "pool",
        encode(Envelope(Kind.REPLY, 7, "pool/ab1", b"\x80\x05N.", CodecId.PICKLE, Flag.ACK)),
    )
    for name, text in {
        "infinity": '{"ttl":1e400}',
        "nan": '{"ttl":NaN}',
        "deep": "[" * 2000,
        "deep-object": '{"a":' * 500 + "1" + "}" * 500,
        "surrogate": '{"a":"\\ud800"}',
        "list": "[1]",
        "long-int": '{"a":' + "9" * 5000 + "}",
        "twice": '{"a":1,"a":2}',
        "levels-32": '{"a":' + "[" * 31 + "]" * 31 + "}",
        "levels-33": '{"a":' + "[" * 32 + "]" * 32 + "}",
        "brackets-in-text": '{"a":"' + "[{" * 40 + '\\""}',
        "digits-309": '{"a":' + "1" * 309 + "}",
        "digits-310": '{"a":' + "1" * 310 + "}",
        "floats": '{"a":[1e15,0.1,-0.0,1e-7]}',
    }.items():
        content = text.encode()
        header = HEADER.pack(Kind.MESSAGE, Flag.EXTENSION, 0, 3, 5) + b"bob"
        yield f"json-{name}", header + len(content).to_bytes(2, "big") + content
    yield (
        "json-utf16",
        HEADER.pack(1, 2, 0, 0, 1) + b"\0\x0c" + json.dumps({"a": 1}).encode("utf-16")[:12],
    )
    yield "no-topic", HEADER.pack(5, 0, 0, 0, 1) + b"\0"
    yield "name-beyond", HEADER.pack(1, 0, 0, 255, 1) + b"short"
    yield "bad-utf8", HEADER.pack(1, 0, 0, 2, 1) + b"\xff\xfe"
