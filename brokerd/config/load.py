"""Loading: reads the main file and its includes, and returns a Config.

All problems are found before one error reports them together. ``text_files`` opens the
files, ``yaml_reader`` parses the text, and ``validator`` checks the entries. This
module writes nothing and opens no socket.
"""

from __future__ import annotations

import copy
import gc
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Final

from brokerd.config.builder import Findings
from brokerd.config.file_reader import Unreadable
from brokerd.config.isolation import Isolation
from brokerd.config.marked_values import Map
from brokerd.config.model import Config, File, IncludedFile
from brokerd.config.paths import shortened
from brokerd.config.problems import ConfigError, Path, Place, Problem
from brokerd.config.text_files import MAX_FILE, decoded, matching, text_of
from brokerd.config.validator import Entries
from brokerd.config.yaml_reader import Document, read

__all__ = [
    "MAX_FILE",
    "Config",
    "ConfigError",
    "build_config",
    "load",
    "load_isolated",
    "load_text",
]

_NOT_A_PATH: Final = "is not a valid path (give a file or a pattern)"
#: The name, in errors, of values that a program gives.
_PROGRAM: Final = "(program)"


def load(path: str | os.PathLike[str], environ: Mapping[str, str] | None = None) -> Config:
    """Return the configuration in a file and the files that it includes.

    path: the file, or ``text_files.IN_ENVIRON`` for a configuration in the environment.
    environ: the environment for ``key_env`` and CREDENTIALS_DIRECTORY; by default
    os.environ.
    Raises ConfigError with every problem of every file.
    """
    files = _Files(os.fspath(path), environ)
    with _without_collections():
        try:
            files.read_main()
            return files.findings.config()
        finally:
            files.free()


def load_text(
    text: str | bytes, path: str = "brokerd.yaml", environ: Mapping[str, str] | None = None
) -> Config:
    """Return the configuration in a text.

    path: the name used in errors; relative paths start from its directory.
    The text has no file, so no file mode is checked for keys in it. Raises ConfigError
    as ``load`` does.
    """
    files = _Files(path, environ)
    with _without_collections():
        files.read_text(text)
        return files.findings.config()


def build_config(
    listen: Any,
    clients: Mapping[str, bytes | str | Mapping[str, Any]],
    *,
    limits: Mapping[str, Any] | None = None,
    log: Mapping[str, Any] | None = None,
    monitor: Any = None,
    store: Any = None,
    cluster: Mapping[str, Any] | None = None,
    base: str = "",
) -> Config:
    """Return a configuration from a program's values, under the same rules as a file.

    Args:
        listen: An address in any form, a mapping as in the file, or a list of such
            entries. A tuple of host and port is one entry.
        clients: Name to a key, or to a mapping as in the file; keys may be bytes.
        limits: The mapping ``limits`` as in the file, or None for the defaults.
        log: The mapping ``log`` as in the file, or None for the defaults.
        monitor: An address in any form, or a mapping as in the file; None for no
            monitor.
        store: A directory, or a mapping as in the file; None for the default.
        cluster: The mapping ``cluster`` as in the file, or None for a broker of its own.
        base: The directory of relative paths, by default the process's own.

    Raises:
        ConfigError: With every problem, as ``load`` does.
    """
    entries = listen if isinstance(listen, list) else [listen]
    root: dict[str, Any] = {
        "listen": [list(entry) if isinstance(entry, tuple) else entry for entry in entries],
        "clients": {
            name: {"key": entry} if isinstance(entry, (bytes, str)) else dict(entry)
            for name, entry in clients.items()
        },
        **({} if limits is None else {"limits": dict(limits)}),
        **({} if log is None else {"log": dict(log)}),
        **(
            {}
            if monitor is None
            else {"monitor": list(monitor) if isinstance(monitor, tuple) else monitor}
        ),
        **({} if store is None else {"store": store}),
        **({} if cluster is None else {"cluster": dict(cluster)}),
    }
    files = _Files(_PROGRAM, None)
    files.judge(Document(_PROGRAM, root), base, None, File)
    return files.findings.config()


def load_isolated(
    source: str | os.PathLike[str] | Mapping[str, Any], isolation: Isolation
) -> Config:
    """Return a configuration that is independent of the machine that it is for.

    source: a file, the text of one if it has a line break, or its values.
    The modes of the files are not checked, and a reload can't read them again. Raises
    ConfigError as ``load`` does.
    """
    isolation.begin()
    if isinstance(source, Mapping):
        files = _Files(_PROGRAM, None, isolation)
        files.judge(Document(_PROGRAM, copy.deepcopy(dict(source))), "", None, File)
    elif isinstance(source, str) and "\n" in source:
        files = _Files(_PROGRAM, None, isolation)
        files.read_text(source)
    else:
        files = _Files(os.fspath(source), None, isolation)
        files.read_main()
    files.judge_additions(isolation.additions())
    return replace(files.findings.config(), path=_PROGRAM)


@contextmanager
def _without_collections() -> Iterator[None]:
    """Pause the garbage collector.

    Otherwise it would traverse a hundred thousand entries repeatedly, and all of them
    stay in use.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class _Files:
    """Reads the main file and, depth first, its includes; collects results in
    ``findings``.
    """

    def __init__(
        self, main: str, environ: Mapping[str, str] | None, isolation: Isolation | None = None
    ) -> None:
        self._main = main
        self._isolation = isolation
        self.findings = Findings(main, os.environ if environ is None else environ)
        if isolation is not None:
            self.findings.environ = {
                **self.findings.environ,
                "STATE_DIRECTORY": isolation.state_directory,
            }
        #: The real paths of the files read, so that no file is read twice.
        self._seen: set[str] = set()
        self._documents: list[Document] = []

    def read_main(self) -> None:
        """Read the main file from the disk."""
        try:
            text, status = text_of(self._main, self.findings.environ)
        except Unreadable as error:
            self._refuse_main(error)
            return
        self._seen.add(os.path.realpath(self._main))
        self._read(text, self._main, status, File)

    def read_text(self, text: str | bytes) -> None:
        """Read a given text as the main file."""
        try:
            content = decoded(text) if isinstance(text, bytes) else text.removeprefix("\ufeff")
        except Unreadable as error:
            self._refuse_main(error)
            return
        self._read(content, self._main, None, File)

    def _refuse_main(self, error: Unreadable) -> None:
        self.findings.complete = False
        place = Place(self._main, error.line or 1, error.column or 1)
        self.findings.problems.append(Problem(place, "", str(error)))

    def _read(
        self, text: str, file: str, status: os.stat_result | None, model: type[IncludedFile]
    ) -> None:
        self.findings.files[file] = None
        if status is not None:
            self.findings.private[file] = file
        document = read(text, file)
        self._documents.append(document)
        self.judge(document, os.path.dirname(file), status, model)  # noqa: PTH120 - a Path would make "" a "."

    def free(self) -> None:
        """Free what was read, entry by entry.

        Freed at once, a hundred thousand entries keep all other threads waiting.
        """
        emptied: list[dict[Any, Any]] = [self.findings.names, self.findings.keys]
        for document in self._documents:
            clients = document.root.get("clients") if isinstance(document.root, Map) else None
            if isinstance(clients, Map):
                emptied += clients, clients.marks
        for entries in emptied:
            while entries:
                entries.popitem()

    def judge(
        self,
        document: Document,
        base: str,
        status: os.stat_result | None,
        model: type[IncludedFile],
    ) -> None:
        """Validate one file, then the files that it includes.

        Args:
            base: The directory of its relative paths.
            status: That of the file, or None for a text without a file.
        """
        findings = self.findings
        findings.problems += document.problems
        findings.complete = findings.complete and document.complete
        root = document.root
        if isinstance(root, dict):
            if self._isolation is not None:
                self._isolation.isolate(root, base, is_main=model is File)
                status = None
            entries = Entries(findings, document, base, status, model)
            entries.judge(root)
            for path, pattern in entries.includes:
                self._include(document, path, pattern, base)
            return
        fault = "is not a mapping (a configuration begins with keys such as listen: and clients:)"
        if root is None:
            # An included file may hold only comments, as an example does. A main file
            # of comments alone is a mistake.
            if model is not File or not document.complete:
                return
            fault = "is empty (a configuration has listen: and clients:)"
        findings.complete = False
        findings.problems.append(Problem(Place(document.file, 1, 1), "", fault))

    def judge_additions(self, values: dict[str, Any]) -> None:
        """Validate values that a program adds to the files."""
        Entries(self.findings, Document(_PROGRAM, values), "", None, IncludedFile).judge(values)

    def _include(self, document: Document, path: Path, pattern: str, base: str) -> None:
        """Read the files that one entry of ``include`` names, except those already
        read.
        """
        try:
            files = matching(pattern, base)
        except Unreadable as error:
            self._refuse_include(document, path, str(error))
            return
        except ValueError:
            self._refuse_include(document, path, _NOT_A_PATH)
            return
        if not files:
            place, _ = document.place(path)
            self.findings.unmatched.append(f"{place}: no file matches {pattern}")
        for file in map(shortened, files):
            try:
                true = os.path.realpath(file)
                if true in self._seen:
                    continue
                self._seen.add(true)
                text, status = text_of(file)
            except Unreadable as error:
                if error.line:
                    self.findings.complete = False
                    self.findings.files[file] = None
                    place = Place(file, error.line, error.column)
                    self.findings.problems.append(Problem(place, "", str(error)))
                else:
                    self._refuse_include(document, path, str(error))
            except ValueError:
                self._refuse_include(document, path, _NOT_A_PATH)
            else:
                self._read(text, file, status, IncludedFile)

    def _refuse_include(self, document: Document, path: Path, fault: str) -> None:
        """Report an entry of ``include`` if any of its files can't be read."""
        self.findings.complete = False
        place, shown = document.place(path)
        self.findings.problems.append(Problem(place, shown, fault))
