"""Fixtures of all tests."""

import json
import os
import signal
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import libvirt
import pytest
from hypothesis import settings

from tests.domains import Domain, Libvirtd
from tests.vm import ROOT, VM, Disk, other_qemu

Make = Callable[[Sequence[Disk]], VM | Domain]

os.environ["PROMOTER_CONFIG"] = ""  # this host's own is not the tests'

settings.register_profile("promoter", database=None, deadline=None, max_examples=60)
settings.load_profile("promoter")


class Coverage:
    """Writes docs/coverage.md when every cell of test_coverage.py held in this run."""

    def __init__(self) -> None:
        self.outcomes: dict[int, str] = {}
        self.failed = False

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        properties: dict[str, Any] = dict(report.user_properties)
        if report.when == "call" and report.passed and "covered" in properties:
            number, outcome = properties["covered"]
            self.outcomes[number] = outcome
        self.failed |= report.failed and "test_coverage.py" in report.nodeid

    def pytest_sessionfinish(self) -> None:
        if self.outcomes and not self.failed:
            from tests.test_coverage import CELLS, table

            if len(self.outcomes) == len(CELLS):
                (ROOT / "docs" / "coverage.md").write_text(table(self.outcomes))


class Reliability:
    """Writes docs/reliability.md when more of test_matrix.py was run than every change does.

    The nightly runs it in parts, so what earlier runs of the same commit found is kept.
    """

    def __init__(self) -> None:
        self.outcomes: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if "test_matrix.py::test_cell" not in report.nodeid:
            return
        cell = report.nodeid.partition("[")[2].removesuffix("]")
        if report.failed:
            self.outcomes[cell] = "did not hold"
        elif report.when == "call":
            self.outcomes[cell] = str(dict(report.user_properties)["outcome"])

    def pytest_sessionfinish(self) -> None:
        if self.outcomes:
            from tests.test_matrix import SAMPLE, table

            if len(self.outcomes) > SAMPLE:
                head = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
                commit = subprocess.run(head, check=True, capture_output=True, text=True).stdout
                kept = ROOT / ".nightly" / f"matrix-{commit[:12]}.json"
                kept.parent.mkdir(exist_ok=True)
                if kept.exists():
                    self.outcomes = json.loads(kept.read_text()) | self.outcomes
                kept.write_text(json.dumps(self.outcomes))
                (ROOT / "docs" / "reliability.md").write_text(table(self.outcomes))


def pytest_configure(config: pytest.Config) -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # which ends the guests, too
    if not hasattr(config, "workerinput"):  # not in the workers of pytest -n
        config.pluginmanager.register(Coverage())
        config.pluginmanager.register(Reliability())


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of a test that is ``sampled(n)`` only every n-th case is tried for every change."""
    seen = Counter[str]()
    for item in items:
        if sample := item.get_closest_marker("sampled"):
            name = item.nodeid.partition("[")[0]
            if item.get_closest_marker("nightly") is None:
                if seen[name] % sample.args[0]:
                    item.add_marker(pytest.mark.nightly)
                seen[name] += 1


@pytest.fixture(scope="session")
def libvirtd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Libvirtd]:
    """A libvirtd of the tests' own."""
    libvirt.registerErrorHandler(lambda *_: None, None)  # it prints what it raises too
    with Libvirtd(tmp_path_factory.mktemp("libvirtd")) as daemon:
        yield daemon


@pytest.fixture(params=["qemu", "libvirt"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Make:
    """Makes a guest of one kind; it writes as fast as it can."""
    if request.param == "qemu":
        return lambda disks: VM(tmp_path, disks, writer={"rate": 0})
    libvirtd: Libvirtd = request.getfixturevalue("libvirtd")
    return lambda disks: Domain(libvirtd, tmp_path, disks)


@pytest.fixture(params=["system", "newer", "newest"])
def qemu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs a test with the system's QEMU and with those of ci/qemu, by PATH.

    So the guests, the tests' own qemu-img and promoter's are all of one version.
    """
    if request.param != "system":
        if "PROMOTER_TEST_QEMU" in os.environ:
            pytest.skip("PROMOTER_TEST_QEMU is the only QEMU")
        monkeypatch.setenv("PATH", f"{other_qemu(request.param)}:{os.environ['PATH']}")
    return str(request.param)
