"""The commands to type after a client was added or removed, so that they work as printed."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from pathlib import Path

from brokerd.config.admin_user import local_admin
from brokerd.config.model import Config
from brokerd.config.text_files import DEFAULT_CONFIG
from brokerd_client.settings import DEFAULT_ADDRESS

__all__ = ["command_of", "reload_command"]


def reload_command(config: Config, without: str, environ: Mapping[str, str]) -> str:
    """Return the command that makes the broker read the configuration.

    without: the client that the running broker does not know, or not for long.
    """
    if environ.get("BROKERD_NAME") or environ.get("BROKERD_KEY_FILE"):
        return "brokerctl reload"
    if hasattr(os, "geteuid"):
        admin = local_admin(config.path, environ, os.geteuid())
        if admin is not None and admin.name != without:
            file = os.path.abspath(config.path)  # noqa: PTH100 - as written
            is_default = file == (environ.get("BROKERD_CONFIG") or DEFAULT_CONFIG)
            return f"{'' if is_default else f'BROKERD_CONFIG={shlex.quote(file)} '}brokerctl reload"
    admins = [each for each in config.clients.values() if each.admin and each.name != without]
    for client in admins:
        for key in client.keys:
            kind, _, path = key.source.partition(" ")
            if kind == "key_file":
                return command_of(config, client.name, Path(path), "reload")
    if admins:
        return "brokerctl reload"
    return "systemctl reload brokerd (or send SIGHUP to the broker: no client has admin: true)"


def command_of(config: Config, name: str, key: Path, command: str) -> str:
    """Return a command of ``brokerctl`` as this client, at the first address."""
    address = _address(config)
    return " ".join(
        [
            *([f"BROKERD_ADDRESS={shlex.quote(address)}"] if address != DEFAULT_ADDRESS else []),
            f"BROKERD_NAME={name}",
            f"BROKERD_KEY_FILE={shlex.quote(str(key.absolute()))}",
            f"brokerctl {command}",
        ]
    )


def _address(config: Config) -> str:
    """Return the first Unix socket, or else the first address; the default at port 0."""
    for entry in config.listen:
        if entry.address.is_file:
            return os.path.abspath(entry.address.path)  # noqa: PTH100 - as written
    entry = config.listen[0]
    if entry.address.family in ("AF_INET", "AF_INET6") and not entry.address.port:
        return DEFAULT_ADDRESS
    return f"{'tls://' if entry.tls is not None else ''}{entry.address}"
