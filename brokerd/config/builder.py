"""The results of reading one configuration's files: valid parts, and problems.

``Findings.config`` turns them into a Config, or raises a ConfigError.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from brokerd.config.messages import did_you_mean
from brokerd.config.model import (
    ClientConfig,
    Config,
    Limits,
    ListenConfig,
    Log,
    MonitorConfig,
    Rule,
)
from brokerd.config.owners import warnings_of
from brokerd.config.problems import ConfigError, Path, Place, Problem, one_line
from brokerd.config.yaml_reader import Document

__all__ = ["Findings"]

#: Limits the name comparisons for "did you mean" hints, per configuration: about two
#: seconds of work. In a large file with many misspelt names, the later ones get no
#: hint.
_COMPARISONS: Final = 200_000


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
        self.limits = Limits()
        self.log = Log()
        self.monitor: MonitorConfig | None = None
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
        #: Warnings about keys, one line each.
        self.odd: list[str] = []
        #: Clients without a key, with their places.
        self.keyless: dict[str, tuple[Document, Path]] = {}
        #: Names in send_to without a wildcard, with their places.
        self.recipients: list[tuple[str, Document, Path]] = []
        #: Rules by the id of their list in the file. Clients that share a list through
        #: an anchor share its rules. The list is kept too: an id is valid only while
        #: the object lives.
        self.rules: dict[int, tuple[object, tuple[Rule, ...]]] = {}
        #: Files already reported because other users can read the keys in them.
        self.exposed: set[str] = set()

    def config(self) -> Config:
        """Return the complete configuration.

        Raises ConfigError if there is any problem.
        """
        self._check_listeners()
        self._check_recipients()
        self._check_keyless()
        if self.problems:
            raise ConfigError(self._sorted_problems())
        return Config(
            path=self.file,
            listen=tuple(self.listen),
            clients=self.clients,
            limits=self.limits,
            log=self.log,
            monitor=self.monitor,
            files=tuple(self.files),
            warnings=tuple(map(one_line, (*self.odd, *warnings_of(self.private.items())))),
        )

    def _check_listeners(self) -> None:
        if not self.listens and self.complete:
            fault = "is missing (give at least one address, such as /run/brokerd/brokerd.sock)"
            self.problems.append(Problem(Place(self.file, 1, 1), "listen", fault))

    def _check_recipients(self) -> None:
        """Report names in send_to that belong to no client."""
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
