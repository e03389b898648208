"""The messages between hosts, as bytes."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.cluster_net import message

from brokerd.core.cluster.messages import (
    Answer,
    Data,
    Inquiry,
    Malformed,
    Outcomes,
    Ping,
    Pong,
    decode_json,
    encode_json,
    frames_of,
    head_of,
    key_of,
    pack,
)
from brokerd.core.cluster.seam import Run

NUMBERS = st.integers(0, 2**64 - 1)
RUNS = st.lists(
    st.builds(Run, st.text(max_size=20), st.binary(max_size=40), st.integers(0, 2**32 - 1)),
    max_size=4,
)
RANGES = st.lists(
    st.tuples(st.integers(0, 1000), st.integers(0, 1000)).map(lambda each: (min(each), max(each))),
    max_size=3,
)


def encoded(value: Any) -> memoryview:
    """Return a message's bytes behind its head."""
    head, body = head_of(memoryview(pack(1, 2, value.encode())))
    assert head == (1, 2)
    return body


@settings(max_examples=25, deadline=None)
@given(st.builds(Data, NUMBERS, NUMBERS, NUMBERS, RUNS))
def test_data_is_decoded_as_it_was(data: Data) -> None:
    assert Data.decode(encoded(data)) == data


@settings(max_examples=25, deadline=None)
@given(st.builds(Outcomes, NUMBERS, NUMBERS, RANGES, RANGES, RUNS))
def test_outcomes_are_decoded_as_they_were(outcomes: Outcomes) -> None:
    assert Outcomes.decode(encoded(outcomes)) == outcomes


@settings(max_examples=25, deadline=None)
@given(st.builds(Inquiry, NUMBERS, NUMBERS, NUMBERS, st.lists(NUMBERS, max_size=5)))
def test_inquiry_is_decoded_as_it_was(inquiry: Inquiry) -> None:
    assert Inquiry.decode(encoded(inquiry)) == inquiry


@settings(max_examples=25, deadline=None)
@given(st.builds(Answer, NUMBERS, NUMBERS, NUMBERS, NUMBERS, st.lists(NUMBERS, max_size=5)))
def test_answer_is_decoded_as_it_was(answer: Answer) -> None:
    assert Answer.decode(encoded(answer)) == answer


@settings(max_examples=25, deadline=None)
@given(
    st.builds(Ping, NUMBERS, NUMBERS, NUMBERS),
    st.builds(Pong, NUMBERS, NUMBERS, NUMBERS, NUMBERS, st.booleans()),
)
def test_ping_and_pong_are_decoded_as_they_were(ping: Ping, pong: Pong) -> None:
    assert Ping.decode(encoded(ping)) == ping
    assert Pong.decode(encoded(pong)) == pong


@pytest.mark.parametrize("kind", [Data, Outcomes, Inquiry, Answer, Ping, Pong])
@settings(max_examples=25, deadline=None)
@given(body=st.binary(max_size=80))
def test_message_of_random_bytes_is_decoded_or_malformed(kind: Any, body: bytes) -> None:
    try:
        kind.decode(memoryview(body))
    except Malformed as error:
        assert str(error)  # noqa: PT017 - there may be none


def malformed(function: Any, body: bytes, text: str) -> None:
    with pytest.raises(Malformed, match=text):
        function(memoryview(body))


def test_message_that_is_cut_or_wrong_is_malformed() -> None:
    run = struct.pack("!HII", 1, 0, 4)
    malformed(head_of, b"\x01", "too short")
    malformed(head_of, struct.pack("!BQQ", 1, 0, 0), "version 1 of the format")
    malformed(Data.decode, bytes(24) + run[:-1], "too short")
    malformed(Data.decode, bytes(24) + run + b"b", "a run is longer")
    malformed(Data.decode, bytes(24) + run + b"\xffabcd", "not UTF-8")
    malformed(Outcomes.decode, struct.pack("!QQII", 1, 1, 1, 0), "longer than the message")
    backwards = struct.pack("!QQIIQQ", 1, 1, 1, 0, 5, 4)
    malformed(Outcomes.decode, backwards, "not in order")
    malformed(Inquiry.decode, struct.pack("!QQQI", 1, 1, 1, 3), "do not fill")


def test_json_that_is_no_object_is_malformed() -> None:
    assert decode_json(memoryview(b"".join(encode_json({"a": 1})))) == {"a": 1}
    malformed(decode_json, b"[1]", "not a JSON object")
    malformed(decode_json, b"{", "not JSON")


def test_frames_of_run_are_yielded_whole() -> None:
    frames = [message("alice", 1), message("alice", 2**40, size=300)]
    found = list(frames_of(Run("bob", b"".join(frames))))
    assert found == frames
    assert [key_of(each) for each in found] == [
        (b"alice", 1, False),
        (b"alice", 2**40, False),
    ]


@pytest.mark.parametrize(
    "frames",
    [b"\0\0", b"\0\0\0\x05abc", b"\xff\xff\xff\xfe" + bytes(40), struct.pack("!i", 3) + bytes(3)],
)
def test_run_with_part_of_frame_is_malformed(frames: bytes) -> None:
    with pytest.raises(Malformed):
        list(frames_of(Run("bob", frames)))
