"""The nightly's parts and its page."""

from __future__ import annotations

import base64
import re
from collections import Counter
from pathlib import Path

import pytest

from ci import nightly, report
from ci.benchmarks.__main__ import TABLES
from tests.vm import ROOT

FALLEN = """<testsuites><testsuite>
<testcase classname="tests.test_a" name="test_b[&lt;x&gt;]" time="61.5">
<failure message="m">def test_b():
&gt;   assert 1 == 2
E   assert 1 == 2</failure></testcase>
<testcase classname="tests.test_a" name="test_c" time="1"><skipped message="no XFS"/></testcase>
</testsuite></testsuites>"""


def test_every_file_of_tests_is_in_one_part_of_the_nightly() -> None:
    chosen = Counter(file for part in nightly.PARTS for file in nightly.files(part))
    shared = {file for part in nightly.ONLY for file in nightly.files(part)}
    every = Counter((ROOT / "tests").glob("test_*.py"))
    assert chosen == every + Counter(shared)
    assert set(nightly.ONLY.values()) == {"libvirt", "not libvirt"}, "each test is in one of them"


def test_every_benchmark_is_in_one_part_of_the_nightly() -> None:
    chosen = [table for part in nightly.TABLES.values() for table in part]
    assert sorted(chosen) == sorted(TABLES)


@pytest.mark.parametrize("part", [*nightly.FILES, nightly.OTHERS])
def test_a_part_of_tests_has_tests(part: str) -> None:
    assert nightly.files(part)


def test_the_public_nightly_runs_every_part() -> None:
    workflow = (ROOT / ".github" / "workflows" / "nightly.yml").read_text()
    (parts,) = re.findall(r"part:((?:\n +- [\w-]+)+)\n", workflow)
    assert parts.split()[1::2] == list(nightly.PARTS)


def test_the_page_names_what_fell_and_why_and_what_was_skipped(tmp_path: Path) -> None:
    (tmp_path / "kills.xml").write_text(FALLEN)
    report.write(tmp_path)
    page = (tmp_path / "index.html").read_text()
    assert "tests/test_a.py::test_b[&lt;x&gt;]" in page.replace("<wbr>", "")
    assert page.count('<tr class="failed">') == 1
    assert "<x>" not in page
    assert "<pre>assert 1 == 2</pre>" in page
    assert "1.0 min" in page
    assert "no XFS" in page
    assert "0 passed, 1 failed, 1 skipped" in page


def test_the_page_shows_each_benchmark_with_its_plot(tmp_path: Path) -> None:
    measured = tmp_path / report.BENCHMARKS
    measured.mkdir()
    (measured / "load.md").write_text("|  | time, s |\n| --- | --- |\n| <b> | 2.00 |\n")
    (measured / "load.svg").write_text("<svg/>")
    report.write(tmp_path)
    page = (tmp_path / "index.html").read_text()
    assert "<h2>load</h2><table>" in page
    assert "<td>2.00</td>" in page
    assert "<b>" not in page
    assert base64.b64encode(b"<svg/>").decode() in page


def test_a_part_that_does_not_pass_is_on_the_page_and_the_next_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nightly, "RESULTS", tmp_path)
    commands = {"test": ["sh", "-c", "echo no linter; exit 3"], "bench-others": ["true"]}
    monkeypatch.setattr(nightly, "COMMANDS", commands)
    assert nightly.main(["test", "bench-others"]) == 1
    page = (tmp_path / "index.html").read_text()
    assert "1 passed, 1 failed" in page
    assert "exit code 3\nno linter" in page


def test_a_part_that_takes_too_long_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nightly, "RESULTS", tmp_path)
    monkeypatch.setattr(nightly, "COMMANDS", {"bench-others": ["sleep", "60"]})
    monkeypatch.setattr(nightly, "LONGEST", 0.2)
    assert nightly.main(["bench-others"]) == 1
    assert "it took too long" in (tmp_path / "index.html").read_text()
