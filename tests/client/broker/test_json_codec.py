"""Values of more types than JSON's, sent as JSON by one client and read by another."""

from __future__ import annotations

import enum
import json
from collections.abc import Iterator
from dataclasses import InitVar, dataclass, field
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.client_faces import PATIENCE, Asyncio, Blocking, Face

from brokerd.testing import RunningBroker, running
from brokerd_client import JsonCodec, codec
from brokerd_client.errors import PayloadError, UndecodablePayload


class Colour(enum.Enum):
    RED = 1


class Level(enum.IntEnum):
    HIGH = 3


class Pair(NamedTuple):
    left: int
    right: int


@dataclass(frozen=True)
class Point:
    x: int
    y: object = None


@dataclass
class Order:
    id: UUID
    due: date
    lines: list[Point] = field(default_factory=list)


class Money:
    """A type that is neither a dataclass nor an Enum."""

    def __init__(self, amount: Decimal) -> None:
        self.amount = amount

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Money) and other.amount == self.amount

    def __repr__(self) -> str:
        return f"Money({self.amount})"

    __hash__ = None  # type: ignore[assignment]


def codec_of_shop() -> JsonCodec:
    """Return a codec that knows the types above."""
    types = JsonCodec()
    for cls in (Colour, Point, Order):
        types.register(cls)
    types.register(Money, name="money", encode=lambda money: money.amount, decode=Money)
    return types


MOMENT = datetime(2026, 11, 29, 19, 0, 5, 7, tzinfo=timezone(timedelta(hours=1)))
VALUES = [
    date(2026, 11, 29),
    MOMENT,
    MOMENT.replace(tzinfo=None),
    time(1, 2, 3),
    timedelta(days=-1, microseconds=5),
    Decimal("1.10"),
    UUID(int=7),
    [b"\x00\xff"],
    (1, (2, "three")),
    {1, 2},
    frozenset({"a"}),
    {1: "a", None: "b", (1, 2): "c"},
    {"$type": "date", "value": "2026-11-29"},
    {"$type": {"$type": 1}},
    Colour.RED,
    Point(1, Point(2)),
    Order(UUID(int=1), date(2026, 1, 2), [Point(1), Point(2, {"z": b"x"})]),
    Money(Decimal("0.30")),
    [{"a": [1, 2.5, None, True]}, "plain"],
]


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_json_codec_value_of_known_type_comes_back_equal(value: object) -> None:
    types = codec_of_shop()
    number, body = codec.encode(value, None, types)
    assert number == 2
    read = codec.decode(number, body, types=types)
    assert read == value
    assert type(read) is type(value)


PLAIN = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text()
)
ZONES = st.none() | st.integers(-1439, 1439).map(lambda n: timezone(timedelta(minutes=n)))
HASHABLE = st.recursive(
    PLAIN | st.dates() | st.binary() | st.decimals(allow_nan=False, allow_infinity=False),
    lambda inner: st.tuples(inner, inner) | st.frozensets(inner, max_size=3),
    max_leaves=5,
)
ANY = st.recursive(
    HASHABLE | st.datetimes(timezones=ZONES) | st.timedeltas() | st.uuids(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(HASHABLE | st.sampled_from(["$type", "value"]), inner, max_size=3)
    ),
    max_leaves=10,
)


@given(ANY)
def test_json_codec_round_trip_is_equal(value: object) -> None:
    types = JsonCodec()
    assert types.decode(types.encode(value)) == value


def test_json_codec_writes_plain_json_for_payloads_that_json_carries() -> None:
    payload = {"op": "add", "n": [1, 2], "deep": [{"x": None}]}
    assert JsonCodec().encode(payload) == codec.encode(payload)[1]


def test_json_codec_bytes_alone_stay_raw() -> None:
    assert codec.encode(b"x", None, JsonCodec()) == codec.encode(bytearray(b"x")) == (0, b"x")


@pytest.mark.parametrize(
    "value", [object(), Pair(1, 2), Level.HIGH, [Level.HIGH], {"a": 1j}, float("nan"), "\ud800"]
)
def test_json_codec_value_that_would_change_is_refused(value: object) -> None:
    """A subclass of a known type is not written as that type."""
    with pytest.raises(PayloadError):
        JsonCodec().encode(value)


def test_json_codec_endless_payload_is_refused() -> None:
    payload: list[Any] = []
    payload.append(payload)
    with pytest.raises(PayloadError):
        JsonCodec().encode(payload)


def test_json_codec_payload_with_codec_json_stays_plain() -> None:
    assert codec.encode((1,), "json", JsonCodec()) == (2, b"[1]")


def test_json_codec_failing_encoder_is_a_payload_error() -> None:
    types = JsonCodec()
    types.register(Money, encode=lambda money: money.price, decode=Money)  # type: ignore[attr-defined]
    with pytest.raises(PayloadError, match="Money can't be encoded: AttributeError"):
        types.encode(Money(Decimal(1)))


@pytest.mark.parametrize(
    "read",
    [
        {"$type": "os.system", "value": "true"},
        {"$type": 1, "value": 2},
        {"$type": ["date"], "value": 2},
        {"$type": "date", "value": "tomorrow"},
        {"$type": "Point", "value": {"z": 1}},
        {"$type": "Colour", "value": "BLUE"},
        {"$type": "bytes", "value": "!"},
        {"$type": "set", "value": [[]]},
        {"$type": "dict", "value": 5},
    ],
)
def test_json_codec_value_that_no_type_accepts_is_undecodable(read: object) -> None:
    """No class is looked up by its name, and every decoder's error is the library's."""
    with pytest.raises(UndecodablePayload):
        codec_of_shop().decode(json.dumps([read]).encode())


@pytest.mark.parametrize("body", [b"{", b"\xff", b"[" * 100_000])
def test_json_codec_invalid_json_is_undecodable(body: bytes) -> None:
    with pytest.raises(UndecodablePayload, match="not valid JSON"):
        JsonCodec().decode(body)


def test_json_codec_object_that_only_resembles_a_tag_is_read_as_it_is() -> None:
    for read in ({"$type": "date"}, {"value": 1, "type": "date"}, {"$type": 1, "value": 2, "x": 3}):
        assert JsonCodec().decode(json.dumps(read).encode()) == read


@dataclass
class Counted:
    start: InitVar[int]
    count: int = 0


@dataclass
class Derived:
    x: int
    twice: int = field(init=False, default=0)


@pytest.mark.parametrize("cls", [Money, Counted, Derived])
def test_json_codec_class_without_converters_is_refused(cls: type[Any]) -> None:
    with pytest.raises(TypeError, match="give encode= and decode="):
        JsonCodec().register(cls)


def test_json_codec_with_one_converter_is_refused() -> None:
    with pytest.raises(TypeError, match="both"):
        JsonCodec().register(Money, encode=str)


@pytest.mark.parametrize("cls", [date, int, dict])
def test_json_codec_known_class_is_not_registered_again(cls: type[Any]) -> None:
    with pytest.raises(ValueError, match="known already"):
        JsonCodec().register(cls, name="other", encode=str, decode=cls)


@pytest.mark.parametrize("name", ["date", "dict"])
def test_json_codec_name_is_not_registered_twice(name: str) -> None:
    with pytest.raises(ValueError, match="give name="):
        JsonCodec().register(Point, name=name)


def test_json_codec_register_returns_the_class() -> None:
    assert JsonCodec().register(Point) is Point


# At a broker


@pytest.fixture
def broker() -> Iterator[RunningBroker]:
    with running(clients={"alice": {}, "bob": {}, "carol": {}}) as broker:
        yield broker


@pytest.fixture(params=[Blocking, Asyncio], ids=["blocking", "asyncio"])
def face(request: pytest.FixtureRequest) -> Iterator[Face]:
    face: Face = request.param()
    yield face
    face.close()


def connect(face: Face, broker: RunningBroker, name: str, **options: Any) -> Any:
    return face.connect(broker.address, name, broker.key(name), **options)


def test_client_with_a_codec_gets_values_of_the_types_sent(
    face: Face, broker: RunningBroker
) -> None:
    """Every call that takes a payload uses the codec, and so does the reply."""
    alice = connect(face, broker, "alice", codec=codec_of_shop())
    bob = connect(face, broker, "bob", codec=codec_of_shop())
    events = bob.subscribe("news")
    bob.on_request(lambda request: {"due": request.payload.due, "of": request.payload})
    order = Order(UUID(int=1), date(2026, 1, 2), [Point(1)])

    assert alice.request("bob", order).payload == {"due": order.due, "of": order}
    alice.send("bob", MOMENT)
    alice.send_many([("bob", (1, 2)), ("bob", {3: 4})])
    alice.send_confirmed("bob", Colour.RED)
    alice.send_many_confirmed([("bob", Money(Decimal(1)))])
    alice.publish("news", {1})
    alice.publish_confirmed("news", Decimal(2))

    received = [bob.recv(PATIENCE).payload for _ in range(5)]
    assert received == [MOMENT, (1, 2), {3: 4}, Colour.RED, Money(Decimal(1))]
    assert [events.recv(PATIENCE).payload for _ in range(2)] == [{1}, Decimal(2)]
    with pytest.raises(PayloadError, match="not registered"):
        alice.send("bob", object())


def test_client_without_a_codec_reads_and_writes_plain_json(
    face: Face, broker: RunningBroker
) -> None:
    alice = connect(face, broker, "alice", codec=codec_of_shop())
    bob = connect(face, broker, "bob")
    alice.send("bob", [date(2026, 1, 2), 1])
    assert bob.recv(PATIENCE).payload == [{"$type": "date", "value": "2026-01-02"}, 1]
    with pytest.raises(PayloadError):
        bob.send("alice", (1, 2))
    bob.send("alice", {"a": [1]})
    assert alice.recv(PATIENCE).payload == {"a": [1]}


def test_client_with_fewer_types_keeps_the_body_of_an_unknown_one(
    face: Face, broker: RunningBroker
) -> None:
    alice = connect(face, broker, "alice", codec=codec_of_shop())
    bob = connect(face, broker, "bob", codec=JsonCodec())
    alice.send("bob", Point(1))
    message = bob.recv(PATIENCE)
    with pytest.raises(UndecodablePayload, match="'Point', which is not registered"):
        _ = message.payload
    assert json.loads(message.body)["value"] == {"x": 1, "y": None}


def test_client_with_the_name_of_a_codec_is_refused(face: Face, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="codec takes a JsonCodec, not 'msgpack'"):
        face.connect(str(tmp_path / "broker.sock"), "alice", b"key", codec="msgpack")
