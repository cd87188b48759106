"""How a QEMU's own command line opened its disks.

QMP does not report a node's aio, discard and locking options, and a disk that
replaces another should be opened as that one was. Source: ``-blockdev`` and
``-drive`` of qemu(1), read from /proc/PID/cmdline.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

WANTED = ("aio", "discard", "locking")
BLOCKS = frozenset({"-blockdev", "--blockdev", "-drive", "--drive"})
DEVICES = frozenset({"-device", "--device"})
REMOTE = re.compile(r"(?!file:)[a-z][a-z0-9+]*:")
"""How a name begins that is no local file's: ``nbd:``, ``json:``."""


@dataclass(frozen=True)
class Given:
    """What a command line says of one disk: its options, and whether it spells out what
    lies below the active layer.
    """

    options: Mapping[str, str] = field(default_factory=dict)
    backing: bool = False


def given(pid: int | None, names: set[str]) -> Given:
    """What the command line of process ``pid`` says of the disk known by one of ``names``.

    Nothing for a disk that was plugged in later, or when there is no such process to read.
    """
    try:
        words = Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")
    except OSError:
        return Given()
    blocks = list(_blocks(words))
    for block in blocks:
        if names & {block.get("node-name"), block.get("id")}:
            spelled_out = any("backing" in key.split(".") for key in block)
            return Given(_wanted(block, blocks), spelled_out)
    return Given()


def boot_file(pid: int, names: set[str]) -> Path | None:
    """The local file that the command line of process ``pid`` opens as the active layer of the
    disk known by one of ``names``; None where it does not say.
    """
    try:
        words = Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")
        cwd = Path(f"/proc/{pid}/cwd").resolve()
    except OSError:
        return None
    devices = [device for device in _of(words, DEVICES) if device.get("id") in names]
    plugged = {device["drive"] for device in devices if "drive" in device}
    blocks = {b.get("node-name") or b.get("id", ""): b for b in _of(words, BLOCKS)}
    block = next((blocks[name] for name in (*plugged, *names) if name in blocks), None)
    while block and (below := blocks.pop(block.get("file", ""), None)):
        block = below
    named = block and (block.get("filename") or block.get("file.filename") or block.get("file"))
    return cwd / named.removeprefix("file:") if named and not REMOTE.match(named) else None


def _blocks(words: list[str]) -> Iterator[dict[str, str]]:
    return _of(words, BLOCKS)


def _of(words: list[str], options: frozenset[str]) -> Iterator[dict[str, str]]:
    for option, value in pairwise(words):
        if option in options:
            yield _flatten(json.loads(value)) if value.startswith("{") else _key_values(value)


def _key_values(text: str) -> dict[str, str]:
    pairs = (part.replace(",,", ",").partition("=") for part in re.split(r"(?<!,),(?!,)", text))
    return {key: value for key, _, value in pairs}


def _flatten(value: Mapping[str, object], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, item in value.items():
        if isinstance(item, Mapping):
            flat |= _flatten(item, f"{prefix}{key}.")
        else:
            flat[prefix + key] = ("on" if item else "off") if isinstance(item, bool) else str(item)
    return flat


def _wanted(block: dict[str, str], blocks: list[dict[str, str]]) -> dict[str, str]:
    below = next((b for b in blocks if b.get("node-name") == block.get("file")), {})
    found = {}
    for place in (block, below):  # what the file's node says counts most
        for key, value in place.items():
            *parents, name = key.split(".")
            if name in WANTED and "backing" not in parents:
                found[name] = value
    return found
