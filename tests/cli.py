"""The command line as a user has it: a process with a journal of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any


@dataclass(frozen=True)
class Ran:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[dict[str, Any]]:
        """The objects of a ``--json`` command."""
        return [json.loads(line) for line in self.out.splitlines()]

    @property
    def result(self) -> dict[str, Any]:
        """The last of them."""
        return self.lines[-1]


def start(
    state: Path,
    *words: object,
    module: str = "promoter",
    enter: Sequence[object] = (),
    environment: Mapping[str, str] = MappingProxyType({}),
    output: int | IO[bytes] = subprocess.PIPE,
) -> subprocess.Popen[str]:
    """Start ``promoter WORDS`` with its journal in ``state``, by the command ``enter`` if given."""
    return subprocess.Popen(
        [*map(str, enter), sys.executable, "-m", module, *map(str, words)],
        env={**os.environ, "PROMOTER_STATE_DIR": str(state), **environment},
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.PIPE,
        pipesize=1 << 20,  # who says more than nobody reads stands still
        text=True,
    )


def ended(process: subprocess.Popen[str], timeout: float = 60) -> Ran:
    """Wait for a command's end."""
    out, err = process.communicate(timeout=timeout)
    return Ran(process.returncode, out, err)


def promoter(state: Path, *words: object) -> Ran:
    """Run ``promoter WORDS`` with its journal in ``state``."""
    return ended(start(state, *words))
