"""Commands that carry payloads: send, request, listen, publish, subscribe."""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, Final, TypeVar

import click
from rich.console import Console
from rich.progress import Progress

import brokerd_client
from brokerd.ctl.command import DEFAULT_TIMEOUT_S, Access, connecting
from brokerd.ctl.names import complete_name
from brokerd.ctl.output import message_object, note, print_json, print_message, print_payload
from brokerd.ctl.seconds import Seconds
from brokerd.ctl.status import Failure, Status, ended_by_ctrl_c, failure_of
from brokerd_client.errors import BrokerdError, Closed, Disconnected, TimedOut
from brokerd_client.wire.envelope import MAX_TTL, Kind

__all__ = ["COMMANDS"]

#: Limits the messages sent with one system call and awaited together.
_BATCH: Final = 256

_Function = TypeVar("_Function", bound=Callable[..., Any])


def _payload_options(function: _Function) -> _Function:
    for option in (
        click.option(
            "--ttl",
            type=Seconds(min=0, max=MAX_TTL),
            help="Seconds in which it may be delivered.",
        ),
        click.option(
            "--codec",
            type=click.Choice(["raw", "json"]),
            default="raw",
            show_default=True,
            help="raw: bytes, sent unchanged. json: JSON, which is checked.",
        ),
        click.argument("payload", required=False),
    ):
        function = option(function)
    return function


def _incoming_options(function: _Function) -> _Function:
    for option in (
        click.option("--raw", is_flag=True, help="Write only the payloads' bytes."),
        click.option("--json", "as_json", is_flag=True, help="Print one JSON object per line."),
        click.option(
            "--reconnect",
            is_flag=True,
            help="Connect again when the connection ends, instead of exiting.",
        ),
        click.option("--timeout", type=Seconds(min=0), help="Time limit in seconds."),
        click.option(
            "--count", type=click.IntRange(min=1), help="Exit after this number of messages."
        ),
    ):
        function = option(function)
    return function


def _timeout_option(default: float) -> Callable[[_Function], _Function]:
    return click.option(
        "--timeout",
        type=Seconds(min=0),
        default=default,
        show_default=True,
        help="Time limit in seconds.",
    )


def _read_payload(payload: str | None) -> bytes:
    """Return the argument's bytes, or the standard input if it is missing or "-"."""
    if payload is not None and payload != "-":
        return payload.encode(errors="surrogateescape")
    if payload is None and sys.stdin.isatty():
        raise click.UsageError("give a payload, or - to type one, or pipe one in")
    return sys.stdin.buffer.read()


def _encode(payload: bytes, codec: str) -> Any:
    """Return the value for the library to send.

    Raises click.BadParameter for invalid JSON.
    """
    if codec == "raw":
        return payload
    try:
        return json.loads(payload)
    except ValueError as error:
        raise click.BadParameter(
            f"the payload is not valid JSON: {error}", param_hint="--codec json"
        ) from error


@click.command()
@click.argument("to", shell_complete=complete_name)
@_payload_options
@click.option("--lines", is_flag=True, help="Send each line of the input as one message.")
@click.option("--receipt", is_flag=True, help="Print a line when the broker has accepted it.")
@_timeout_option(DEFAULT_TIMEOUT_S)
@connecting
@click.pass_obj
def send(
    access: Access,
    to: str,
    payload: str | None,
    codec: str,
    ttl: float | None,
    lines: bool,
    receipt: bool,
    timeout: float,
) -> None:
    """Send a message to the client TO, and wait until the broker has accepted it.

    PAYLOAD is read from the standard input if it is missing or "-".
    """
    if lines:
        if payload not in (None, "-"):
            raise click.UsageError("--lines reads the standard input; omit PAYLOAD")
        if ttl is not None:
            raise click.UsageError("--lines and --ttl can't be used together")
        bodies = [_encode(line, codec) for line in _read_payload(payload).splitlines()]
        with access.connect(timeout=timeout) as client:
            _send_many(client, to, bodies, codec, timeout)
        accepted = f"{len(bodies)} messages"
    else:
        body = _encode(_read_payload(payload), codec)
        with access.connect(timeout=timeout) as client:
            client.send_confirmed(to, body, codec=codec, ttl=ttl, timeout=timeout)
        accepted = "1 message"
    if receipt:
        click.echo(f"the broker has accepted {accepted} for {to}")


def _send_many(
    client: brokerd_client.Client, to: str, bodies: list[Any], codec: str, timeout: float
) -> None:
    failed: list[BrokerdError] = []
    with Progress(
        console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()
    ) as progress:
        task = progress.add_task("sending", total=len(bodies))
        for start in range(0, len(bodies), _BATCH):
            batch = bodies[start : start + _BATCH]
            outcomes = client.send_many_confirmed(
                [(to, body) for body in batch], codec=codec, timeout=timeout
            )
            failed += [outcome for outcome in outcomes if isinstance(outcome, BrokerdError)]
            progress.advance(task, len(batch))
    if failed:
        first = failure_of(failed[0])
        raise Failure(
            Status(first.exit_code),
            f"{len(failed)} of {len(bodies)} not sent; the first: {first.message}",
        )


@click.command()
@click.argument("to", shell_complete=complete_name)
@_payload_options
@_timeout_option(30.0)
@click.option("--json", "as_json", is_flag=True, help="Print the reply as a JSON object.")
@click.option("--raw", is_flag=True, help="Write only the reply's bytes.")
@connecting
@click.pass_obj
def request(
    access: Access,
    to: str,
    payload: str | None,
    codec: str,
    ttl: float | None,
    timeout: float,
    as_json: bool,
    raw: bool,
) -> None:
    """Send a request to the client TO and print its reply.

    PAYLOAD is read from the standard input if it is missing or "-".
    """
    body = _encode(_read_payload(payload), codec)
    with access.connect() as client:
        reply = client.request(to, body, timeout=timeout, codec=codec, ttl=ttl)
    if as_json:
        print_json(message_object(reply))
    else:
        print_payload(reply, raw=raw)


@click.command()
@_incoming_options
@click.option("--reply", help="Answer every request with this text.")
@connecting
@click.pass_obj
def listen(
    access: Access,
    count: int | None,
    timeout: float | None,
    reconnect: bool,
    as_json: bool,
    raw: bool,
    reply: str | None,
) -> None:
    """Print the messages and requests that arrive, until Ctrl-C.

    With --count, the command fails if fewer arrive before the time limit or Ctrl-C. A
    request is answered with the text of --reply, or with an error without one. A
    message of the client's mailbox is acknowledged, and so deleted, once it is printed;
    `mailbox show` shows messages without that.
    """
    with ended_by_ctrl_c(count is None), access.connect(reconnect=reconnect) as client:
        if not reconnect:
            _check_mailbox(client)
        note(f"listening as {client.address}; Ctrl-C ends it")
        for message in _arriving(client.recv, count, timeout):
            if message.kind is Kind.REQUEST:
                if reply is not None:
                    message.reply(reply.encode(errors="surrogateescape"), codec="raw")
                else:
                    message.fail(
                        "this client does not answer requests: it was started without --reply"
                    )
            print_message(message, as_json=as_json, raw=raw)
            if message.seq:
                # Unacknowledged, a window of them would be all that ever comes.
                message.done()


def _check_mailbox(client: brokerd_client.Client) -> None:
    """Raise Failure if the client's mailbox is at another host."""
    told = client.whoami()
    home = told["limits"].get("home")
    if home is not None:
        raise Failure(
            Status.REFUSED,
            f"the mailbox of {client.name} is at host {home}, and this is host {told['host']}:"
            f" connect to host {home}, or give --reconnect to be led there",
        )


@click.command()
@click.argument("topic")
@_payload_options
@_timeout_option(DEFAULT_TIMEOUT_S)
@connecting
@click.pass_obj
def publish(
    access: Access, topic: str, payload: str | None, codec: str, ttl: float | None, timeout: float
) -> None:
    """Publish an event on TOPIC, and wait until the broker has accepted it.

    PAYLOAD is read from the standard input if it is missing or "-".
    """
    body = _encode(_read_payload(payload), codec)
    with access.connect(timeout=timeout) as client:
        client.publish_confirmed(topic, body, codec=codec, ttl=ttl, timeout=timeout)


@click.command()
@click.argument("pattern")
@_incoming_options
@click.option("--group", help="Share the events among the members of this group.")
@connecting
@click.pass_obj
def subscribe(
    access: Access,
    pattern: str,
    count: int | None,
    timeout: float | None,
    reconnect: bool,
    as_json: bool,
    raw: bool,
    group: str | None,
) -> None:
    """Print the events on the topics that PATTERN matches, until Ctrl-C.

    In PATTERN, * stands for one token and a final > for one or more.
    """
    with (
        ended_by_ctrl_c(count is None),
        access.connect(reconnect=reconnect) as client,
        client.subscribe(pattern, group=group) as subscription,
    ):
        note(f"subscribed to {pattern}; Ctrl-C ends it")
        for message in _arriving(subscription.recv, count, timeout):
            print_message(message, as_json=as_json, raw=raw)


def _arriving(
    receive: Callable[..., Any], count: int | None, timeout: float | None
) -> Iterator[Any]:
    """Yield received messages, at most ``count``, for at most ``timeout`` seconds.

    Raises Failure if fewer than ``count`` have arrived at the end of the time. Without
    a count, the end of the time is the normal end. Also raises Failure if the
    connection to the broker ends.
    """
    deadline = None if timeout is None else time.monotonic() + timeout
    for arrived in itertools.count():
        if arrived == count:
            return
        try:
            message = receive(
                timeout=None if deadline is None else max(0.0, deadline - time.monotonic())
            )
        except TimedOut as error:
            if count is None:
                return
            raise Failure(
                Status.TIMED_OUT, f"timed out: {arrived} of {count} arrived in {timeout} s"
            ) from error
        except (Disconnected, Closed) as error:
            ended = failure_of(error)
            raise Failure(
                Status(ended.exit_code), f"{ended.message} (--reconnect waits for it)"
            ) from error
        yield message


COMMANDS: Final = (send, request, listen, publish, subscribe)
