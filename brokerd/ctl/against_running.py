"""`brokerd check --against-running`: asks the running broker what a reload would
change.

The request comes from the client named by BROKERD_ADDRESS, BROKERD_NAME and
BROKERD_KEY_FILE in the environment. Without them, it comes from an administrator in the
configuration, with that client's key, at one of the configured listeners.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import brokerd_client
from brokerd.ctl.command import DEFAULT_TIMEOUT_S, Access
from brokerd.ctl.status import Failure, Status, failure_of
from brokerd.ctl.tls import context_of
from brokerd_client.errors import BrokerdError

__all__ = ["Administrator", "ask_for_plan"]

#: Limits the administrators tried per address. With a limit of one connection each,
#: some may be connected already.
_TRIES = 8


@dataclass(frozen=True, slots=True)
class Administrator:
    """A client with ``admin: true``.

    key: None if the user id identifies the client; neither str nor repr shows it.
    """

    name: str
    key: bytes | None = field(repr=False)


def ask_for_plan(
    config: str,
    addresses: Iterable[str],
    administrators: Iterable[Administrator],
    environ: Mapping[str, str],
) -> dict[str, Any]:
    """Return the running broker's answer to a dry run of a reload.

    Args:
        config: The main file, which must be the broker's.
        addresses, administrators: From it.

    Raises Failure if no broker answers, if it refuses, or if it reads another file.
    """
    try:
        with _connected(list(addresses), list(administrators), environ) as client:
            answer = client.control("reload", timeout=DEFAULT_TIMEOUT_S, dry_run=True)
    except BrokerdError as error:
        raise failure_of(error) from error
    if os.path.realpath(str(answer.get("config"))) != os.path.realpath(config):
        raise Failure(
            Status.USAGE,
            f"the running broker reads {answer.get('config')}, not {config} (check that file, or"
            " ask another)",
        )
    return answer


def _connected(
    addresses: list[str], administrators: list[Administrator], environ: Mapping[str, str]
) -> brokerd_client.Client:
    address = environ.get("BROKERD_ADDRESS")
    if environ.get("BROKERD_KEY_FILE") or environ.get("BROKERD_NAME"):
        return Access(address=address or next(iter(addresses), None)).connect()
    if not administrators:
        raise Failure(
            Status.USAGE,
            "no client is given to ask the running broker as (set BROKERD_NAME and"
            " BROKERD_KEY_FILE, or give a client admin: true)",
        )
    failures = []
    for target in [address] if address else addresses:
        for administrator in administrators[:_TRIES]:
            try:
                context = context_of(target, None, None, None)
                return brokerd_client.connect(
                    target,
                    administrator.name,
                    administrator.key,
                    timeout=DEFAULT_TIMEOUT_S,
                    reconnect=False,
                    ssl=context,
                )
            except (BrokerdError, OSError) as error:
                failures.append(f"{administrator.name} at {target}: {error}")
    tried = "\n".join(failures)
    raise Failure(
        Status.UNREACHABLE, f"no broker accepts an administrator of this configuration:\n{tried}"
    )
