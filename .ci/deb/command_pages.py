"""Writes the manual pages and the shell completions of both commands.

python command_pages.py LIBRARIES SHARE: the directory with brokerd and what it needs,
and the one that becomes /usr/share.
"""

from __future__ import annotations

import gzip
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from os import environ
from pathlib import Path
from typing import Final

#: Where each shell looks for the completion of a command.
COMPLETIONS: Final = {
    "bash": "bash-completion/completions/{}",
    "zsh": "zsh/vendor-completions/_{}",
    "fish": "fish/vendor_completions.d/{}.fish",
}

#: What each command is, for `apropos`.
PURPOSES: Final = {
    "brokerd": "message broker whose client every Python already has",
    "brokerctl": "control and use a running message broker",
}


def main(libraries: str, share: Path) -> None:
    """Write the pages of both commands."""
    sys.path.insert(0, libraries)
    from click.shell_completion import get_completion_class

    from brokerd.cli.main import main as brokerd
    from brokerd.ctl import brokerctl

    for name, section, command in (("brokerd", 8, brokerd), ("brokerctl", 1, brokerctl)):
        page = share / f"man/man{section}/{name}.{section}.gz"
        page.parent.mkdir(parents=True, exist_ok=True)
        text = "\n".join(manual_page(name, section, command)) + "\n"
        page.write_bytes(gzip.compress(text.encode(), 9, mtime=0))
        for shell, place in COMPLETIONS.items():
            kind = get_completion_class(shell)
            assert kind is not None
            file = share / place.format(name)
            file.parent.mkdir(parents=True, exist_ok=True)
            script = kind(command, {}, name, f"_{name.upper()}_COMPLETE")
            file.write_text(script.source_template % script.source_vars())


def manual_page(name: str, section: int, command: object) -> Iterator[str]:
    """Yield the lines of one page, in the macros of man(7)."""
    import click

    assert isinstance(command, click.Group)
    day = datetime.fromtimestamp(int(environ.get("SOURCE_DATE_EPOCH", "0")), UTC).date()
    yield f".TH {name.upper()} {section} {day} brokerd"
    yield ".SH NAME"
    yield f"{name} \\- {PURPOSES[name]}"
    yield ".SH SYNOPSIS"
    yield f".B {name}"
    yield "[\\fIOPTIONS\\fR] [\\fICOMMAND\\fR] [\\fIARGUMENTS\\fR]"
    yield ".SH DESCRIPTION"
    yield from paragraphs(command.help or "")
    yield ".SH OPTIONS"
    yield from options(click.Context(command, info_name=name))
    yield ".SH COMMANDS"
    for each, subcommand in sorted(command.commands.items()):
        context = click.Context(subcommand, info_name=each)
        usage = " ".join(subcommand.collect_usage_pieces(context))
        yield f".SS {escaped(f'{name} {each} {usage}')}"
        yield from paragraphs(subcommand.help or "")
        yield from options(context)
    if command.epilog:
        yield ".SH EXIT STATUS"
        yield ".nf"
        yield from map(escaped, command.epilog.replace("\b", "").strip().splitlines()[1:])
        yield ".fi"
    yield ".SH SEE ALSO"
    other = "brokerctl (1)" if name == "brokerd" else "brokerd (8)"
    yield f".BR {other},"
    yield "/usr/share/doc/brokerd"


def options(context: object) -> Iterator[str]:
    """Yield the options of a command."""
    import click

    assert isinstance(context, click.Context)
    for parameter in context.command.get_params(context):
        # The synopsis has the arguments.
        record = parameter.get_help_record(context)
        if isinstance(parameter, click.Option) and record is not None:
            yield ".TP"
            yield f"\\fB{escaped(record[0])}\\fR"
            yield escaped(record[1])


def paragraphs(text: str) -> Iterator[str]:
    """Yield a help text as paragraphs."""
    for block in text.replace("\b", "").split("\n\n"):
        yield ".PP"
        yield escaped(" ".join(block.split()))


def escaped(text: str) -> str:
    """Return a line that roff prints as it is."""
    line = text.replace("\\", "\\e").replace("-", "\\-")
    return f"\\&{line}" if line.startswith((".", "'")) else line


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
