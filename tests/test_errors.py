"""The exception tree: its docstring, the class of each code, and pickling."""

from __future__ import annotations

import inspect
import multiprocessing
import pickle
import re

import pytest

from brokerd_client import errors
from brokerd_client.errors import (
    BrokerdError,
    FrameTooBig,
    InDoubt,
    MalformedEnvelope,
    Refused,
    RequestFailed,
    refusal,
)
from brokerd_client.wire.envelope import ErrorCode

CLASSES = {
    name: value
    for name, value in vars(errors).items()
    if inspect.isclass(value)
    and issubclass(value, BaseException)
    and value.__module__ == errors.__name__
}


def documented_tree() -> dict[str, tuple[str, str]]:
    """Return class name to (its parent's name, the other base in parentheses or "") as
    the docstring draws it.
    """
    assert errors.__doc__ is not None
    drawing = errors.__doc__.partition("::\n")[2].partition("No exception ever")[0]
    tree: dict[str, tuple[str, str]] = {}
    path: list[tuple[int, str]] = []
    for line in drawing.splitlines():
        match = re.match(r"(?P<indent>[\s│├└─]*)(?P<rest>\w.*)", line)
        if match is None:
            continue
        depth = len(match["indent"])
        # Names that share a line are apart by two spaces; the text behind one begins in
        # lower case or "(".
        names = re.match(r"(?:[A-Z]\w+(?:\s\s|$))+|[A-Z]\w+", match["rest"])
        assert names is not None, line
        base = re.search(r"\((?P<base>[\w.]+)\)", match["rest"])
        while path and path[-1][0] >= depth:
            path.pop()
        parent = path[-1][1] if path else "Exception"
        for name in names.group().split():
            tree[name] = (parent, base["base"] if base else "")
        path.append((depth, names.group().split()[0]))
    return tree


def test_errors_docstring_tree_equals_classes() -> None:
    """The docstring shows every class under its real parent and with its other base. It
    shows no other class.
    """
    real = {
        name: (
            cls.__bases__[0].__name__,
            "" if len(cls.__bases__) == 1 else cls.__bases__[1].__name__,
        )
        for name, cls in CLASSES.items()
    }

    assert {
        name: (parent, base.rpartition(".")[2])
        for name, (parent, base) in documented_tree().items()
    } == real


def test_errors_all_names_every_class() -> None:
    """__all__ names every class, and nothing else."""
    assert set(errors.__all__) == set(CLASSES)


def test_errors_are_caught_by_standard_library_handlers() -> None:
    """Code written for multiprocessing.connection continues to work."""
    assert issubclass(errors.AuthenticationError, multiprocessing.AuthenticationError)
    assert issubclass(errors.BufferTooShort, multiprocessing.BufferTooShort)
    assert issubclass(errors.TimedOut, TimeoutError)
    assert issubclass(errors.Disconnected, ConnectionError)
    assert issubclass(errors.AddressError, ValueError)


@pytest.mark.parametrize("code", ErrorCode)
def test_error_code_has_one_class(code: ErrorCode) -> None:
    """An error code of the wire becomes the exception that carries it. No other code
    becomes that exception.
    """
    error = refusal(code, "why", name="bob", message_id=7)

    assert type(error) is not RequestFailed
    assert type(error).code == code
    assert (str(error), error.code, error.name, error.message_id) == ("why", code, "bob", 7)


def test_error_classes_equal_error_codes() -> None:
    """Refused has one subclass per code, and RequestFailed for a client's own codes."""
    codes = {cls.code for cls in Refused.__subclasses__() if cls is not RequestFailed}

    assert codes == set(ErrorCode)


def test_error_code_of_client_is_request_failed() -> None:
    """An error code that another client chose is passed on in RequestFailed."""
    error = refusal("out_of_paper", "tray 2", name="printer")

    assert type(error) is RequestFailed
    assert (error.code, str(error), error.name) == ("out_of_paper", "tray 2", "printer")
    assert RequestFailed("no").code == "failed"


SAMPLES = {
    "FrameTooBig": FrameTooBig(300, 256),
    "MalformedEnvelope": MalformedEnvelope("no", message_id=7),
    "RequestFailed": RequestFailed("no", name="bob", message_id=7, code="own"),
    "InDoubt": InDoubt("no", message_id=7),
}


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_error_pickled_arrives_unchanged(name: str) -> None:
    """An error raised in a worker process arrives unchanged in its parent."""
    error = SAMPLES.get(name) or CLASSES[name]("reason")

    copy = pickle.loads(pickle.dumps(error))

    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert vars(copy) == vars(error)
    assert isinstance(copy, BrokerdError)
