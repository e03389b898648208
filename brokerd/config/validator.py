"""Validates the entries of one file, each against its model and then together.

Names, addresses and keys that occur twice are found here. Unknown names are found in
``builder``, when all files are read. Only key files are read, through ``key_files``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import fields
from operator import attrgetter
from typing import Any, Final

from pydantic import BaseModel, ValidationError

from brokerd.config import key_files
from brokerd.config.address_check import same
from brokerd.config.builder import Findings
from brokerd.config.certificates import load_tls
from brokerd.config.cluster import load_cluster
from brokerd.config.file_reader import Unreadable
from brokerd.config.marked_values import Map, Seq
from brokerd.config.messages import complaint, did_you_mean, unknown_key
from brokerd.config.model import (
    KEY_FIELDS,
    KEY_ITEM_FIELDS,
    ClientConfig,
    ClientEntry,
    ClusterEntry,
    File,
    IncludedFile,
    Key,
    KeyEntry,
    Limits,
    ListenConfig,
    ListenEntry,
    Log,
    MailboxConfig,
    MailboxEntry,
    MonitorConfig,
    MonitorEntry,
    RateConfig,
    Rule,
    Source,
    StoreConfig,
    StoreEntry,
)
from brokerd.config.paths import joined, shortened
from brokerd.config.problems import Path, Place, Problem
from brokerd.config.topic_rules import covers
from brokerd.config.values import CertificateConfig, TlsConfig
from brokerd.config.yaml_reader import Document
from brokerd_client.address import Address
from brokerd_client.errors import InvalidName
from brokerd_client.wire import envelope

__all__ = ["Entries"]

#: Limits the path of a Unix socket, in bytes, without its final NUL (sys/un.h).
_MAX_SOCKET_PATH: Final = 107
#: Fewest bytes of the monitor's password.
_SHORTEST_PASSWORD: Final = 8
_WILDCARDS: Final = frozenset("*?[")
#: The kind of key that each field of a client gives.
_KINDS: Final = {"key": "key", "key_file": "file", "key_env": "env", "key_credential": "credential"}
#: Limits the forms of entries that are remembered, per configuration.
_FORMS: Final = 1000
#: Requests in flight per connection of a pool, unless configured.
_POOL_IN_FLIGHT: Final = 32
#: The sections of the main file that are one entry each. The model of the whole file is
#: built only where it is needed.
_SECTIONS: Final[Mapping[str, type[BaseModel]]] = {"limits": Limits, "log": Log}
_UNLIMITED: Final = RateConfig(None, None)
#: Returns the fields of a ClientConfig that are not the client's own, in their order.
_SETTINGS: Final = attrgetter(*[field.name for field in fields(ClientConfig)][3:])
#: Fields of a client whose places matter: errors and rules name them.
_PLACED: Final = frozenset(
    {"send_to", "open_from", "publish", "subscribe", "mailbox", "certificate"}
)
_DEFAULT_RULES: Final = {
    field: tuple(Rule(pattern) for pattern in ClientEntry.model_fields[field].default)
    for field in ("send_to", "open_from", "publish", "subscribe")
}


class Entries:
    """Validates one file's entries and adds them to the ``Findings``."""

    def __init__(
        self,
        findings: Findings,
        document: Document,
        base: str,
        status: os.stat_result | None,
        model: type[IncludedFile],
    ) -> None:
        self._findings = findings
        self._document = document
        self._base = base
        self._status = status
        self._model = model
        #: The file's includes: the path of each entry, and its pattern.
        self.includes: list[tuple[Path, str]] = []
        #: Problems already found in the text, which are not reported again.
        self._reported = {(problem.place, problem.path) for problem in document.problems}

    def _problem(self, path: Path, fault: str, *, at_key: bool = False) -> None:
        place, shown = self._document.place(path, at_key=at_key)
        if (place, shown) not in self._reported:
            self._findings.problems.append(Problem(place, shown, fault))

    def _validated(
        self, path: Path, model: type[BaseModel], value: object
    ) -> tuple[Any, set[Path]]:
        """Return (the entry, {}), or report faults and return (None, their paths)."""
        try:
            return model.model_validate(value), set()
        except ValidationError as error:
            bad: set[Path] = set()
            for detail in error.errors(include_url=False):
                if detail["type"] == "too_short" and detail["input"]:
                    # The list is not empty; its items are the problem.
                    continue
                where = detail["loc"]
                bad |= {where[:1], where[:2]}
                fault = complaint(detail, model)
                self._problem((*path, *where), fault, at_key=detail["type"] == "extra_forbidden")
            return None, bad

    def judge(self, root: dict[str, Any]) -> None:
        """Validate the whole file, and collect its includes."""
        for key, value in root.items():
            if key not in File.model_fields:
                self._problem((key,), unknown_key(key, self._model.model_fields), at_key=True)
            elif key not in self._model.model_fields:
                fault = f"belongs in the main file only (move it to {self._findings.file})"
                self._problem((key,), fault, at_key=True)
            elif key in _SECTIONS:
                section, _ = self._validated((key,), _SECTIONS[key], value)
                if section is not None:
                    setattr(self._findings, key, self._with_paths(section))
        listen, clients = root.get("listen", []), root.get("clients", {})
        if "listen" in root:
            self._findings.listens = True
        if not isinstance(listen, list) or not listen:
            self._validated_section("listen", root)
        else:
            for number, entry in enumerate(listen):
                self._listener(("listen", number), entry)
        if "monitor" in root and "monitor" in self._model.model_fields:
            self._monitor(root["monitor"])
        if root.get("store") is not None and "store" in self._model.model_fields:
            self._store(root["store"])
        if root.get("cluster") is not None and "cluster" in self._model.model_fields:
            self._cluster(root["cluster"])
        if not isinstance(clients, dict):
            self._validated_section("clients", root)
        else:
            for name, entry in clients.items():
                self._client(name, entry, clients)
        if "include" in root:
            self._include(root["include"])

    def _include(self, include: object) -> None:
        """Validate the section, and note its entries that are valid."""
        section, bad = self._validated((), self._model, {"include": include})
        if isinstance(include, list):
            for number, pattern in enumerate(include):
                if section is not None or ("include", number) not in bad:
                    self.includes.append((("include", number), pattern))

    def _with_paths(self, section: Any) -> Any:
        """Return the section with its relative path joined to this file's directory."""
        audit = getattr(section, "audit", None)
        if audit is None:
            return section
        return section.model_copy(update={"audit": joined(self._base, audit)})

    def _validated_section(self, key: str, root: dict[str, Any]) -> None:
        """Report a section that is not a list, or not a mapping, as the model does."""
        if key not in root:
            return
        value = root[key]
        self._validated((), self._model, {key: value})
        if key == "listen" and value == []:
            self._problem((key,), "is an empty list (give at least one address)")

    def _listener(self, path: Path, entry: object) -> None:
        valid: ListenEntry | None = self._validated_place(path, ListenEntry, entry)
        if valid is None:
            return
        where: Path = (*path, "address") if isinstance(entry, Mapping) else path
        address, place = self._address(where, valid.address)
        if not address.is_file and isinstance(entry, Mapping):
            for key in ("mode", "group"):
                if key in entry:
                    self._problem(
                        (*path, key), "applies to Unix sockets only (take it out)", at_key=True
                    )
        tls = self._tls(path, valid)
        if valid.name is not None:
            place_of_name, _ = self._document.place((*path, "name"))
            first = self._findings.sockets.setdefault(valid.name, place_of_name)
            if first is not place_of_name:
                fault = (
                    f"the socket {valid.name!r} is given twice, first at {first} (keep one of them)"
                )
                self._problem((*path, "name"), fault)
        self._findings.listen.append(
            ListenConfig(
                address=address,
                mode=valid.mode if address.is_file else None,
                group=valid.group if address.is_file else None,
                allow_md5=valid.allow_md5,
                source=Source(place.file, place.line),
                name=valid.name,
                tls=tls,
                plain=valid.plain,
            )
        )

    def _tls(self, path: Path, entry: ListenEntry) -> TlsConfig | None:
        """Return a listener's TLS settings, or report the faults and return None."""
        if entry.address.family not in ("AF_INET", "AF_INET6"):
            for key in ("tls", "plain"):
                if key in entry.model_fields_set:
                    self._problem((*path, key), "applies to TCP only (take it out)", at_key=True)
            return None
        if entry.tls is None:
            return None
        if entry.plain:
            self._problem(
                (*path, "plain"),
                "means no TLS, but tls is given (keep one of them)",
                at_key=True,
            )
        self._note_private(joined(self._base, entry.tls.key), (*path, "tls", "key"))
        return load_tls(
            entry.tls,
            self._base,
            self._findings.environ,
            lambda key, fault: self._problem((*path, "tls", key), fault),
        )

    def _monitor(self, entry: object) -> None:
        valid: MonitorEntry | None = self._validated_place(("monitor",), MonitorEntry, entry)
        if valid is None:
            return
        where: Path = ("monitor", "address") if isinstance(entry, Mapping) else ("monitor",)
        if valid.address.family == "AF_PIPE":
            self._problem(
                where,
                "HTTP does not run over a named pipe (give HOST:PORT, such as 127.0.0.1:6060)",
            )
            return
        address, place = self._address(where, valid.address)
        password = self._monitor_password(valid)
        monitor = MonitorConfig(
            address,
            valid.per_client,
            Source(place.file, place.line),
            tuple(valid.hosts),
            valid.page,
            password,
        )
        if valid.page and valid.password_file is None and not monitor.is_local:
            self._problem(
                where,
                "other machines can reach the monitor's page (give it monitor.password_file, a"
                " local address such as 127.0.0.1:6060, or page: false)",
            )
        self._findings.monitor = monitor

    def _monitor_password(self, entry: MonitorEntry) -> bytes | None:
        """Return the password in the monitor's file, or None without one."""
        if entry.password_file is None:
            return None
        path = joined(self._base, entry.password_file)
        where: Path = ("monitor", "password_file")
        self._note_private(path, where)
        try:
            password = key_files.read_key_file(path, self._findings.environ)
        except Unreadable as error:
            self._problem(where, str(error))
            return None
        if len(password) < _SHORTEST_PASSWORD:
            fault = (
                f"the password has fewer than {_SHORTEST_PASSWORD} bytes (make one: brokerd key)"
            )
            self._problem(where, fault)
        return password

    def _store(self, entry: object) -> None:
        valid: StoreEntry | None = self._validated_place(("store",), StoreEntry, entry)
        if valid is not None:
            path = "" if valid.path is None else joined(self._base, valid.path)
            self._findings.store = StoreConfig(path, valid.min_free, valid.dedup)

    def _cluster(self, entry: object) -> None:
        self._findings.clusters = True
        valid: ClusterEntry | None = self._validated_place(("cluster",), ClusterEntry, entry)
        if valid is None:
            return
        for field in ("credentials", "password_file", "nkey_file"):
            file = getattr(valid, field)
            if file is not None:
                self._note_private(joined(self._base, file), ("cluster", field))
        place, _ = self._document.place(("cluster",), at_key=True)
        self._findings.cluster = load_cluster(
            valid,
            Source(place.file, place.line),
            self._base,
            self._findings.environ,
            lambda path, fault: self._problem(("cluster", *path), fault, at_key=not path),
        )

    def _address(self, path: Path, address: Address) -> tuple[Address, Place]:
        """Return a listen address and its place in the file.

        A relative path is joined to this file's directory.
        """
        if address.is_file:
            address = type(address)(
                "AF_UNIX",
                path=shortened(os.path.join(self._base, address.path)),  # noqa: PTH118 - as written
            )
            size = len(os.fsencode(address.path))
            if size > _MAX_SOCKET_PATH or "\0" in address.path:
                fault = (
                    f"a Unix socket's path has at most {_MAX_SOCKET_PATH} bytes; this has {size}"
                    " (give a shorter one)"
                )
                self._problem(path, fault)
        place, _ = self._document.place(path)
        first = self._findings.addresses.setdefault(str(address), place)
        if first is not place and address.port == 0 and address.family in ("AF_INET", "AF_INET6"):
            first = place
        if first is not place:
            self._problem(path, f"{address} is given twice, first at {first} (keep one of them)")
        else:
            for other, place_of_other in self._findings.ports.get(address.port, ()):
                if same(address, other):
                    fault = f"{address} is {other}, given at {place_of_other} (keep one of them)"
                    self._problem(path, fault)
            self._findings.ports.setdefault(address.port, []).append((address, place))
        return address, place

    def _validated_place(self, path: Path, model: type[BaseModel], entry: object) -> Any:
        """Return an entry, written as a mapping or as an address alone.

        If it has faults, report them and return None.
        """
        if isinstance(entry, Mapping):
            return self._validated(path, model, entry)[0]
        try:
            return model.model_validate(entry)
        except ValidationError as error:
            # The short form has no field: its error belongs to the entry.
            self._problem(path, complaint(error.errors(include_url=False)[0], model))
            return None

    def _client(self, name: str, raw: object, clients: dict[str, Any]) -> None:
        path = ("clients", name)
        findings = self._findings
        try:
            envelope.check_name(name)
        except InvalidName as error:
            wrong, _, right = str(error).rpartition(": ")
            self._problem(path, f"{wrong} ({right})", at_key=True)
        first = findings.names.setdefault(name, (self._document, path))
        if first[0] is not self._document:
            place, _ = first[0].place(first[1], at_key=True)
            self._problem(
                path,
                f"client {name!r} is given twice, first at {place} (keep one of them)",
                at_key=True,
            )
        line = clients.marks[name][0] + 1 if isinstance(clients, Map) else 0
        source = Source(self._document.file, line)
        field, form = _form_of(raw)
        settings = findings.settings.get(form)
        if settings is not None:
            key = self._key(name, (*path, field), _KINDS[field], raw[field])  # type: ignore[index]
            # Keywords would double the time.
            findings.clients[name] = ClientConfig(
                name, () if key is None else (key,), source, *settings
            )
            return
        entry, bad = self._validated_client(path, raw, form)
        if not isinstance(raw, dict):
            return
        self._recipients(path, raw, bad)
        keys = self._client_keys(name, path, raw, entry, bad)
        if entry is None:
            return
        client = ClientConfig(name, keys, source, **self._settings(name, path, raw, entry))
        if field and form in findings.forms and not _PLACED.intersection(raw):
            findings.settings[form] = _SETTINGS(client)
        findings.clients[name] = client

    def _validated_client(
        self, path: Path, raw: object, form: str
    ) -> tuple[ClientEntry | None, set[Path]]:
        """Return the same as ``_validated``, for entries of one form without validation."""
        known = self._findings.forms.get(form)
        if known is not None:
            return known, set()
        entry, bad = self._validated(path, ClientEntry, raw)
        if entry is not None and form and len(self._findings.forms) < _FORMS:
            self._findings.forms[form] = entry
        return entry, bad

    def _settings(
        self, name: str, path: Path, raw: dict[str, Any], entry: ClientEntry
    ) -> dict[str, Any]:
        """Return the fields of a ClientConfig that are not the client's own."""
        return {
            "connections": entry.connections,
            "send_to": self._rules("send_to", raw, entry.send_to),
            "publish": self._rules("publish", raw, entry.publish),
            "subscribe": self._rules("subscribe", raw, entry.subscribe),
            "queue": entry.queue,
            "subscriptions": entry.subscriptions,
            "requests": entry.requests,
            "when_full": entry.when_full,
            "when_connected": entry.when_connected,
            "rate": RateConfig(entry.rate.messages, entry.rate.bytes)
            if "rate" in raw
            else _UNLIMITED,
            "allow_md5": entry.allow_md5,
            "peer_uid": entry.peer_uid,
            "admin": bool(entry.admin),
            "admin_payload": entry.admin == "payload",
            "mailbox": self._mailbox(name, path, raw, entry),
            "home": entry.home or "",
            # The builder knows where the mailbox is.
            "home_subscribe": (),
            "certificate": self._certificate(path, entry),
            "binding": entry.channel_binding,
            "tap": entry.tap,
            "expected": entry.expected,
            "open_from": self._rules("open_from", raw, entry.open_from),
            "channels": entry.channels,
            "in_flight": entry.in_flight or (_POOL_IN_FLIGHT if entry.connections > 1 else None),
        }

    def _mailbox(
        self, name: str, path: Path, raw: dict[str, Any], entry: ClientEntry
    ) -> MailboxConfig | None:
        """Return a client's mailbox; report patterns that its rules do not allow."""
        valid = entry.mailbox
        if not isinstance(valid, MailboxEntry):
            return None
        here = (*path, "mailbox")
        self._findings.mailboxes[name] = self._document, here
        listed = raw["mailbox"] if isinstance(raw["mailbox"], dict) else {}
        for number, pattern in enumerate(valid.subscribe):
            fault = ""
            if pattern.startswith("$"):
                fault = "events of the broker are not stored (take it out)"
            elif not any(covers(rule, pattern) for rule in entry.subscribe):
                rules = ", ".join(entry.subscribe) or "nothing"
                fault = f"{pattern} is outside the client's rule subscribe ({rules})"
            if fault:
                self._problem((*here, "subscribe", number), fault)
        return MailboxConfig(
            size=valid.size,
            messages=valid.messages,
            ttl=valid.ttl,
            subscribe=self._rules("subscribe", listed, valid.subscribe) if valid.subscribe else (),
            window=valid.window,
            attempts=valid.attempts,
            when_full=valid.when_full,
            dead=valid.dead,
            max_message=valid.max_message,
            ack_timeout=valid.ack_timeout,
        )

    def _certificate(self, path: Path, entry: ClientEntry) -> CertificateConfig | None:
        demanded = entry.certificate
        if demanded is None:
            return None
        if not (demanded.subject or demanded.fingerprint):
            self._problem(
                (*path, "certificate"),
                "has no requirement (give subject, fingerprint or both)",
                at_key=True,
            )
        return CertificateConfig(demanded.subject or (), demanded.fingerprint or ())

    def _recipients(self, path: Path, raw: dict[str, Any], bad: set[Path]) -> None:
        """Record the names in send_to and open_from; they are checked when all files are
        read.
        """
        for field in ("send_to", "open_from"):
            listed = raw.get(field)
            if not isinstance(listed, list) or id(listed) in self._findings.rules:
                continue
            for number, name in enumerate(listed):
                if (
                    (field, number) not in bad
                    and isinstance(name, str)
                    and not _WILDCARDS & set(name)
                ):
                    where = (*path, field, number)
                    self._findings.recipients.append((name, self._document, where))

    def _rules(
        self, field: str, raw: dict[str, Any], patterns: tuple[str, ...]
    ) -> tuple[Rule, ...]:
        listed = raw.get(field)
        if listed is None:
            return _DEFAULT_RULES[field]
        parsed = self._findings.rules.get(id(listed))
        if parsed is not None:
            return parsed[1]
        lines = (
            [line + 1 for line, _ in listed.marks]
            if isinstance(listed, Seq)
            else [0] * len(patterns)
        )
        rules = tuple(
            Rule(pattern, Source(self._document.file, line))
            for pattern, line in zip(patterns, lines, strict=True)
        )
        self._findings.rules[id(listed)] = listed, rules
        return rules

    def _client_keys(
        self, name: str, path: Path, raw: dict[str, Any], entry: ClientEntry | None, bad: set[Path]
    ) -> tuple[Key, ...]:
        """Return the client's usable keys, and report the others."""
        sources = [field for field in raw if field in KEY_FIELDS and raw[field] is not None]
        if not sources:
            if raw.get("peer_uid") is None and not self._meant_a_key(raw):
                right = "give one of key, key_file, key_env, key_credential and keys, or peer_uid"
                self._problem(path, f"has no way to authenticate ({right})", at_key=True)
            elif raw.get("peer_uid") is not None:
                self._findings.keyless.setdefault(name, (self._document, path))
            return ()
        if len(sources) > 1:
            place, _ = self._document.place((*path, sources[0]), at_key=True)
            fault = f"{sources[0]} is given too, at {place} (keep one of {', '.join(sources)})"
            self._problem((*path, sources[1]), fault, at_key=True)
            # It is not known which of them is meant, so their own faults are not
            # reported.
            return ()
        field = sources[0]
        where = (*path, field)
        if field == "keys":
            return tuple(self._listed_keys(name, where, raw[field], entry, bad))
        key = self._key(name, where, _KINDS[field], raw[field]) if (field,) not in bad else None
        return () if key is None else (key,)

    def _meant_a_key(self, raw: dict[str, Any]) -> bool:
        """Return whether a key field, or ``peer_uid``, was given but already reported.

        Its value may be empty, or its name misspelt.
        """
        if isinstance(raw, Map) and any(field in raw for field in (*KEY_FIELDS, "peer_uid")):
            return True
        unknown = [field for field in raw if field not in ClientEntry.model_fields]
        return any(did_you_mean(field, KEY_FIELDS) for field in unknown)

    def _listed_keys(
        self, name: str, path: Path, raw: object, entry: ClientEntry | None, bad: set[Path]
    ) -> Iterator[Key]:
        if not isinstance(raw, list):
            return
        for number, item in enumerate(raw):
            if ("keys", number) in bad:
                continue
            listed = entry.keys[number] if entry and entry.keys else KeyEntry.model_validate(item)
            where = (*path, number)
            sources = [
                field for field in item if field in KEY_ITEM_FIELDS and item[field] is not None
            ]
            if (
                not sources
                and isinstance(item, Map)
                and any(field in item for field in KEY_ITEM_FIELDS)
            ):
                # The field is empty, which is already reported.
                continue
            if len(sources) != 1:
                wrong = f"has {' and '.join(sources)}" if sources else "has no key"
                self._problem(where, f"{wrong} (give one of file, key, env and credential)")
                continue
            begin, end = listed.not_before, listed.not_after
            if begin is not None and end is not None and end <= begin:
                fault = (
                    "is not after not_before: the key would never be accepted (give a later time)"
                )
                self._problem((*where, "not_after"), fault)
            key = self._key(name, (*where, sources[0]), sources[0], item[sources[0]])
            if key is not None:
                yield Key(key.value, begin, end, key.source)

    def _key(self, name: str, path: Path, kind: str, value: str | bytes) -> Key | None:
        """Return the key, or report that it can't be used and return None."""
        environ = self._findings.environ
        source = kind
        try:
            if kind == "key":
                key = self._inline_key(path, value)
            else:
                assert isinstance(value, str)
                if kind == "file":
                    file = joined(self._base, value)
                    source = f"key_file {file}"
                    key = key_files.read_key_file(file, environ, value)
                    self._note_private(file, path)
                elif kind == "env":
                    source = f"key_env {value}"
                    key = key_files.read_env(value, environ)
                else:
                    source = f"key_credential {value}"
                    key = key_files.read_credential(value, environ)
        except Unreadable as error:
            self._problem(path, str(error))
            return None
        odd = key_files.oddity(key, kind)
        if odd:
            place, _ = self._document.place(path)
            self._findings.odd.append(f"{place}: a key of client {name!r} {odd}")
        other, document, key_path = self._findings.keys.setdefault(
            key, (name, self._document, path)
        )
        if other != name:
            place, _ = document.place(key_path)
            fault = (
                f"has the same key as client {other!r} at {place} (give each client a key of its"
                " own: brokerd key)"
            )
            self._problem(path, fault)
        return Key(key, source=source)

    def _note_private(self, file: str, path: Path) -> None:
        """Record a key file, for a warning if another user can replace it."""
        if key_files.forbidden(file, self._findings.environ) == key_files.OTHERS:
            place, _ = self._document.place(path)
            self._findings.private.setdefault(file, str(place))

    def _inline_key(self, path: Path, value: str | bytes) -> bytes:
        key = value.encode() if isinstance(value, str) else value
        file = self._document.file
        if self._status is not None and file not in self._findings.holding_keys:
            # Once per file: one chmod corrects all of its keys.
            self._findings.holding_keys.add(file)
            exposure = key_files.exposed(
                file, self._status, key_files.forbidden(file, self._findings.environ)
            )
            if exposure:
                self._problem(path, f"this file holds a key, and {exposure}")
        if not key:
            raise Unreadable("is empty (give at least one byte; brokerd key makes a good one)")
        return key


def _form_of(raw: object) -> tuple[str, str]:
    """Return (the field with the key, the form) of a client's entry, or "" for each.

    Entries of one form differ only in the text of their key.
    """
    if not isinstance(raw, Map) or "keys" in raw:
        return "", ""
    found = ""
    others: dict[str, Any] = {}
    for field, value in raw.items():
        if field not in _KINDS or type(value) is not str or not value:
            others[field] = value
        elif found:
            return "", ""
        else:
            found = field
    # Of what YAML reads, equal representations are equal values.
    return found, f"{found} {others!r}"
