"""What a command loads before it does anything: that is what each of its users waits for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import promoter
from tests.cli import promoter as run


def loaded(*words: object) -> set[str]:
    """The packages that a command has loaded at its end."""
    command = [sys.executable, "-X", "importtime", "-m", "promoter", *map(str, words)]
    told = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    return {line.rpartition("|")[2].strip().partition(".")[0] for line in told.splitlines()}


@pytest.mark.parametrize("words", [["--version"], ["--version", "job"]])
def test_versions_are_those_of_promoter_qemu_and_libvirt(tmp_path: Path, words: list[str]) -> None:
    shown = run(tmp_path, *words).out.splitlines()
    qemu = subprocess.run(["qemu-img", "--version"], capture_output=True, text=True, check=True)
    assert shown[0] == f"promoter {promoter.__version__}"
    assert shown[1].removeprefix("qemu-img ") in qemu.stdout
    assert shown[2].startswith("libvirt ")


def test_a_command_loads_only_what_it_needs(tmp_path: Path) -> None:
    assert not loaded("--version") & {"typer", "rich", "asyncio"}
    listing = loaded("job", "list", "--json", "--state-dir", tmp_path)
    assert not listing & {"rich", "qemu", "libvirt", "aiohttp", "cryptography"}
    assert "sqlite3" in listing
