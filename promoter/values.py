"""Values as JSON, and back: for the journal, for processes of ours, for other terminals."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import msgspec

T = TypeVar("T")


def to_json(value: object) -> str:
    """A dataclass as JSON."""
    return msgspec.json.encode(value, enc_hook=_from_path).decode()


def as_builtins(value: object) -> dict[str, Any]:
    """A dataclass as what JSON can hold."""
    fields: dict[str, Any] = msgspec.to_builtins(value, enc_hook=_from_path)
    return fields


def from_json(kind: type[T], text: str | bytes) -> T:
    """The value that `to_json` wrote. Raises msgspec's ValidationError, a ValueError."""
    return msgspec.json.decode(text, type=kind, dec_hook=_to_path)


def from_builtins(kind: type[T], fields: object) -> T:
    """The value that `from_json` would make of it, from what JSON was read as already."""
    return msgspec.convert(fields, kind, dec_hook=_to_path)


def _from_path(value: object) -> str:
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{value!r} is no value")


def _to_path(kind: type[Any], value: object) -> Path:
    if issubclass(kind, Path) and isinstance(value, str):
        return Path(value)
    raise TypeError(f"{value!r} is no {kind}")
