"""What ci/bench makes of its figures."""

from __future__ import annotations

from pathlib import Path

import pytest

from ci.benchmarks import __main__ as bench
from ci.benchmarks.harness import TIME, Measure, Table, turns


@pytest.fixture
def table() -> Table:
    """Of two ways, the second of which ends only without load."""
    made = Table([TIME, Measure("downtime, ms")], "mirror")
    for took in (2, 3, 7):
        made.add("no load", "mirror", took, 5)
    made.add("no load", "snapshots", 6, None)
    made.add("load", "mirror", 4, 9)
    made.add("load", "snapshots")
    return made


def test_medians_are_shown_with_their_spread_and_no_ratio_against_who_did_not_end(
    table: Table,
) -> None:
    assert table.markdown().splitlines()[2:] == [
        "| no load | mirror | 3 of 3 | 3.00 (2.00, 7.00) | 5 (5, 5) | 1.00 |",
        "| no load | snapshots | 1 of 1 | 6.00 |  | 2.00 |",
        "| load | mirror | 1 of 1 | 4.00 | 9 | 1.00 |",
        "| load | snapshots | 0 of 1 |  |  |  |",
    ]


def test_a_plot_is_the_same_for_the_same_figures(table: Table, tmp_path: Path) -> None:
    plots = []
    for directory in (tmp_path / "a", tmp_path / "b"):
        directory.mkdir()
        table.plot(directory / "load.svg")
        plots.append((directory / "load.svg").read_text())
    assert plots[0] == plots[1]
    assert plots[0].count("did not end") == 2, "in each measure"
    assert "load, snapshots" in plots[0]


def test_each_way_is_the_first_in_turn() -> None:
    assert list(turns("abc", 3)) == [*"abc", *"bca", *"cab"]


@pytest.mark.parametrize("name", bench.TABLES)
def test_a_table_has_its_place_in_the_documents(
    name: str, table: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = bench.PAGE.read_text()
    monkeypatch.setattr(bench, "PAGE", tmp_path / "benchmarks.md")
    bench.PAGE.write_text(before)
    for text in ("first", "second"):
        bench.document(name, table, text)
    after = bench.PAGE.read_text()
    assert f"<!-- {name} -->\nsecond\n![{name}](benchmarks/{name}.svg)\n<!-- end of {name}" in after
    assert after.partition("<!--")[0] == before.partition("<!--")[0]
    assert after.rpartition("-->")[2] == before.rpartition("-->")[2]
    assert "first" not in after.partition(f"<!-- {name} -->")[2].partition("<!-- end")[0]
    assert (tmp_path / "benchmarks" / f"{name}.svg").exists()
