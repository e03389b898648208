"""What was found in all files of one configuration so far, good and bad; in the end a Config or a ConfigError."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from brokerd.config.messages import did_you_mean
from brokerd.config.model import ClientConfig, Config, Limits, ListenConfig, Log, MonitorConfig, Rule
from brokerd.config.owners import warnings_of
from brokerd.config.problems import ConfigError, Path, Place, Problem, one_line
from brokerd.config.yaml_reader import Document

__all__ = ["Findings"]

#: How many names are compared, in all, to say which was meant: about two seconds' worth. In a large file with many
#: slips, the later ones are reported without a guess.
_COMPARISONS: Final = 200_000


class Findings:
    """One configuration in the making.

    file: the main file. environ: where keys in the environment are looked up.
    """

    def __init__(self, file: str, environ: Mapping[str, str]) -> None:
        self.file = file
        self.environ = environ
        self.problems: list[Problem] = []
        #: In the order read, which is the order of the errors; a dict for its order.
        self.files: dict[str, None] = {file: None}
        #: Whether every file could be read: otherwise names may be missing that are in it.
        self.whole = True
        self.limits = Limits()
        self.log = Log()
        self.monitor: MonitorConfig | None = None
        self.listen: list[ListenConfig] = []
        self.clients: dict[str, ClientConfig] = {}
        #: Whether any file lists a listener, good or bad.
        self.listens = False
        #: Every address and every name, also of entries with problems, and where it is given.
        self.addresses: dict[str, Place] = {}
        self.names: dict[str, tuple[Document, Path]] = {}
        #: The names of sockets handed over, and where they are given.
        self.sockets: dict[str, Place] = {}
        #: Every key, whose it is and where it is given.
        self.keys: dict[bytes, tuple[str, Document, Path]] = {}
        #: Files that nobody else may replace, and where each is named.
        self.private: dict[str, str] = {}
        #: What is odd about keys, a line each.
        self.odd: list[str] = []
        #: Clients without a key, and where they are given.
        self.keyless: dict[str, tuple[Document, Path]] = {}
        #: Names in send_to without a wildcard, and where they are given.
        self.recipients: list[tuple[str, Document, Path]] = []
        #: Lists that clients have in common through an anchor become rules once. The list is kept beside its
        #: rules: an id is only good while the object lives.
        self.rules: dict[int, tuple[object, tuple[Rule, ...]]] = {}
        #: Files of which it is reported that others can read the keys in them.
        self.exposed: set[str] = set()

    def config(self) -> Config:
        """Return the whole configuration. Raises ConfigError if there is any problem."""
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
        if not self.listens and self.whole:
            what = "is missing (give at least one address, such as /run/brokerd/brokerd.sock)"
            self.problems.append(Problem(Place(self.file, 1, 1), "listen", what))

    def _check_recipients(self) -> None:
        """Report names in send_to that nobody has."""
        comparisons = _COMPARISONS
        known: dict[str, str] = {}
        for name, document, path in self.recipients:
            if name in self.names:
                continue
            meant = known.get(name, "")
            if name not in known and comparisons >= len(self.names):
                comparisons -= len(self.names)
                meant = known[name] = did_you_mean(name, self.names)
            # The name may be in a file that can't be read; then only what looks like a slip is one.
            if self.whole or meant:
                place, shown = document.place(path)
                right = meant or "give a name from clients:, or a pattern with '*'"
                self.problems.append(Problem(place, shown, f"there is no client {name!r} ({right})"))

    def _check_keyless(self) -> None:
        """Report keys that everybody may know, because a client without one uses its name for a key."""
        for name, (document, path) in self.keyless.items():
            whose, where, key_path = self.keys.get(name.encode(errors="replace"), (name, document, path))
            if whose != name:
                client, _ = document.place(path, at_key=True)
                place, shown = where.place(key_path)
                # The name is not told: it is the key.
                what = (
                    f"is the name of the client at {client}, which has no key and uses its name, and names are no "
                    "secret (give each client a key of its own: brokerd key)"
                )
                self.problems.append(Problem(place, shown, what))

    def _sorted_problems(self) -> list[Problem]:
        order = {file: number for number, file in enumerate(self.files)}
        unique: dict[tuple[Place, str], Problem] = {}
        for problem in self.problems:
            # An anchor's mistake is one mistake, however often it is merged.
            unique.setdefault((problem.place, problem.what if problem.place.line else str(problem)), problem)
        return sorted(
            unique.values(),
            key=lambda problem: (order.get(problem.place.file, 0), problem.place.line, problem.place.column),
        )
