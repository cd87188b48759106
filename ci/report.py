"""One HTML page, which needs no other file, of the JUnit files and benchmarks in a directory."""

from __future__ import annotations

import base64
import html
import platform
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from markdown_it import MarkdownIt

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / ".nightly"
BENCHMARKS = "bench"  # where ci/bench leaves a table and its plot in there
LINES = 8  # of a failure
SLOWEST = 15
STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; }
table { border-collapse: collapse; width: 100%; margin: 1em 0; }
th, td { text-align: left; padding: .25em .6em; border-bottom: 1px solid #8886; }
td { vertical-align: top; }
td, p { overflow-wrap: anywhere; }
.n { white-space: nowrap; }
.failed { color: #c62828; font-weight: bold; }
.passed { color: #2e7d32; }
img { max-width: 100%; background: white; }
pre { font-size: 12px; background: #8882; padding: .6em; margin: .3em 0 1.2em;
      white-space: pre-wrap; overflow-wrap: anywhere; }
"""


@dataclass(frozen=True)
class Case:
    """A test that ran, by the name that pytest takes; its seconds, and why it did not pass."""

    part: str
    name: str
    seconds: float
    outcome: str
    why: str = ""


def add(junit: Path, part: str, seconds: float, log: Path, failure: str | None) -> None:
    """Put a part's own end into its JUnit file, as the test that the part is."""
    tree = (
        ElementTree.parse(junit).getroot() if junit.exists() else ElementTree.Element("testsuites")
    )
    suite = ElementTree.SubElement(tree, "testsuite", name="ci/nightly", tests="1")
    case = ElementTree.SubElement(suite, "testcase", name=part, time=f"{seconds:.3f}")
    suite.set("failures", "1" if failure else "0")
    if failure:
        last = log.read_text(errors="replace").splitlines()[1 - LINES :]
        fell = ElementTree.SubElement(case, "failure", message=failure)
        fell.text = "".join(c for c in "\n".join([failure, *last]) if c.isprintable() or c == "\n")
    ElementTree.ElementTree(tree).write(junit, encoding="unicode", xml_declaration=True)


def cases(junit: Path) -> Iterator[Case]:
    for test in ElementTree.parse(junit).iter("testcase"):
        file = test.get("classname", "").replace(".", "/")
        name = f"{file}.py::{test.get('name')}" if file else test.get("name", "")
        outcome, why = "passed", ""
        for child in test:
            if child.tag in ("failure", "error"):
                outcome, why = "failed", child.text or child.get("message") or ""
            elif child.tag == "skipped":
                outcome, why = "skipped", child.get("message") or ""
        yield Case(junit.stem, name, float(test.get("time", 0)), outcome, why)


def heart(why: str) -> str:
    """The first lines of what pytest says is wrong (they begin with E), or the first of all."""
    lines = why.strip().splitlines()
    wrong = [line[1:].strip() for line in lines if line.startswith("E ")]
    return "\n".join((wrong or lines)[:LINES])


def duration(seconds: float) -> str:
    return f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.1f} s"


def breakable(text: str) -> str:
    return html.escape(text).replace("_", "_<wbr>")


def row(*cells: object, tag: str = "td") -> str:
    """A table's row; numbers and durations stay on one line, tests' names break between words."""
    drawn = []
    for cell in cells:
        text = str(cell)
        short = ' class="n"' if text[:1].isdigit() else ""
        drawn.append(f"<{tag}{short}>{breakable(text)}</{tag}>")
    return f"<tr>{''.join(drawn)}</tr>"


def version_lines(tool: str | Path) -> list[str]:
    """What a tool says its version is."""
    said = subprocess.run([tool, "--version"], check=True, stdout=subprocess.PIPE, text=True)
    return said.stdout.splitlines()


def versions() -> Iterator[tuple[str, str]]:
    yield "promoter, QEMU, libvirt", ", ".join(version_lines("promoter"))
    for tool in sorted((ROOT / ".qemu").glob("*/bin/qemu-img")):
        yield f"QEMU of .qemu/{tool.parent.parent.name}", version_lines(tool)[0]
    yield "kernel", platform.release()
    yield "Python", platform.python_version()


def part_rows(found: list[Case]) -> Iterator[str]:
    yield row("part", "passed", "failed", "skipped", "tests' time, added up", tag="th")
    for part in dict.fromkeys(case.part for case in found):
        of = [case for case in found if case.part == part]
        count = Counter(case.outcome for case in of)
        counts = (count["passed"], count["failed"], count["skipped"])
        drawn = row(part, *counts, duration(sum(case.seconds for case in of)))
        yield drawn.replace("<tr>", '<tr class="failed">') if count["failed"] else drawn


def failures(found: list[Case]) -> Iterator[str]:
    for case in found:
        if case.outcome == "failed":
            yield (
                f'<p><span class="failed">{breakable(case.name)}</span>'
                f" ({case.part}, {duration(case.seconds)})</p>"
                f"<pre>{html.escape(heart(case.why))}</pre>"
            )


def benchmarks(directory: Path) -> Iterator[str]:
    """Each table with its plot."""
    for table in sorted(directory.glob("*.md")):
        plot = base64.b64encode(table.with_suffix(".svg").read_bytes()).decode()
        yield f"<h2>{html.escape(table.stem)}</h2>"
        yield MarkdownIt("js-default").render(table.read_text())
        yield f'<img alt="" src="data:image/svg+xml;base64,{plot}">'


def page(found: list[Case], measured: Path) -> str:
    count = Counter(case.outcome for case in found)
    verdict = "failed" if count["failed"] else "passed"
    reasons = Counter(case.why for case in found if case.outcome == "skipped")
    slowest = sorted(found, key=lambda case: -case.seconds)[:SLOWEST]
    total = ", ".join(f"{count[name]} {name}" for name in ("passed", "failed", "skipped"))
    blocks = [
        f'<h1>promoter, nightly: <span class="{verdict}">{verdict}</span></h1>',
        f"<p>{time.strftime('%F %H:%M %Z')}: {total}</p>",
        "<table>",
        *part_rows(found),
        "</table>",
        *(["<h2>What fell</h2>", *failures(found)] if count["failed"] else []),
    ]
    if reasons:
        blocks += ["<h2>Skipped</h2><table>", row("tests", "because", tag="th")]
        blocks += [*(row(number, why) for why, number in reasons.most_common()), "</table>"]
    blocks += ["<h2>Slowest</h2><table>"]
    blocks += [*(row(duration(case.seconds), case.name) for case in slowest), "</table>"]
    blocks += benchmarks(measured)
    blocks += ["<h2>On</h2><table>", *(row(*version) for version in versions()), "</table>"]
    head = '<!doctype html><html lang="en"><meta charset="utf-8"><title>promoter, nightly</title>'
    return f"{head}<style>{STYLE}</style>{''.join(blocks)}</html>\n"


def write(results: Path) -> None:
    """Write `index.html` of the directory's JUnit files, beside them."""
    found = [case for junit in sorted(results.glob("*.xml")) for case in cases(junit)]
    (results / "index.html").write_text(page(found, results / BENCHMARKS))
