"""Files to a Config: reads them and follows their includes; every problem is found before any is raised.

The text is read by ``document``, its entries are judged by ``entries``. Writes nothing and opens no socket.
"""

from __future__ import annotations

import errno
import gc
import glob
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

from brokerd.config.document import Document, read
from brokerd.config.entries import Entries
from brokerd.config.findings import Findings
from brokerd.config.model import Config, File, IncludedFile
from brokerd.config.problems import ConfigError, Path, Place, Problem

__all__ = ["MAX_FILE", "Config", "ConfigError", "build", "load", "load_text"]

#: The largest configuration file, in bytes: some million clients.
MAX_FILE: Final = 256 * 2**20
# O_NONBLOCK: a FIFO without a writer must not hold anybody up. O_BINARY: Windows would end the file at a Ctrl-Z.
_OPEN_FLAGS: Final = (
    os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
)


def load(path: str | os.PathLike[str], environ: Mapping[str, str] | None = None) -> Config:
    """Return the configuration in a file and those it includes.

    environ: where ``key_env`` and CREDENTIALS_DIRECTORY are looked up; os.environ unless given.
    Raises ConfigError with every problem of every file.
    """
    files = _Files(os.fspath(path), environ)
    with _without_collections():
        files.read_main()
        return files.findings.config()


def load_text(text: str | bytes, path: str = "brokerd.yaml", environ: Mapping[str, str] | None = None) -> Config:
    """Return the configuration in a text. path: what it is called, and where relative paths start from.

    The text has no file, so keys in it are not held against a file's mode. Raises ConfigError as ``load``.
    """
    files = _Files(path, environ)
    with _without_collections():
        files.read_text(text)
        return files.findings.config()


def build(
    listen: Any,
    clients: Mapping[str, bytes | str | Mapping[str, Any]],
    *,
    limits: Mapping[str, Any] | None = None,
    log: Mapping[str, Any] | None = None,
    base: str = "",
) -> Config:
    """Return a configuration that a program made; see ``Config.build``."""
    entries = listen if isinstance(listen, list) else [listen]
    root: dict[str, Any] = {
        "listen": [list(entry) if isinstance(entry, tuple) else entry for entry in entries],
        "clients": {
            name: {"key": entry} if isinstance(entry, (bytes, str)) else dict(entry) for name, entry in clients.items()
        },
        **({} if limits is None else {"limits": dict(limits)}),
        **({} if log is None else {"log": dict(log)}),
    }
    files = _Files("(program)", None)
    files.judge(Document("(program)", root), base, None, File)
    return files.findings.config()


@contextmanager
def _without_collections() -> Iterator[None]:
    """Keep the garbage collector from walking, again and again, over a hundred thousand entries that all stay."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class _Unreadable(Exception):
    """A file can't be read as text; the message is what is wrong (what would be right).

    line, column: where in the file, 0 where it is the file as a whole.
    """

    def __init__(self, what: str, line: int = 0, column: int = 0) -> None:
        super().__init__(what)
        self.line = line
        self.column = column


class _Files:
    """Reads the main file and, depth first, those it includes; what it finds is in ``findings``."""

    def __init__(self, main: str, environ: Mapping[str, str] | None) -> None:
        self._main = main
        self.findings = Findings(main, os.environ if environ is None else environ)
        #: Files by their true path, so that none is read twice.
        self._seen: set[str] = set()

    def read_main(self) -> None:
        """Read the main file from the disk."""
        try:
            text, status = _text_of(self._main)
        except _Unreadable as error:
            self._refuse_main(error)
            return
        self._seen.add(os.path.realpath(self._main))
        self._read(text, self._main, status, File)

    def read_text(self, text: str | bytes) -> None:
        """Take a text for the main file's."""
        try:
            decoded = _decoded(text) if isinstance(text, bytes) else text.removeprefix("\ufeff")
        except _Unreadable as error:
            self._refuse_main(error)
            return
        self._read(decoded, self._main, None, File)

    def _refuse_main(self, error: _Unreadable) -> None:
        self.findings.whole = False
        place = Place(self._main, error.line or 1, error.column or 1)
        self.findings.problems.append(Problem(place, "", str(error)))

    def _read(self, text: str, file: str, status: os.stat_result | None, model: type[IncludedFile]) -> None:
        self.findings.files[file] = None
        self.judge(read(text, file), os.path.dirname(file), status, model)  # noqa: PTH120 - a Path would make "" a "."

    def judge(self, document: Document, base: str, status: os.stat_result | None, model: type[IncludedFile]) -> None:
        """Judge one file, then the files it includes.

        base: where its relative paths start. status: the file's, None where there is no file.
        """
        findings = self.findings
        findings.problems += document.problems
        findings.whole = findings.whole and document.whole
        root = document.root
        if isinstance(root, dict):
            entries = Entries(findings, document, base, status, model)
            entries.judge(root)
            for path, pattern in entries.includes:
                self._include(document, path, pattern, base)
            return
        what = "is no mapping (a configuration begins with keys such as listen: and clients:)"
        if root is None:
            # Included, a file of comments alone is an example; as the whole configuration it is a mistake.
            if model is not File or not document.whole:
                return
            what = "is empty (a configuration has listen: and clients:)"
        findings.whole = False
        findings.problems.append(Problem(Place(document.file, 1, 1), "", what))

    def _include(self, document: Document, path: Path, pattern: str, base: str) -> None:
        """Read the files that one entry of ``include`` names; one that was read before adds nothing."""
        for file in _matching(pattern, base):
            try:
                true = os.path.realpath(file)
                if true in self._seen:
                    continue
                self._seen.add(true)
                text, status = _text_of(file)
            except _Unreadable as error:
                self.findings.whole = False
                place, shown = document.place(path)
                if error.line:
                    self.findings.files[file] = None
                    place, shown = Place(file, error.line, error.column), ""
                self.findings.problems.append(Problem(place, shown, str(error)))
            except ValueError:
                place, shown = document.place(path)
                self.findings.problems.append(Problem(place, shown, "is no path (give a file or a pattern)"))
            else:
                self._read(text, file, status, IncludedFile)


def _matching(pattern: str, base: str) -> list[str]:
    """Return the files a pattern names, sorted; a pattern without wildcards names one, which may not exist."""
    pattern = os.path.expanduser(pattern)  # noqa: PTH111 - a Path would change how the name is shown
    if not glob.has_magic(pattern):
        return [os.path.join(base, pattern)]  # noqa: PTH118 - the same
    # The directory of the file may itself hold characters that mean something to glob.
    whole = os.path.join(glob.escape(base), pattern)  # noqa: PTH118 - the same
    return sorted(glob.glob(whole))  # noqa: PTH207 - Path.glob takes no absolute pattern


def _text_of(file: str) -> tuple[str, os.stat_result]:
    """Return a file's text and its status. Raises _Unreadable."""
    try:
        handle = os.open(file, _OPEN_FLAGS)
    except (OSError, ValueError) as error:
        raise _Unreadable(_unopened(file, error)) from None
    try:
        status = os.fstat(handle)
        if stat.S_ISDIR(status.st_mode):
            raise _Unreadable(f"{file} is a directory (give a file)")
        if stat.S_ISFIFO(status.st_mode):
            os.set_blocking(handle, True)
        elif not stat.S_ISREG(status.st_mode):
            raise _Unreadable(f"{file} is no file (give a file)")
        with open(handle, "rb", closefd=False) as stream:
            content = stream.read(MAX_FILE + 1)
    except OSError as error:
        raise _Unreadable(f"{file} can't be read: {error.strerror} (see to the disk)") from None
    finally:
        os.close(handle)
    if len(content) > MAX_FILE:
        raise _Unreadable(f"{file} is larger than {MAX_FILE // 2**20} MiB (split it with include:)")
    return _decoded(content), status


def _unopened(file: str, error: OSError | ValueError) -> str:
    if isinstance(error, ValueError):
        return "is no path (give a file)"
    if error.errno == errno.ENOENT:
        return f"there is no file {file} (make it, or give another)"
    if error.errno == errno.EACCES:
        return f"{file} can't be read: {error.strerror} (let this user read it)"
    return f"{file} can't be opened: {error.strerror} (give a file)"


def _decoded(content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        begin = content.rfind(b"\n", 0, error.start) + 1
        column = len(content[begin : error.start].decode(errors="replace")) + 1
        raise _Unreadable("is not UTF-8 (save it as UTF-8)", content.count(b"\n", 0, error.start) + 1, column) from None
