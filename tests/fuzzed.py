"""promoter that hears something else once: ``python -m tests.fuzzed SEED LINES COMMAND …``.

SEED chooses which of its monitor's first LINES, and what becomes of it; that is named on standard
error. A reply that does not come is waited for for a shorter time.
"""

from __future__ import annotations

import json
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

from qemu.qmp.protocol import AsyncProtocol

from promoter.cli.main import app
from promoter.guests import qmp

HUGE = 64 << 20
OTHERS: tuple[Any, ...] = (None, True, -1, 2**70, "", "\0", [], {}, [[]], {"x": 1})

Line = Callable[[random.Random, bytes], list[bytes]]


def garbage(rng: random.Random, line: bytes) -> list[bytes]:
    return [rng.randbytes(rng.randrange(1, 400)).replace(b"\n", b"?") + b"\n"]


def cut(rng: random.Random, line: bytes) -> list[bytes]:
    return [line[: rng.randrange(len(line))]]


def not_an_object(rng: random.Random, line: bytes) -> list[bytes]:
    return [json.dumps(rng.choice([[], 1, "return", None])).encode() + b"\n"]


def another_type(rng: random.Random, line: bytes) -> list[bytes]:
    message = json.loads(line)
    holder, key = rng.choice(list(places(message)))
    holder[key] = rng.choice(OTHERS)
    return [json.dumps(message).encode() + b"\n"]


def left_out(rng: random.Random, line: bytes) -> list[bytes]:
    message = json.loads(line)
    holder, key = rng.choice(list(places(message)))
    del holder[key]
    return [json.dumps(message).encode() + b"\n"]


def doubled(rng: random.Random, line: bytes) -> list[bytes]:
    return [line, line]


def huge(rng: random.Random, line: bytes) -> list[bytes]:
    message = json.loads(line)
    message["return"] = "x" * HUGE
    return [json.dumps(message).encode() + b"\n"]


def a_number(rng: random.Random, line: bytes) -> list[bytes]:
    return [json.dumps(json.loads(line) | {"return": 1}).encode() + b"\n"]


def an_error(rng: random.Random, line: bytes) -> list[bytes]:
    message = json.loads(line)
    message.pop("return", None)
    message["error"] = {"class": "GenericError", "desc": "made up"}
    return [json.dumps(message).encode() + b"\n"]


CHANGES: tuple[Line, ...] = (
    *(garbage, cut, not_an_object, another_type, left_out, doubled, huge, a_number, an_error),
)


BEGINNING = 2  # a greeting, and the answer to qmp_capabilities
FOR_GOOD = (another_type, left_out, a_number, an_error)


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Everything in a message that could be another: its holder and its key or index."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        yield value, key
        if isinstance(inner, dict | list):
            yield from places(inner)


class Fuzz:
    """One changed line, or one that comes after the next; now and then all from that one on but
    what a connection begins with.
    """

    def __init__(self, seed: int, lines: int) -> None:
        self._rng = random.Random(seed)
        self._at = self._rng.randrange(lines)
        self._change = self._rng.choice((*CHANGES, None))
        self._for_good = self._rng.random() < 0.2 and self._change in FOR_GOOD
        self._number = 0
        self._heard = Counter[Any]()
        self._pending: list[bytes] = []

    async def read(self, protocol: Any, original: Callable[[Any], Any]) -> bytes:
        if self._pending:
            return self._pending.pop(0)
        line: bytes = await original(protocol)
        number, self._number = self._number, self._number + 1
        self._heard[protocol] += 1
        late = self._for_good and number > self._at and self._heard[protocol] > BEGINNING
        if number != self._at and not late:
            return line
        name = self._change.__name__ if self._change else "swapped"
        sys.stderr.write(f"line {self._at}, {name}: {line[:200]!r}\n")
        if self._change:
            self._pending = self._change(self._rng, line)
        else:
            self._pending = [await original(protocol), line]
        return self._pending.pop(0)


def main() -> None:
    fuzz = Fuzz(int(sys.argv.pop(1)), int(sys.argv.pop(1)))
    qmp.REPLY_TIMEOUT = 2.0
    original = AsyncProtocol._readline
    patch.object(AsyncProtocol, "_readline", lambda self: fuzz.read(self, original)).start()
    app()


if __name__ == "__main__":
    main()
