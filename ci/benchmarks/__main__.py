"""Measures, and keeps what it found for ci/nightly's page or in the documents."""

from __future__ import annotations

import argparse
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import libvirt

from ci.benchmarks.commands import commands
from ci.benchmarks.guest import guest
from ci.benchmarks.handover import handover, unplug
from ci.benchmarks.harness import Table, machine
from ci.benchmarks.load import load
from ci.benchmarks.promote import chains, growth, pauses, seeds
from ci.benchmarks.virsh import consolidate, convergence, domains
from ci.report import BENCHMARKS, RESULTS, ROOT

PAGE = ROOT / "docs" / "benchmarks.md"
TABLES: dict[str, Callable[[Path, bool], Table]] = {
    "domains": domains,
    "load": load,
    "guest": guest,
    "seeds": seeds,
    "growth": growth,
    "chains": chains,
    "pauses": pauses,
    "consolidate": consolidate,
    "convergence": convergence,
    "handover": handover,
    "unplug": unplug,
    "commands": commands,
}
NOT_BY_DEFAULT = {"chains", "convergence", "unplug"}  # for them there are no 15 minutes


def measure(name: str, whole: bool) -> tuple[Table, str]:
    """The table, and in Markdown with what machine it is of."""
    with tempfile.TemporaryDirectory() as directory:
        on = machine(Path(directory))
        table = TABLES[name](Path(directory), whole)
    return table, f"{table.markdown()}\nMedians (least, most). {on}.\n"


def keep(directory: Path, name: str, table: Table, text: str) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / f"{name}.md").write_text(text)
    table.plot(directory / f"{name}.svg")


def document(name: str, table: Table, text: str) -> None:
    """Put it where the documents have it: between two comments."""
    pictures = PAGE.with_suffix("")
    pictures.mkdir(exist_ok=True)
    table.plot(pictures / f"{name}.svg")
    head, begin, rest = PAGE.read_text().partition(f"<!-- {name} -->\n")
    _, end, tail = rest.partition(f"<!-- end of {name} -->\n")
    shown = f"{text}\n![{name}]({pictures.name}/{name}.svg)\n"
    PAGE.write_text(f"{head}{begin}{shown}{end}{tail}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="ci/bench")
    chosen = [name for name in TABLES if name not in NOT_BY_DEFAULT]
    told = f"of {', '.join(TABLES)}; default: all but {', '.join(sorted(NOT_BY_DEFAULT))}"
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=told)
    parser.add_argument("--whole", action="store_true", help="all cases, and more rounds: 2 hours")
    parser.add_argument("--docs", action="store_true", help="put them into docs/benchmarks.md")
    asked = parser.parse_args()
    if unknown := set(asked.tables) - set(TABLES):
        parser.error(f"no such table: {', '.join(sorted(unknown))}")
    libvirt.registerErrorHandler(lambda *_: None, None)  # it prints what it raises too
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that it cleans up
    for name in asked.tables or chosen:
        began = time.monotonic()
        table, text = measure(name, asked.whole)
        print(f"\n{name}, {(time.monotonic() - began) / 60:.1f} min\n\n{text}", flush=True)
        keep(RESULTS / BENCHMARKS, name, table, text)
        if asked.docs:
            document(name, table, text)


if __name__ == "__main__":
    main()
