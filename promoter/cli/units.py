"""Sizes, rates and durations, as people write and read them."""

from __future__ import annotations

import re

import typer

UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
FASTEST = 2**62  # QEMU counts in 64 bits
SIZE = re.compile(r"([0-9]{1,7})([KM]?)(?:i?B)?", re.IGNORECASE)
CLUSTER_SIZES = frozenset(2**power for power in range(9, 22))
DURATION = re.compile(r"([0-9]+(?:\.[0-9]+)?)(ms|s)")
LEAST_PAUSE, LONGEST_PAUSE = 0.05, 30.0
SPEED = re.compile(r"([0-9]+(?:\.[0-9]+)?)([KMGT]?)(?:i?B)?(?:/s)?", re.IGNORECASE)


def human_bytes(count: float | None) -> str:
    """A size for people, in binary units."""
    if count is None:
        return "?"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def human_seconds(seconds: float | None) -> str:
    """A duration for people."""
    if seconds is None:
        return "?"
    if seconds < 1:
        return f"{seconds * 1000:.1f} ms"
    return f"{seconds:.1f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def parse_cluster_size(text: str) -> int:
    """Bytes from ``64k`` or ``2M``."""
    found = SIZE.fullmatch(text.strip())
    size = int(found[1]) * UNITS[found[2].upper()] if found else 0
    if size not in CLUSTER_SIZES:
        raise typer.BadParameter(
            f"{text!r} is not a cluster size: a power of two from 512 to 2M",
            param_hint="--cluster-size",
        )
    return size


def parse_duration(text: str) -> float:
    """Seconds from ``500ms`` or ``2s``."""
    found = DURATION.fullmatch(text.strip())
    seconds = float(found[1]) / (1000 if found[2] == "ms" else 1) if found else 0
    if not LEAST_PAUSE <= seconds <= LONGEST_PAUSE:
        raise typer.BadParameter(
            f"{text!r} is not a duration from {LEAST_PAUSE:g}s to {LONGEST_PAUSE:g}s,"
            " such as 500ms or 2s",
            param_hint="--max-pause",
        )
    return seconds


def parse_speed(text: str, where: str = "--speed") -> int:
    """Bytes per second from ``100M``, ``1.5GiB/s`` or ``0`` (no limit)."""
    found = SPEED.fullmatch(text.strip())
    speed = int(float(found[1]) * UNITS[found[2].upper()]) if found else FASTEST + 1
    if speed > FASTEST:
        raise typer.BadParameter(
            f"{text!r} is not a rate. Examples: 50M, 1.5GiB/s, 0 for no limit",
            param_hint=where,
        )
    return speed
