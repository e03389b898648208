"""The results of reading one configuration's files: valid parts, and problems.

``Findings.config`` turns them into a Config, or raises a ConfigError.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from brokerd.config.cluster import clients_digest
from brokerd.config.messages import did_you_mean
from brokerd.config.model import (
    ClientConfig,
    ClientEntry,
    ClusterConfig,
    Config,
    Limits,
    ListenConfig,
    Log,
    MonitorConfig,
    Rule,
    StoreConfig,
    StoreEntry,
)
from brokerd.config.owners import warnings_of
from brokerd.config.problems import ConfigError, Path, Place, Problem, one_line
from brokerd.config.text_files import DEFAULT_CONFIG
from brokerd.config.yaml_reader import Document
from brokerd_client.address import Address

__all__ = ["Findings"]

#: Limits the name comparisons for "did you mean" hints, per configuration: about two
#: seconds of work. In a large file with many misspelt names, the later ones get no
#: hint.
_COMPARISONS: Final = 200_000
#: The state directory of the systemd unit.
_DEFAULT_STATE: Final = "/var/lib/brokerd"


class Findings:
    """The parts of one configuration, collected while its files are read.

    Attributes:
        file: The main file.
        environ: The environment in which ``key_env`` is looked up.
    """

    def __init__(self, file: str, environ: Mapping[str, str]) -> None:
        self.file = file
        self.environ = environ
        self.problems: list[Problem] = []
        #: The files in the order of reading, which orders the errors; a dict keeps it.
        self.files: dict[str, None] = {file: None}
        #: Whether every file could be read. If not, an unknown name may be defined in
        #: the unread file.
        self.complete = True
        self.limits = Limits.model_construct()
        self.log = Log.model_construct()
        self.monitor: MonitorConfig | None = None
        #: Its path is "" for the default.
        self.store: StoreConfig | None = None
        #: Whether the main file has the section ``cluster``, valid or not.
        self.clusters = False
        self.cluster: ClusterConfig | None = None
        #: The clients with mailboxes, with the places of these.
        self.mailboxes: dict[str, tuple[Document, Path]] = {}
        self.listen: list[ListenConfig] = []
        self.clients: dict[str, ClientConfig] = {}
        #: Whether any file lists a listener, valid or not.
        self.listens = False
        #: Every address and every name, with its place, also of entries with problems.
        self.addresses: dict[str, Place] = {}
        self.names: dict[str, tuple[Document, Path]] = {}
        #: The names of activated sockets, with their places.
        self.sockets: dict[str, Place] = {}
        #: Every key, with the name of its client and its place.
        self.keys: dict[bytes, tuple[str, Document, Path]] = {}
        #: Files that no other user may replace, and the place that names each.
        self.private: dict[str, str] = {}
        #: Entries of ``include`` that match no file, with their places.
        self.unmatched: list[str] = []
        #: Addresses by their ports, with their places; none has the port 0.
        self.ports: dict[int, list[tuple[Address, Place]]] = {}
        #: Warnings about keys, one line each.
        self.odd: list[str] = []
        #: Clients without a key, with their places.
        self.keyless: dict[str, tuple[Document, Path]] = {}
        #: Names in send_to and open_from without a wildcard, with their places.
        self.recipients: list[tuple[str, Document, Path]] = []
        #: Rules by the id of their list in the file. Clients that share a list through
        #: an anchor share its rules. The list is kept too: an id is valid only while
        #: the object lives.
        self.rules: dict[int, tuple[object, tuple[Rule, ...]]] = {}
        #: One entry of each form that clients have, and the settings that it gives: see
        #: ``validator``.
        self.forms: dict[str, ClientEntry] = {}
        self.settings: dict[str, tuple[Any, ...]] = {}
        #: Files with a key in them, whose modes have been checked for that.
        self.holding_keys: set[str] = set()

    def config(self) -> Config:
        """Return the complete configuration.

        Raises ConfigError if there is any problem.
        """
        self._check_listeners()
        self._check_recipients()
        self._check_keyless()
        clients, cluster = self._at_home()
        store = self._store(clients)
        if self.problems:
            raise ConfigError(self._sorted_problems())
        return Config(
            path=self.file,
            listen=tuple(self.listen),
            clients=clients,
            limits=self.limits,
            log=self.log,
            monitor=self.monitor,
            store=store,
            cluster=cluster,
            files=tuple(self.files),
            private=self.private,
            unmatched=tuple(map(one_line, self.unmatched)),
            warnings=tuple(map(one_line, (*self.odd, *warnings_of(self.private.items())))),
        )

    def _at_home(self) -> tuple[dict[str, ClientConfig], ClusterConfig | None]:
        """Return the clients with the mailboxes that are kept here, and the cluster.

        Report mailboxes of a cluster without a home. Without a cluster, all are kept here.
        """
        if not self.clusters:
            homeless = {
                name: replace(client, home="") if client.home else client
                for name, client in self.clients.items()
            }
            return homeless, None
        clients: dict[str, ClientConfig] = {}
        for name, client in self.clients.items():
            if client.mailbox is None:
                clients[name] = replace(client, home="") if client.home else client
                continue
            if not client.home:
                document, path = self.mailboxes[name]
                place, shown = document.place(path, at_key=True)
                fault = "needs a host that keeps it, in a cluster (give the client home: HOST)"
                self.problems.append(Problem(place, shown, fault))
            # In an invalid section, it is not known which host this is.
            is_here = self.cluster is not None and client.home == self.cluster.host
            clients[name] = (
                client
                if is_here
                else replace(client, mailbox=None, home_subscribe=client.mailbox.subscribe)
            )
        if self.cluster is None:
            return clients, None
        digest = clients_digest(
            clients, {name: self.clients[name].mailbox for name in self.mailboxes}
        )
        return clients, replace(self.cluster, digest=digest)

    def _store(self, clients: Mapping[str, ClientConfig]) -> StoreConfig | None:
        """Return where mailboxes are kept; report mailboxes that have no such place."""
        mailboxes = [
            place
            for name, place in self.mailboxes.items()
            if name not in clients or clients[name].mailbox is not None
        ]
        default = self.environ.get("STATE_DIRECTORY", "").partition(":")[0]
        if not default and self.file == DEFAULT_CONFIG:
            # As the service has it, whose configuration root checks.
            default = _DEFAULT_STATE
        store = self.store
        if store is None and mailboxes:
            entry = StoreEntry()
            store = StoreConfig("", entry.min_free, entry.dedup)
        if store is None or store.path:
            return store
        if not default and self.complete:
            for document, path in mailboxes:
                place, shown = document.place(path, at_key=True)
                fault = (
                    "needs a directory to be kept in (give store: PATH, such as"
                    " store: /var/lib/brokerd; under systemd StateDirectory= does too)"
                )
                self.problems.append(Problem(place, shown, fault))
        return replace(store, path=default)

    def _check_listeners(self) -> None:
        if not self.listens and self.complete:
            fault = "is missing (give at least one address, such as /run/brokerd/brokerd.sock)"
            self.problems.append(Problem(Place(self.file, 1, 1), "listen", fault))

    def _check_recipients(self) -> None:
        """Report names in send_to and open_from that belong to no client."""
        comparisons = _COMPARISONS
        suggestions: dict[str, str] = {}
        for name, document, path in self.recipients:
            if name in self.names:
                continue
            meant = suggestions.get(name, "")
            if name not in suggestions and comparisons >= len(self.names):
                comparisons -= len(self.names)
                meant = suggestions[name] = did_you_mean(name, self.names)
            # If a file can't be read, the name may be defined there. Then only names
            # that resemble a known name are reported.
            if self.complete or meant:
                place, shown = document.place(path)
                remedy = meant or "give a name from clients:, or a pattern with '*'"
                self.problems.append(
                    Problem(place, shown, f"there is no client {name!r} ({remedy})")
                )

    def _check_keyless(self) -> None:
        """Report keys that equal the name of a client without a key, which uses its
        name.
        """
        for name, (document, path) in self.keyless.items():
            owner, document_of_key, key_path = self.keys.get(
                name.encode(errors="replace"), (name, document, path)
            )
            if owner != name:
                client, _ = document.place(path, at_key=True)
                place, shown = document_of_key.place(key_path)
                # The name is not shown: it is the key.
                fault = (
                    f"is the name of the client at {client}, which has no key and uses its name:"
                    " names are not secret (give each client a key of its own: brokerd key)"
                )
                self.problems.append(Problem(place, shown, fault))

    def _sorted_problems(self) -> list[Problem]:
        order = {file: number for number, file in enumerate(self.files)}
        unique: dict[tuple[Place, str], Problem] = {}
        for problem in self.problems:
            # A mistake in an anchor is reported once, however often the anchor is
            # merged.
            unique.setdefault(
                (problem.place, problem.fault if problem.place.line else str(problem)), problem
            )
        return sorted(
            unique.values(),
            key=lambda problem: (
                order.get(problem.place.file, 0),
                problem.place.line,
                problem.place.column,
            ),
        )
