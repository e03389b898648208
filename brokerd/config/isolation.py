"""Isolates a configuration from its machine, so that a test can run a broker with it.

Addresses, keys and users belong to the machine that the configuration is for. Here they
are replaced before the entries are validated. Everything else stays: rules, quotas,
pools and limits.
"""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from brokerd.config.key_files import new_key
from brokerd.config.model import KEY_FIELDS
from brokerd_client.address import parse
from brokerd_client.errors import AddressError

__all__ = ["Isolation"]

#: Lets the system choose a port that only this machine can reach.
_FREE_PORT: Final = "127.0.0.1:0"


class Isolation:
    """The addresses and keys that replace those of a configuration's machine.

    Attributes:
        clients: Further clients by name; they replace clients of the files.
        addresses: The addresses in use, in the order of the ``listen`` entries; empty
            until the broker listens.
        monitor: The monitor's address in use, or "".

    Args:
        directory: Holds the sockets.
        tls: The part ``tls`` for every ``listen`` entry that has one, or None.
        limits: Limits that replace those of the main file.
    """

    def __init__(
        self,
        directory: Path,
        *,
        tls: Mapping[str, Any] | None = None,
        limits: Mapping[str, Any] | None = None,
    ) -> None:
        self.clients: dict[str, Mapping[str, Any]] = {}
        self.addresses: list[str] = []
        self.monitor = ""
        self._directory = directory
        self._tls = None if tls is None else dict(tls)
        self._limits = dict(limits or {})
        self._keys: dict[str, bytes] = {}
        self._listeners = 0

    @property
    def state_directory(self) -> str:
        """The directory of the mailboxes."""
        return str(self._directory / "store")

    def begin(self) -> None:
        """Begin to read the configuration, from its first file."""
        self._listeners = 0

    def isolate(self, root: dict[str, Any], base: str, *, is_main: bool) -> None:
        """Change the values of one file in place.

        Values of a wrong type stay, and the validator reports them.

        Args:
            root: The file's values.
            base: The directory of its relative paths.
            is_main: Whether it is the main file.
        """
        if is_main and self._limits and isinstance(root.get("limits", {}), dict):
            root["limits"] = {**root.get("limits", {}), **self._limits}
        # Without the other hosts, every mailbox is kept here.
        root.pop("cluster", None)
        if isinstance(root.get("store"), dict):
            root["store"] = {**root["store"], "path": self.state_directory}
        elif root.get("store") is not None:
            root["store"] = self.state_directory
        listen, clients = root.get("listen"), root.get("clients")
        if isinstance(listen, list):
            listen[:] = [self._listener(entry) for entry in listen]
        if root.get("monitor") is not None:
            root["monitor"] = self._at(root["monitor"], self.monitor or _FREE_PORT)
        if isinstance(clients, dict):
            for name in self.clients.keys() & clients.keys():
                del clients[name]
            for name, entry in clients.items():
                if isinstance(entry, dict):
                    clients[name] = self._client(name, entry, base)

    def additions(self) -> dict[str, Any]:
        """Return the further clients, and an address if no file has one."""
        added: dict[str, Any] = {"clients": {name: dict(e) for name, e in self.clients.items()}}
        if not self._listeners:
            entry: Any = self._address(0, on_tcp=self._tls is not None)
            added["listen"] = [entry if self._tls is None else {"address": entry, "tls": self._tls}]
        return added

    def key(self, name: str) -> bytes:
        """Return the random key of a client, the same at every call."""
        return self._keys.setdefault(name, new_key().encode())

    def _address(self, number: int, *, on_tcp: bool) -> str:
        """Return the address of a ``listen`` entry, by its number."""
        if number < len(self.addresses):
            return self.addresses[number].removeprefix("tls://")
        if on_tcp or sys.platform == "win32":
            return _FREE_PORT
        return str(self._directory / f"{number}.sock")

    def _listener(self, entry: Any) -> Any:
        address: Any = entry.get("address") if isinstance(entry, dict) else entry
        try:
            given = parse(address)
        except AddressError:
            return entry
        on_tcp = given.family != "AF_UNIX"
        altered = self._at(entry, self._address(self._listeners, on_tcp=on_tcp))
        self._listeners += 1
        if isinstance(altered, dict):
            if given.is_file:
                altered.pop("mode", None)
                altered.pop("group", None)
            if "tls" in altered and self._tls is not None:
                altered["tls"] = self._tls
        return altered

    @staticmethod
    def _at(entry: Any, address: str) -> Any:
        """Return an entry, a mapping or an address alone, with another address."""
        if not isinstance(entry, dict):
            return address
        # A shallow copy keeps the places of the values in their file.
        altered = copy.copy(entry)
        altered["address"] = address
        return altered

    def _client(self, name: str, entry: dict[str, Any], base: str) -> dict[str, Any]:
        """Return the entry of a client, with a key and without its users."""
        altered = copy.copy(entry)
        altered.pop("peer_uid", None)
        sources = [field for field in KEY_FIELDS if entry.get(field) is not None]
        if sources == ["key"] or len(sources) > 1:
            return altered
        for field in sources:
            del altered[field]
        altered["key"] = _key_in(entry.get("key_file"), base) or self.key(name)
        return altered


def _key_in(file: object, base: str) -> bytes:
    """Return the key in a file, whatever its mode, or b"" without such a file."""
    if not isinstance(file, str):
        return b""
    try:
        content = Path(base, os.path.expanduser(file)).read_bytes()  # noqa: PTH111 - as written
    except OSError:
        return b""
    return content[:-2] if content.endswith(b"\r\n") else content.removesuffix(b"\n")
