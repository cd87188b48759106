"""The configuration file: what an operator would otherwise say with each command.

TOML; docs/promoter.toml shows every key. The command line and the environment win over it. A key
that is not known, or a value of another type, is a wrong use: exit code 2.
"""

from __future__ import annotations

import os
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any, Literal

import msgspec
import typer
from typer.core import TyperGroup

SYSTEM = Path("/etc/promoter.toml")


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The keys; None, or empty, for what is not said."""

    connect: str | None = None
    state_dir: str | None = None
    speed: str | None = None
    seed: Literal["auto", "reflink", "copy", "convert", "none"] | None = None
    old: Literal["aside", "delete"] | None = None
    scan: tuple[str, ...] = ()
    max_pause: str | None = None
    hook: tuple[str, ...] = ()


def config_file() -> Path | None:
    """PROMOTER_CONFIG, none if that is empty; else the user's own file, or the host's."""
    if (given := os.environ.get("PROMOTER_CONFIG")) is not None:
        return Path(given) if given else None
    files = [SYSTEM]
    if os.geteuid():
        base = os.environ.get("XDG_CONFIG_HOME")
        files.insert(0, (Path(base) if base else Path.home() / ".config") / "promoter.toml")
    return next((file for file in files if file.exists()), None)


@cache
def settings() -> Settings:
    """What the file says. Raises BadParameter, which is exit code 2."""
    try:
        file = config_file()
    except PermissionError as error:
        whose = f"is {Path.home()}, which is HOME, another user's?"
        raise typer.BadParameter(f"{error.filename}: {error.strerror}: {whose}") from error
    return Settings() if file is None else _read(file)


def _read(file: Path) -> Settings:
    import tomllib

    try:
        with file.open("rb") as opened:
            keys = tomllib.load(opened)
        for key in keys.keys() - {*Settings.__struct_fields__}:
            near = get_close_matches(key, Settings.__struct_fields__, 1, 0)
            raise typer.BadParameter(f"{file}: no such key: {key}. Did you mean {near[0]}?")
        return msgspec.convert(keys, Settings)
    except (OSError, ValueError) as error:
        raise typer.BadParameter(f"{file}: {error}") from error


def configure(context: typer.Context) -> None:
    """Have the command that is called take what the file says for what it was not told."""
    if context.invoked_subcommand == "hook":
        return  # no slip in a file keeps a domain from its start
    said = msgspec.structs.asdict(settings())
    said["state"] = said.pop("state_dir")
    defaults: dict[str, Any] = {name: value for name, value in said.items() if value}
    group, name = context.command, context.invoked_subcommand or ""
    assert isinstance(group, TyperGroup)
    called = group.get_command(context, name)
    of_each = called.list_commands(context) if isinstance(called, TyperGroup) else None
    context.default_map = {name: dict.fromkeys(of_each, defaults) if of_each else defaults}
