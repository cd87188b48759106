"""The man pages of promoter's commands, of what `--help` says: `python -m ci.man` writes them.

They lie in docs/man, since who installs promoter has not what is needed to make them.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from promoter import __version__
from promoter.cli.main import app
from promoter.errors import KINDS

PAGES = Path(__file__).resolve().parent.parent / "docs" / "man"
EXIT_CODES = {0: "Done, or nothing to do.", 2: "Wrong usage."} | {
    kind.exit_code: (kind.__doc__ or "").partition("\n")[0] for kind in KINDS
}


def roff(text: str) -> str:
    """Text that groff shows as it is, but for commands in backquotes, which are bold."""
    text = text.replace("\\", r"\e").replace("-", r"\-")
    text = re.sub("`([^`]*)`", r"\\fB\1\\fP", text)
    return re.sub(r"^(?=[.'])", r"\\&", text, flags=re.MULTILINE)


def section(title: str) -> str:
    return f".SH {title}"


def entries(pairs: dict[str, str]) -> Iterator[str]:
    for name, text in pairs.items():
        yield from (".TP", rf"\fB{roff(name)}\fP", roff(text))


def paragraphs(help_text: str) -> str:
    return "\n.PP\n".join(roff(each.replace("\n", " ")) for each in help_text.split("\n\n"))


def helped(context: Any, kind: str) -> dict[str, str]:
    """What the options, or the arguments, do, by how they are written."""
    found = (
        each.get_help_record(context)
        for each in context.command.get_params(context)
        if each.param_type_name == kind
    )
    return dict(record for record in found if record)


def below(command: Any) -> list[Any]:
    """The commands of a group that are for people."""
    return [each for each in getattr(command, "commands", {}).values() if not each.hidden]


def summary(command: Any) -> str:
    return str(command.get_short_help_str(limit=1000))


def page(context: Any) -> str:
    """One command's man page."""
    command, path = context.command, context.command_path
    name, usage = path.replace(" ", "-"), " ".join(command.collect_usage_pieces(context))
    lines = [
        f'.TH {name.upper()} 1 "" "promoter {__version__}"',
        section("NAME"),
        rf"{roff(name)} \- {roff(summary(command).rstrip('.'))}",
        section("SYNOPSIS"),
        rf"\fB{roff(path)}\fP {roff(re.sub('[{}]', '', usage))}",
        section("DESCRIPTION"),
        paragraphs(command.help),
    ]
    told = {f"{path} {each.name}": summary(each) for each in below(command)}
    for title, pairs in (
        ("COMMANDS", told),
        ("ARGUMENTS", helped(context, "argument")),
        ("OPTIONS", helped(context, "option")),
    ):
        if pairs:
            lines += [section(title), *entries(pairs)]
    if context.parent is None:
        lines += [section("EXIT STATUS")]
        lines += entries({str(code): EXIT_CODES[code] for code in sorted(EXIT_CODES)})
    else:
        lines += [section("SEE ALSO"), r"\fBpromoter\fP(1)"]
    return "\n".join(lines) + "\n"


def pages(command: Any = None, parent: Any = None) -> Iterator[tuple[str, str]]:
    """Each command's man page, and the name of its file."""
    command = command or typer.main.get_command(app)
    context = command.context_class(
        command, parent, command.name or "promoter", **command.context_settings
    )
    yield f"{context.command_path.replace(' ', '-')}.1", page(context)
    for each in below(command):
        yield from pages(each, context)


def main() -> int:
    PAGES.mkdir(exist_ok=True)
    for old in PAGES.glob("*.1"):
        old.unlink()
    for name, text in pages():
        (PAGES / name).write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
