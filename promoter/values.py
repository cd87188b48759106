"""Values as JSON, and back: for the journal, for processes of ours, for other terminals.

How a kind of value is read and written is worked out when it is first needed, which takes longer
than many a command.
"""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import TypeAdapter

T = TypeVar("T")


_ADAPTERS: dict[Any, TypeAdapter[Any]] = {}


def adapter(kind: type[T]) -> TypeAdapter[T]:
    """What reads and writes values of this kind."""
    if kind not in _ADAPTERS:
        _ADAPTERS[kind] = TypeAdapter(kind)
    return _ADAPTERS[kind]


def to_json(value: object) -> str:
    """A dataclass as JSON."""
    kind: Any = type(value)
    return adapter(kind).dump_json(value).decode()


def from_json(kind: type[T], text: str | bytes) -> T:
    """The value that `to_json` wrote. Raises pydantic's ValidationError, a ValueError."""
    return adapter(kind).validate_json(text)
