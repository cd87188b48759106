"""A report for a terminal, and as one HTML file that needs nothing else.

jinja2 is loaded for a page alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from promoter.cli.units import human_bytes, human_seconds
from promoter.errors import Refused
from promoter.operations.report import Facts, Layer, Phase, Report
from promoter.storage.files import write_whole

WIDTH, HEIGHT = 640, 120
MOST_BARS = 8
PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{{ report.kind }} {{ report.id }}</title>
<style>
body { font: 14px/1.45 system-ui, sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em;
  color: #222; background: #fff }
h1 { font-size: 1.5em } h2 { font-size: 1.15em; margin-top: 1.6em }
h3 { font-size: 1em; margin-bottom: .2em }
table { border-collapse: collapse; width: 100% }
td, th { text-align: left; vertical-align: top; padding: .2em .8em .2em 0;
  border-bottom: 1px solid #ddd; overflow-wrap: anywhere }
td.n { text-align: right; white-space: nowrap } .at { white-space: nowrap; color: #666 }
.done { color: #176b2c } .failed, .interrupted { color: #a11 } .bad { color: #a11 }
svg { width: 100%; height: auto; background: #f6f7f9 }
polyline { fill: none; stroke: #1f5fa8; stroke-width: 1.5 } polyline.d { stroke: #c2571a }
section.part { border-left: 3px solid #ddd; padding-left: 1em }
@media print { body { margin: 0; max-width: none; font-size: 10pt }
  tr, svg { break-inside: avoid } h2, h3 { break-after: avoid } }
</style>
{% macro chain(layers, nothing) %}{% for layer in layers %}<tr><td>{{ layer.file }}</td>
<td>{{ layer.format }}</td><td class="n">{{ layer.virtual_bytes | size }}</td>
<td class="n">{{ layer.allocated_bytes | size }}</td></tr>
{% else %}<tr><td colspan="4">{{ nothing }}</td></tr>
{% endfor %}{% endmacro %}
{% macro story(report) %}
<table>{% for name, text in head(report) %}<tr><th>{{ name }}</th>
<td{% if name == "status" %} class="{{ text }}"{% endif %}>{{ text }}</td></tr>
{% endfor %}</table>
{% for disk in report.disks %}
<h2>Disk {{ disk.disk }}</h2>
<table>{% for name, text in facts(disk) %}<tr><th>{{ name }}</th><td>{{ text }}</td></tr>
{% endfor %}</table>
<h3>Its chain, the active layer first: before</h3>
<table><tr><th>file</th><th>format</th><th>size</th><th>allocated</th></tr>
{{ chain(disk.before, "not known") }}</table>
<h3>and after</h3>
<table>{{ chain(disk.after, "not decided yet, or nothing was made") }}</table>
{% endfor %}
<h2>What happened</h2>
<table><tr><th>UTC</th><th>what</th><th>took</th><th>outcome</th></tr>
{% for each in report.timeline %}<tr><td class="at">{{ each.at | clock }}</td>
<td>{{ each.what }}</td><td class="n">{{ each.seconds | took }}</td>
<td{% if each.outcome not in ("done", "") %} class="bad"{% endif %}>{{ each.outcome }}</td></tr>
{% endfor %}</table>
{% if report.phases %}<h2>Rates</h2>{% endif %}
{% for phase in report.phases %}
<h3>{{ phase.disk }}: {{ phase.phase }}, {{ phase.samples[-1].done | size }} of
{{ phase.samples[-1].total | size }} in {{ phase.seconds | took }},
{{ phase.rate | size }}/s</h3>
{% if phase.samples | length > 1 %}
<svg viewBox="0 0 {{ width }} {{ height }}" role="img">
<polyline points="{{ line(phase, "rate") }}"/>
<polyline class="d" points="{{ line(phase, "dirtied") }}"/></svg>
<div>blue: copied, orange: rewritten by the guest; the top is {{ top(phase) | size }}/s,
the right end {{ phase.seconds | took }}</div>{% endif %}
{% endfor %}
{% if report.epochs %}<h2>Epochs of leases</h2>
<table>{% for each in report.epochs %}<tr><td class="at">{{ each.at | clock }}</td>
<td>{{ each.file }}</td><td>epoch {{ each.epoch }}</td></tr>
{% endfor %}</table>{% endif %}
{% for part in report.parts %}<h2>{{ part.kind }} {{ part.id }}, a part of it</h2>
<section class="part">{{ story(part) }}</section>{% endfor %}
{% endmacro %}
<h1>{{ report.kind }} {{ report.id }} of {{ report.guest }}</h1>
{{ story(report) }}
</html>
"""


def write_page(report: Report, file: Path) -> None:
    """Write the report as HTML; there is the whole of it, or what was there before."""
    try:
        write_whole(file, page(report).encode())
    except OSError as error:
        raise Refused(f"cannot write {file}: {error}", "Name another file.") from error


def page(report: Report) -> str:
    """The report as an HTML document. It has no script, and refers to nothing outside."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined)
    environment.filters |= {"size": human_bytes, "took": _took, "clock": _clock}
    template = environment.from_string(PAGE)
    return template.render(
        report=report, head=_head, facts=_rows, line=_line, top=_top, width=WIDTH, height=HEIGHT
    )


def lines(report: Report) -> RenderableType:
    """The report for a terminal."""
    return Group(*_parts(report))


def _parts(report: Report) -> Iterator[RenderableType]:
    yield f"[bold]{escape(f'{report.kind} {report.id} of {report.guest}')}"
    yield _table(_head(report))
    for disk in report.disks:
        yield f"\n[bold]disk {escape(disk.disk)}"
        yield _table([*_rows(disk), *_chain("before", disk.before), *_chain("after", disk.after)])
    yield "\n[bold]what happened"
    yield _table(
        (_clock(each.at), each.what, _took(each.seconds), each.outcome) for each in report.timeline
    )
    if report.phases:
        yield "\n[bold]rates"
        yield _table(
            (_clock(phase.at), f"{phase.disk}: {phase.phase}", _took(phase.seconds), _rates(phase))
            for phase in report.phases
        )
    if report.epochs:
        yield "\n[bold]epochs of leases"
        yield _table((_clock(each.at), each.file, str(each.epoch)) for each in report.epochs)
    for part in report.parts:
        yield ""
        yield from _parts(part)


def _table(rows: Sequence[Sequence[str]] | Iterator[Sequence[str]]) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    for row in rows:
        table.add_row(*map(escape, row))
    return table


def _head(report: Report) -> list[tuple[str, str]]:
    rows = [
        ("status", str(report.status)),
        ("result", report.result or ""),
        ("began", report.started),
        ("took", _took(report.seconds)),
    ]
    if report.resumed:
        rows.append(("resumed", f"{report.resumed} times"))
    return [row for row in rows if row[1]]


def _rows(disk: Facts) -> list[tuple[str, str]]:
    seed = f"by {disk.seed}, {human_bytes(disk.seeded_bytes)}" if disk.seed else None
    copied = None if disk.copied_bytes is None else human_bytes(disk.copied_bytes)
    rows = [
        ("way", disk.way),
        ("base", seed),
        ("copied in the guest", copied),
        ("stopped for the mirror's start", _took(disk.start_pause_s)),
        ("guest's I/O stood still", _took(disk.switchover_s)),
        ("file systems frozen", _took(disk.frozen_s)),
        ("verification", disk.verification),
        *(("kept", file) for file in disk.kept),
    ]
    return [(name, text) for name, text in rows if text]


def _chain(name: str, layers: Sequence[Layer]) -> Iterator[tuple[str, str]]:
    for index, layer in enumerate(layers):
        size = "" if layer.allocated_bytes is None else f", {human_bytes(layer.allocated_bytes)}"
        yield ("" if index else name), f"{layer.file} ({layer.format}{size})"


def _rates(phase: Phase) -> str:
    """Bytes, the mean, and how the rate went."""
    last = phase.samples[-1]
    dirtied = max((sample.dirtied or 0.0 for sample in phase.samples), default=0.0)
    also = f", the guest rewrote up to {human_bytes(dirtied)}/s" if dirtied else ""
    bars = phase.samples[:: max(1, len(phase.samples) // MOST_BARS)]
    went = " ".join(f"{human_bytes(sample.rate)}/s" for sample in bars)
    done = f"{human_bytes(last.done)} of {human_bytes(last.total)}, {human_bytes(phase.rate)}/s"
    return f"{done}{also}: {went}"


def _top(phase: Phase) -> float:
    """What the upper edge of a phase's picture is, in bytes a second."""
    return max(max(sample.rate, sample.dirtied or 0.0) for sample in phase.samples)


def _line(phase: Phase, of: str) -> str:
    """The points of a line in a phase's picture."""
    across, up = phase.seconds or 1.0, _top(phase) or 1.0
    return " ".join(
        f"{sample.elapsed / across * WIDTH:.1f},{HEIGHT - getattr(sample, of) / up * HEIGHT:.1f}"
        for sample in phase.samples
        if getattr(sample, of) is not None
    )


def _took(seconds: float | None) -> str:
    return "" if seconds is None else human_seconds(seconds)


def _clock(at: str) -> str:
    return at[:23].replace("T", " ")
