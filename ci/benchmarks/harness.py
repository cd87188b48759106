"""What tables have in common: turns, figures with their spread, Markdown, a plot, the machine."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread
from typing import TypeVar

import matplotlib
from matplotlib.figure import Figure

from ci.report import version_lines
from tests.vm import VM, accelerator

OTHER_WORK = 0.1  # of the processors' time, from which on a table says so
T = TypeVar("T")


@dataclass(frozen=True)
class Measure:
    """A column: its name with the unit, and how many digits tell something."""

    name: str
    digits: int = 0

    def show(self, figures: Sequence[float]) -> str:
        """The median, and where there are several figures the least and the most."""
        least, median, most = (
            f"{figure:.{self.digits}f}"
            for figure in (min(figures), statistics.median(figures), max(figures))
        )
        return f"{median} ({least}, {most})" if len(figures) > 1 else median


TIME = Measure("time, s", 2)


@dataclass(frozen=True)
class Row:
    """What one way did in one group. A run that did not end has no figures."""

    group: str
    way: str
    runs: list[tuple[float | None, ...]]

    def figures(self, column: int) -> list[float]:
        found = (run[column] for run in self.runs if run)
        return [figure for figure in found if figure is not None]

    @property
    def name(self) -> str:
        return ", ".join(filter(None, (self.group, self.way)))


class Table:
    """Ways to do the same thing, compared by the first measure with the way `against`.

    Only ways of one group are compared with each other.
    """

    def __init__(self, measures: Sequence[Measure], against: str = "") -> None:
        self.measures, self.against = tuple(measures), against
        self.rows: dict[tuple[str, str], Row] = {}

    def add(self, group: str, way: str, *figures: float | None) -> None:
        """One run. Without figures: it did not end."""
        row = self.rows.setdefault((group, way), Row(group, way, []))
        row.runs.append(figures)
        pairs = zip(self.measures, figures, strict=False)
        told = [f"{measure.show([f])} {measure.name}" for measure, f in pairs if f is not None]
        print(f"{row.name}: {'; '.join(told) or 'did not end'}", file=sys.stderr, flush=True)

    def markdown(self) -> str:
        rows = list(self.rows.values())
        grouped = any(row.group for row in rows)
        counted = not all(run for row in rows for run in row.runs)
        head = [""] * (1 + grouped) + ["ended"] * counted
        head += [measure.name for measure in self.measures]
        head += [f"against {self.against}"] if self.against else []
        lines = [head, ["---"] * len(head)]
        for row in rows:
            cells = [row.group] * grouped + [row.way]
            cells += [f"{sum(map(bool, row.runs))} of {len(row.runs)}"] * counted
            for column, measure in enumerate(self.measures):
                figures = row.figures(column)
                cells.append(measure.show(figures) if figures else "")
            cells += [self._ratio(row)] if self.against else []
            lines.append(cells)
        return "".join(f"| {' | '.join(line)} |\n" for line in lines)

    def _ratio(self, row: Row) -> str:
        """Of medians; empty where one of the two did not end."""
        ours, theirs = row.figures(0), self.rows[row.group, self.against].figures(0)
        if not ours or not theirs:
            return ""
        return f"{statistics.median(ours) / statistics.median(theirs):.2f}"

    def plot(self, file: Path) -> None:
        """Medians as bars, from least to most as lines; the same figures make the same bytes."""
        rows = list(self.rows.values())
        ways = dict.fromkeys(row.way for row in rows)
        colours = {way: f"C{number}" for number, way in enumerate(ways)}
        with matplotlib.rc_context(
            {"svg.hashsalt": file.stem, "svg.fonttype": "none", "font.size": 9}
        ):
            size = (2.5 + 2.5 * len(self.measures), 0.8 + 0.28 * len(rows))
            figure = Figure(figsize=size, layout="constrained")
            axes = figure.subplots(1, len(self.measures), sharey=True, squeeze=False)[0]
            for column, (axis, measure) in enumerate(zip(axes, self.measures, strict=True)):
                axis.set_title(measure.name, fontsize=9)
                axis.set_yticks(range(len(rows)), [row.name for row in rows])
                for place, row in enumerate(rows):
                    if figures := row.figures(column):
                        axis.barh(place, statistics.median(figures), color=colours[row.way])
                        axis.plot([min(figures), max(figures)], [place, place], color="black")
                    elif not any(row.runs):
                        axis.text(0, place, " did not end", verticalalignment="center")
                axis.set_xlim(left=0)
            axes[0].invert_yaxis()
            figure.savefig(file, format="svg", metadata={"Date": None})


def turns(ways: Sequence[T], rounds: int) -> Iterator[T]:
    """All ways in every round, each time another one first."""
    for number in range(rounds):
        first = number % len(ways)
        yield from (*ways[first:], *ways[:first])


def machine(directory: Path) -> str:
    """What figures of now come from, for a table whose files are in a directory."""
    versions = ", ".join(version_lines("promoter"))
    used = others()
    work = f"other work took {used:.0%} of the processors just before"
    return (
        f"{time.strftime('%F')}: {os.cpu_count()} x {processor()}, Linux {platform.release()}, "
        f"{file_system_of(directory)}, {accelerator().upper()}; {versions}; "
        + (f"**{work}: no figures of an idle machine**" if used > OTHER_WORK else work)
    )


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def others(seconds: float = 3.0) -> float:
    """Which part of the processors' time is used, while this process waits."""
    before = ticks()
    time.sleep(seconds)
    spent = [after - then for after, then in zip(ticks(), before, strict=True)]
    return 1 - sum(spent[3:5]) / sum(spent)  # idle, and waiting for storage


def ticks() -> list[int]:
    return [int(word) for word in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]


def file_system_of(directory: Path) -> str:
    command = ["findmnt", "--noheadings", "--output", "FSTYPE", "--target", str(directory)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def as_a_host_runs_it(vm: VM) -> None:
    """The guest yields to nobody, as it does in the tests."""
    for thread in Path(f"/proc/{vm.pid}/task").iterdir():
        os.setpriority(os.PRIO_PROCESS, int(thread.name), 0)


@dataclass(frozen=True)
class Write:
    """A record of the guest's writer: when the host heard of it, by `time.monotonic`, and what
    write and flush took in the guest; in seconds.
    """

    heard: float
    took: float


@contextmanager
def writes(log: Path) -> Iterator[list[Write]]:
    """What a guest writes inside the block, which has it all when the block has ended."""
    found: list[Write] = []
    ended = Event()

    def listen() -> None:
        with log.open() as said:
            said.seek(0, os.SEEK_END)
            rest = ""
            while not ended.wait(0.002):
                *lines, rest = (rest + said.read()).split("\n")
                now = time.monotonic()
                acks = [line.split() for line in lines if line.startswith("A ")]
                found.extend(Write(now, int(words[4]) / 1e6) for words in acks)

    listening = Thread(target=listen)
    listening.start()
    try:
        yield found
    finally:
        ended.set()
        listening.join()
