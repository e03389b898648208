"""``brokerd store``: check and copy the database of the mailboxes."""

from __future__ import annotations

from pathlib import Path

import click

from brokerd.config.load import load
from brokerd.config.problems import one_line
from brokerd.store.backup import Checked, back_up, check
from brokerd.store.directory import Refused

__all__ = ["back_up_to", "check_at", "directory_of"]

#: Most problems shown, of each kind.
_SHOWN = 20


def directory_of(config_path: Path) -> Path:
    """Return the directory that the configuration names.

    Raises ConfigError, or click.UsageError for a configuration without a store.
    """
    config = load(config_path)
    if config.store is None:
        raise click.UsageError(
            f"{config.path} has no store; give the directory of the database: --directory DIR"
        )
    return Path(config.store.path)


def check_at(path: Path) -> int:
    """Print what is wrong with a database; return the exit status."""
    try:
        checked = check(path)
    except Refused as error:
        in_use = " Check a backup: brokerd store backup FILE" if "in use" in str(error) else ""
        return _fail(f"{error}.{in_use}" if in_use else str(error))
    except OSError as error:
        return _fail(f"{error.filename or path}: {error.strerror or error}")
    return _show(str(path), checked)


def back_up_to(directory: Path, file: Path) -> int:
    """Copy a database, print what is in the copy, and return the exit status."""
    try:
        checked = back_up(directory, file)
    except Refused as error:
        return _fail(str(error))
    except OSError as error:
        return _fail(f"{error.filename or file}: {error.strerror or error}")
    if checked.problems:
        click.echo(f"brokerd: no backup was made, because {directory} is damaged", err=True)
    return _show(str(file), checked)


def _show(name: str, checked: Checked) -> int:
    for problem in (*checked.problems[:_SHOWN], *checked.damaged[:_SHOWN]):
        click.echo(one_line(f"{name}: {problem}"), err=True)
    hidden = len(checked.problems[_SHOWN:]) + len(checked.damaged[_SHOWN:])
    if hidden:
        click.echo(f"{name}: {hidden} more problems", err=True)
    if checked.problems:
        return 1
    state = "damaged messages" if checked.damaged else "ok"
    click.echo(
        f"{name}: {state}, {_counted(checked.mailboxes, 'mailbox', 'mailboxes')},"
        f" {_counted(checked.messages, 'message', 'messages')}"
    )
    return 1 if checked.damaged else 0


def _counted(number: int, singular: str, plural: str) -> str:
    return f"{number} {singular if number == 1 else plural}"


def _fail(problem: str) -> int:
    click.echo(one_line(f"brokerd: {problem}"), err=True)
    return 1
