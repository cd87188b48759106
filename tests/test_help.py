"""What a command says of itself, by `--help` and by its man page."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from ci.man import PAGES, pages
from tests.cli import ended, start

WRITTEN = sorted(PAGES.glob("*.1"))
NARROW = os.environ | {"COLUMNS": "80", "MANWIDTH": "80", "LC_ALL": "C.UTF-8"}


def options(page: str) -> set[str]:
    return set(re.findall(r"^\\fB(?:-\w, )?(--[\w-]+)", page.replace(r"\-", "-"), re.MULTILINE))


def test_the_man_pages_are_what_the_commands_say_now() -> None:
    now = {path.name: path.read_text() for path in WRITTEN}
    assert now == dict(pages()), "python -m ci.man writes them"


def test_man_finds_no_fault_with_them_and_shows_every_option() -> None:
    command = ["man", "--warnings", "--local-file", *map(str, WRITTEN)]
    man = subprocess.run(command, env=NARROW, capture_output=True, text=True, check=True)
    assert man.stderr == ""
    named = set[str]().union(*(options(path.read_text()) for path in WRITTEN))
    assert "--copy-mode" in named
    assert named <= set(re.findall(r"--[\w-]+", man.stdout))


@pytest.mark.parametrize("group", ["", "job", "lease", "agent", "hook"])
def test_what_a_group_says_of_its_commands_fits_into_80_columns(group: str) -> None:
    ran = ended(start(Path(), *group.split(), "--help", environment=NARROW))
    assert (ran.code, ran.err) == (0, "")
    assert not re.search(r"\w\.\.\.$|…", ran.out, re.MULTILINE)
    assert max(map(len, ran.out.splitlines())) <= 80
