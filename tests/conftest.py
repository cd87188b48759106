"""Fixtures of all tests."""

import os

import pytest

from tests.vm import newer_qemu, why_no_newer_qemu


@pytest.fixture(params=["system", "newer"])
def qemu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs a test with the system's QEMU and with that of ci/qemu, by PATH.

    So the guests, the tests' own qemu-img and promoter's are all of one version.
    """
    if request.param == "newer":
        if "PROMOTER_TEST_QEMU" in os.environ:
            pytest.skip("PROMOTER_TEST_QEMU is the only QEMU")
        directory = newer_qemu()
        if directory is None:
            pytest.skip(f"no newer QEMU: {why_no_newer_qemu()}")
        monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")
    return str(request.param)
