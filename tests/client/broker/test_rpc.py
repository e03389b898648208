"""Calls of another client's methods, on both faces."""

from __future__ import annotations

import asyncio
import builtins
import copy
import inspect
import logging
import pickle
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date
from typing import Any, Protocol

import pytest
from support.client_faces import PATIENCE, Asyncio, Blocking, Face
from support.waiting import until

import brokerd_client
from brokerd.testing import RunningBroker, running
from brokerd_client import JsonCodec, aio, current_request
from brokerd_client.errors import (
    CallFailed,
    InvalidName,
    NoSuchMethod,
    Offline,
    PayloadError,
    RequestFailed,
    TimedOut,
    WrongArguments,
    WrongUse,
)

ENTRIES: dict[str, dict[str, Any]] = {
    "alice": {"connections": 20},
    "bob": {"connections": 4, "in_flight": 1},
    "carol": {},
}


@pytest.fixture(scope="module")
def broker() -> Iterator[RunningBroker]:
    with running(clients=ENTRIES) as broker:
        yield broker


@pytest.fixture(params=[Blocking, Asyncio], ids=["blocking", "asyncio"])
def face(request: pytest.FixtureRequest) -> Iterator[Face]:
    face: Face = request.param()
    yield face
    face.close()


def connect(face: Face, broker: RunningBroker, name: str, **options: Any) -> Any:
    return face.connect(broker.address, name, broker.key(name), **options)


@pytest.fixture
def alice(face: Face, broker: RunningBroker) -> Any:
    return connect(face, broker, "alice")


@pytest.fixture
def bob(face: Face, broker: RunningBroker) -> Any:
    return connect(face, broker, "bob")


class OutOfStock(LookupError):
    """An exception of a service."""


class TwoPartError(Exception):
    """An exception that can't be made of a text alone."""

    def __init__(self, part: str, other: str) -> None:
        super().__init__(part, other)


class Base:
    def inherited(self) -> str:
        return "inherited"


class Calculator(Base):
    """A service; ``calls`` are the names of the methods called."""

    version = "1"

    class Inner:
        pass

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.attribute = lambda: "not served"

    def add(self, a: int, b: int = 10) -> int:
        self.calls.append("add")
        return a + b

    def nothing(self) -> None:
        self.calls.append("nothing")

    def fail(self, name: str, *args: object) -> None:
        own = {"OutOfStock": OutOfStock, "TwoPartError": TwoPartError}
        raise (own.get(name) or getattr(builtins, name))(*args)

    def of(self, *names: str, **values: int) -> list[object]:
        return [list(names), values]

    def pair(self) -> tuple[int, int]:
        return 1, 2

    @staticmethod
    def static() -> str:
        return "static"

    @classmethod
    def of_class(cls) -> str:
        return cls.__name__

    @property
    def secret(self) -> str:
        raise AssertionError("a property is not read")

    def _private(self) -> None:
        raise AssertionError("a private method is not called")


def test_proxy_call_returns_the_result_of_the_method(bob: Any, alice: Any) -> None:
    bob.service(Calculator())
    proxy = alice.proxy("bob")
    assert proxy.add(1) == 11
    assert proxy.add(1, 2) == proxy.add(1, b=2) == proxy.add(b=2, a=1) == 3
    assert proxy.nothing() is None
    assert proxy.of("a", "b", x=1) == [["a", "b"], {"x": 1}]
    assert (proxy.static(), proxy.of_class()) == ("static", "Calculator")


def test_service_class_and_function_are_served_and_returned(
    face: Face, bob: Any, alice: Any
) -> None:
    def double(n: int) -> int:
        return 2 * n

    assert bob.service(Calculator) is Calculator
    assert bob.service(double) is double
    inner = getattr(bob, "_inner", bob)
    assert face.run(lambda: inner.service(methods=["append"])([])) == []
    proxy = alice.proxy("bob")
    assert (proxy.add(1), proxy.double(4), proxy.append(1)) == (11, 8, None)


@pytest.mark.parametrize(
    "name",
    ["nope", "inherited", "attribute", "secret", "version", "Inner", "calls", "pop"],
)
def test_service_without_the_method_raises_no_such_method(bob: Any, alice: Any, name: str) -> None:
    """Only public methods that the body of the class defines are served."""
    bob.service(Calculator())
    with pytest.raises(NoSuchMethod, match=f"'{name}'; this service has add, ") as caught:
        getattr(alice.proxy("bob"), name)()
    assert (caught.value.code, caught.value.name) == ("no_such_method", bob.address)


def test_service_with_listed_methods_serves_those_alone(bob: Any, alice: Any) -> None:
    bob.service(Calculator(), methods=["inherited", "nothing"])
    proxy = alice.proxy("bob")
    assert (proxy.inherited(), proxy.nothing()) == ("inherited", None)
    with pytest.raises(NoSuchMethod, match="this service has inherited, nothing"):
        proxy.add(1)


@pytest.mark.parametrize(
    ("args", "kwargs", "text"),
    [
        ((), {}, "missing a required argument: 'a'"),
        ((1, 2, 3), {}, "too many positional arguments"),
        ((1,), {"c": 1}, "unexpected keyword argument 'c'"),
        ((1,), {"a": 1}, "multiple values for argument 'a'"),
    ],
)
def test_method_with_wrong_arguments_is_not_called(
    bob: Any, alice: Any, args: tuple[Any, ...], kwargs: dict[str, Any], text: str
) -> None:
    calculator = bob.service(Calculator())
    with pytest.raises(WrongArguments, match=rf"add\(\): .*{text}") as caught:
        alice.proxy("bob").add(*args, **kwargs)
    assert isinstance(caught.value, TypeError)
    assert calculator.calls == []


@pytest.mark.parametrize(
    ("cls", "args", "text"),
    [
        (ValueError, ("too large",), "too large"),
        (KeyError, ("x",), "'x'"),
        (FileNotFoundError, (2, "No such file"), "[Errno 2] No such file"),
        (ConnectionError, (), ""),
        (TypeError, ("inside: twice",), "inside: twice"),
    ],
)
def test_builtin_exception_of_a_method_is_raised_as_its_type(
    bob: Any, alice: Any, cls: type[Exception], args: tuple[Any, ...], text: str
) -> None:
    bob.service(Calculator())
    with pytest.raises(cls) as caught:
        alice.proxy("bob").fail(cls.__name__, *args)
    assert type(caught.value) is cls
    assert str(caught.value) == text
    assert isinstance(caught.value.__cause__, RequestFailed)
    assert caught.value.__cause__.name == bob.address


def test_exception_that_the_caller_names_is_raised_as_its_type(bob: Any, alice: Any) -> None:
    bob.service(Calculator())
    with pytest.raises(OutOfStock, match="no more"):
        alice.proxy("bob", raises=[OutOfStock]).fail("OutOfStock", "no more")


@pytest.mark.parametrize(
    ("name", "args", "text"),
    [
        ("OutOfStock", ["no more"], "no more"),
        ("TwoPartError", ["a", "b"], "('a', 'b')"),
        ("UnicodeError", ["utf-8: bad"], "utf-8: bad"),
        ("StopAsyncIteration", ["x"], "x"),
    ],
)
def test_other_exception_of_a_method_is_call_failed(
    bob: Any, alice: Any, name: str, args: list[object], text: str
) -> None:
    """The caller does not know the class, can't make it of a text, or must not raise it."""
    bob.service(Calculator())
    proxy = alice.proxy("bob", raises=[TwoPartError])
    if name == "UnicodeError":
        with pytest.raises(UnicodeError):
            proxy.fail(name, *args)
        return
    with pytest.raises(CallFailed) as caught:
        proxy.fail(name, *args)
    error = caught.value
    assert (error.type_name, error.text, error.code) == (name, text, "raised")
    assert isinstance(error, RequestFailed)
    again = pickle.loads(pickle.dumps(error))
    assert (again.type_name, again.text) == (name, text)


def test_exception_with_a_long_text_is_cut(bob: Any, alice: Any) -> None:
    bob.service(Calculator())
    with pytest.raises(ValueError, match=r"^x{10000}$"):
        alice.proxy("bob").fail("ValueError", "x" * 100_000)


def test_exception_of_a_method_is_logged_unless_the_service_declares_it(
    bob: Any, alice: Any, caplog: pytest.LogCaptureFixture
) -> None:
    bob.service(Calculator(), raises=[OutOfStock])
    proxy = alice.proxy("bob", raises=[OutOfStock])
    with caplog.at_level(logging.INFO, "brokerd_client"):
        with pytest.raises(OutOfStock):
            proxy.fail("OutOfStock", "no more")
        assert proxy.add(1) == 11
        assert caplog.records == []
        with pytest.raises(ValueError, match="secret"):
            proxy.fail("ValueError", "secret")
        until(lambda: caplog.records)
    (record,) = caplog.records
    assert record.exc_info is not None
    assert isinstance(record.exc_info[1], ValueError)


def test_arguments_that_json_would_change_are_not_sent(bob: Any, alice: Any) -> None:
    calculator = bob.service(Calculator())
    with pytest.raises(PayloadError):
        alice.proxy("bob").add((1, 2))
    with pytest.raises(PayloadError):
        alice.proxy("bob").add(object())
    assert calculator.calls == []


def test_result_that_json_would_change_is_call_failed(bob: Any, alice: Any) -> None:
    bob.service(Calculator())
    with pytest.raises(CallFailed, match=r"PayloadError: .* a tuple would become a list"):
        alice.proxy("bob").pair()


@dataclass
class Order:
    due: date
    parts: tuple[int, ...] = ()


def test_call_between_clients_with_a_codec_carries_its_types(
    face: Face, broker: RunningBroker
) -> None:
    codec = JsonCodec()
    codec.register(Order)
    bob = connect(face, broker, "bob", codec=codec)
    alice = connect(face, broker, "alice", codec=codec)

    def place(order: Order, *, on: date) -> tuple[Order, date]:
        assert isinstance(order, Order)
        return order, on

    bob.service(place)
    order = Order(date(2026, 1, 2), (1, 2))
    assert alice.proxy("bob").place(order, on=order.due) == (order, order.due)


@pytest.mark.parametrize(
    "payload", [[], {}, None, [1, {}], [[], []], [[1], {}, 3], ["ab", {}], {"a": [], "b": {}}]
)
def test_call_with_another_payload_has_wrong_arguments(
    bob: Any, alice: Any, payload: object
) -> None:
    bob.service(Calculator())
    with pytest.raises(RequestFailed, match=r"\[\[argument, ...\], ") as caught:
        alice.request("bob", payload, extension={"rpc.method": "add"})
    assert caught.value.code == "wrong_arguments"


def test_call_with_an_unreadable_payload_has_wrong_arguments(bob: Any, alice: Any) -> None:
    bob.service(Calculator())
    with pytest.raises(RequestFailed, match="pickled") as caught:
        alice.request("bob", [[1], {}], codec="pickle", extension={"rpc.method": "add"})
    assert caught.value.code == "wrong_arguments"


@pytest.mark.parametrize("name", [1, None, ["add"], "", "_private", "__class__", "add.__call__"])
def test_call_of_what_is_no_method_name_is_no_such_method(
    bob: Any, alice: Any, name: object
) -> None:
    bob.service(Calculator())
    with pytest.raises(RequestFailed) as caught:
        alice.request("bob", [[], {}], extension={"rpc.method": name})
    assert caught.value.code == "no_such_method"


def test_plain_request_to_a_service_reaches_the_request_handler(bob: Any, alice: Any) -> None:
    bob.service(Calculator())
    bob.on_request(lambda request: ["plain", request.payload])
    assert alice.request("bob", 1).payload == ["plain", 1]
    assert alice.request("bob", 1, extension={"other": "add"}).payload == ["plain", 1]
    assert alice.proxy("bob").add(1) == 11


def test_plain_request_to_a_service_without_a_handler_is_received(
    bob: Any, broker: RunningBroker
) -> None:
    bob.service(Calculator())
    with brokerd_client.connect(broker.address, "alice", broker.key("alice")) as requester:
        with ThreadPoolExecutor(1) as executor:
            answer = executor.submit(requester.request, "bob", "plain")
            bob.recv(PATIENCE).reply("received")
            assert answer.result(PATIENCE).payload == "received"
        assert requester.proxy("bob").add(1) == 11


def test_proxy_of_a_client_without_a_service_gets_its_handlers_answer(bob: Any, alice: Any) -> None:
    def handle(request: Any) -> object:
        if request.payload[0]:
            raise ValueError
        return request.extension["rpc.method"]

    bob.on_request(handle)
    assert alice.proxy("bob").add() == "add"
    with pytest.raises(RequestFailed, match="handler failed: ValueError") as caught:
        alice.proxy("bob").add(1)
    assert caught.value.code == "failed"


def test_call_that_came_before_the_service_is_served(bob: Any, broker: RunningBroker) -> None:
    with (
        brokerd_client.connect(broker.address, "alice", broker.key("alice")) as caller,
        ThreadPoolExecutor(1) as executor,
    ):
        result = executor.submit(caller.proxy("bob").add, 1)
        until(lambda: bob._inbox.inbox.items)
        bob.service(Calculator())
        assert result.result(PATIENCE) == 11


class Slow:
    """A service whose method works until it may finish."""

    def __init__(self) -> None:
        self.may_finish = threading.Event()
        self.begun: list[Any] = []
        self.cancelled: list[Any] = []

    def work(self, n: int) -> int:
        request = current_request()
        self.begun.append(n)
        until(lambda: self.may_finish.is_set() or request.cancelled)
        if request.cancelled:
            self.cancelled.append(n)
        return n


class SlowTasks(Slow):
    """The same with coroutines."""

    async def work(self, n: int) -> int:  # type: ignore[override]
        self.begun.append(n)
        try:
            while not self.may_finish.is_set():  # noqa: ASYNC110 - set in another thread
                await asyncio.sleep(0.005)
        except asyncio.CancelledError:
            self.cancelled.append(n)
            raise
        return n


def slow_service(face: Face, client: Any) -> Slow:
    service = SlowTasks() if isinstance(face, Asyncio) else Slow()
    client.service(service)
    return service


def test_call_that_times_out_is_cancelled_in_its_method(face: Face, bob: Any, alice: Any) -> None:
    service = slow_service(face, bob)
    with pytest.raises(TimedOut):
        alice.proxy("bob", timeout=3).work(1)
    until(lambda: service.cancelled == [1])
    service.may_finish.set()
    assert alice.proxy("bob", timeout=PATIENCE).work(2) == 2


def test_calls_to_a_pool_go_to_whichever_member_is_free(
    face: Face, broker: RunningBroker, bob: Any
) -> None:
    other = connect(face, broker, "bob")
    slow, quick = slow_service(face, bob), slow_service(face, other)
    quick.may_finish.set()
    with (
        brokerd_client.connect(broker.address, "alice", broker.key("alice")) as caller,
        ThreadPoolExecutor(8) as executor,
    ):
        proxy = caller.proxy("bob", timeout=PATIENCE)
        results = [executor.submit(proxy.work, n) for n in range(7)]
        until(lambda: sum(result.done() for result in results) == 6)
        until(lambda: len(slow.begun) == 1)
        slow.may_finish.set()
        assert sorted(result.result(PATIENCE) for result in results) == list(range(7))
        assert caller.proxy(other.address).work(8) == 8
        assert 8 in quick.begun


def test_drain_finishes_the_call_that_runs(face: Face, broker: RunningBroker, bob: Any) -> None:
    service = slow_service(face, bob)
    with (
        brokerd_client.connect(broker.address, "alice", broker.key("alice")) as caller,
        ThreadPoolExecutor(2) as executor,
    ):
        result = executor.submit(caller.proxy("bob", timeout=PATIENCE).work, 1)
        until(lambda: service.begun == [1])
        drained = executor.submit(bob.drain, PATIENCE)
        service.may_finish.set()
        assert (result.result(PATIENCE), drained.result(PATIENCE)) == (1, True)
        with pytest.raises(Offline):
            caller.proxy("bob").work(2)


def test_current_request_is_the_one_that_calls(bob: Any, alice: Any) -> None:
    def caller() -> list[Any]:
        request = current_request()
        return [request.sender, request.deadline is not None, request.cancelled]

    bob.service(caller)
    assert alice.proxy("bob", timeout=PATIENCE).caller() == [alice.address, True, False]
    assert alice.proxy("bob", timeout=None).caller() == [alice.address, False, False]
    with pytest.raises(WrongUse, match="no current request"):
        current_request()


def test_method_that_answers_itself_is_not_answered_again(bob: Any, alice: Any) -> None:
    def refuse() -> Any:
        request: Any = current_request()
        return request.fail("not today", "closed")

    bob.service(refuse)
    with pytest.raises(RequestFailed, match="not today") as caught:
        alice.proxy("bob").refuse()
    assert caught.value.code == "closed"


def test_exit_in_a_method_of_a_blocking_client_is_call_failed(broker: RunningBroker) -> None:
    def leave() -> None:
        raise SystemExit(3)

    with broker.connect("carol") as carol, broker.connect("alice") as alice:
        carol.service(leave)
        with pytest.raises(CallFailed, match="SystemExit: 3"):
            alice.proxy("carol").leave()


# Proxies


class CalculatorCalls(Protocol):
    def add(self, a: int, b: int = 10) -> int: ...

    def missing(self) -> None: ...


class CalculatorTasks(Protocol):
    async def add(self, a: int, b: int = 10) -> int: ...


def test_proxy_with_an_interface_has_its_type(broker: RunningBroker) -> None:
    """The type checker would report an ignored error that is none."""
    with broker.connect("carol") as carol, broker.connect("alice") as alice:
        carol.service(Calculator)
        proxy = alice.proxy("carol", CalculatorCalls)
        result: int = proxy.add(1)
        assert result == 11
        with pytest.raises(AttributeError, match="CalculatorCalls has no method 'ad'"):
            proxy.ad(1)  # type: ignore[attr-defined]
        with pytest.raises(TypeError):
            proxy.add("1")  # type: ignore[arg-type]
        with pytest.raises(NoSuchMethod):
            proxy.missing()
        assert alice.proxy("carol", Calculator).add(2) == 12


def test_aio_proxy_with_an_interface_has_its_type(broker: RunningBroker) -> None:
    async def main() -> int:
        async with (
            aio.connect(broker.address, "alice", broker.key("alice")) as alice,
            aio.connect(broker.address, "carol", broker.key("carol")) as carol,
        ):
            carol.service(Calculator)
            result: int = await alice.proxy("carol", CalculatorTasks).add(1)
            return result

    assert asyncio.run(main()) == 11


def test_proxy_has_no_private_attributes(alice: Any) -> None:
    proxy = alice.proxy("bob")
    inner = getattr(proxy, "_inner", proxy)
    with pytest.raises(AttributeError, match="not public"):
        _ = inner._private
    assert not hasattr(inner, "__len__")
    assert repr(copy.copy(inner)) == repr(inner) == "<Proxy of 'bob'>"


def test_proxy_of_an_invalid_address_is_refused(alice: Any) -> None:
    with pytest.raises(InvalidName):
        alice.proxy("no such name")


@pytest.mark.parametrize("raises", [[BaseException], ["OutOfStock"], [OutOfStock("x")]])
def test_proxy_and_service_with_other_raises_are_refused(
    bob: Any, alice: Any, raises: list[Any]
) -> None:
    with pytest.raises(TypeError, match="classes of exceptions"):
        alice.proxy("bob", raises=raises)
    with pytest.raises(TypeError, match="classes of exceptions"):
        bob.service(Calculator(), raises=raises)


# What can be served


class Empty(Base):
    pass


@pytest.mark.parametrize(
    ("target", "methods", "error", "text"),
    [
        (Empty(), None, TypeError, "no public method of its own"),
        (5, ["nope"], TypeError, "has no method 'nope'"),
        (Calculator(), ["calls"], TypeError, "has no method 'calls'"),
        (Calculator(), ["Inner"], TypeError, "has no method 'Inner'"),
        (Calculator(), ["_private"], ValueError, "public name"),
        (Calculator(), "add", TypeError, "give a list"),
        (Calculator(), [], TypeError, "no public method"),
        (lambda: None, None, ValueError, "public name"),
    ],
)
def test_service_of_what_has_no_such_method_is_refused(
    bob: Any, target: object, methods: Any, error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        bob.service(target, methods=methods)


def test_service_method_of_a_name_served_already_is_refused(bob: Any, alice: Any) -> None:
    bob.service(Calculator(), methods=["add"])
    with pytest.raises(ValueError, match="'add' is served already"):
        bob.service(Calculator())
    with pytest.raises(NoSuchMethod):
        alice.proxy("bob").nothing()


def test_coroutine_function_is_served_by_the_asyncio_client_alone(
    face: Face, bob: Any, alice: Any
) -> None:
    async def later(n: int) -> int:
        await asyncio.sleep(0)
        return n

    if isinstance(face, Asyncio):
        bob.service(later)
        assert alice.proxy("bob").later(3) == 3
    else:
        with pytest.raises(TypeError, match="connect an asyncio client"):
            bob.service(later)


def test_service_and_proxy_have_the_same_form_in_both_faces() -> None:
    for name in ("service", "proxy"):
        blocking = inspect.signature(getattr(brokerd_client.Client, name))
        other = inspect.signature(getattr(aio.Client, name))
        assert list(blocking.parameters) == list(other.parameters)
