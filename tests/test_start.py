"""What a command loads before it does anything: that is what each of its users waits for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer.main
from typer.models import CommandInfo

import promoter
from promoter.cli import main
from tests.cli import promoter as run


def loaded(*words: object, code: int = 0) -> set[str]:
    """The modules, and their packages, that a command has loaded at its end."""
    command = [sys.executable, "-X", "importtime", "-m", "promoter", *map(str, words)]
    ran = subprocess.run(command, check=False, capture_output=True, text=True)
    assert ran.returncode == code, ran
    modules = {line.rpartition("|")[2].strip() for line in ran.stderr.splitlines()}
    return modules | {module.partition(".")[0] for module in modules}


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
    for_people = loaded("job", "speed", "none", "1", "--state-dir", tmp_path, code=4)
    assert "rich.console" in for_people
    assert not for_people & {"rich.progress", "rich.table"}


@pytest.mark.parametrize(
    ("words", "made"), [(["chain"], {"chain"}), (["hook", "install"], {"install", "run"})]
)
def test_only_the_command_that_is_named_is_made(
    words: list[str], made: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = set()
    make = typer.main.get_command_from_info

    def spy(command_info: CommandInfo, **options: Any) -> Any:
        command = make(command_info, **options)
        found.add(command.name)
        return command

    monkeypatch.setattr(typer.main, "get_command_from_info", spy)
    for known in ("registered_commands", "registered_groups"):
        monkeypatch.setattr(main.app, known, getattr(main.app, known))  # and put back
    with pytest.raises(SystemExit) as ended:
        main.main([*words, "--help"])
    assert ended.value.code == 0
    assert found == made
