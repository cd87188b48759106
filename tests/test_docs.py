"""What the documents name is there: commands, options, and the places that links lead to."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from promoter.cli.main import app
from tests.runbooks import RUNBOOKS
from tests.test_runbooks import CASES
from tests.vm import ROOT

DOCS = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
CODE = re.compile(r"^(?: {4}|[\w-]*\$ )\s*(.*promoter .*)$|`(promoter [^`]+)`", re.MULTILINE)
COMMAND = re.compile(r"(?:^|[\s$])promoter ([a-z].*)")
OPTION = re.compile(r"--[a-z][a-z0-9-]+")


def anchors(text: str) -> set[str]:
    """As GitHub makes them of headings."""
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def unknown(words: str) -> str | None:
    """What of a command line promoter does not know."""
    command: Any = typer.main.get_command(app)
    try:
        given = shlex.split(words, comments=True)
    except ValueError:  # it is one line of several
        given = words.split()
    for word in given:
        if word in ("--", "|", "&&", ">", "…"):
            break
        if re.fullmatch(r"[a-z-]+", word) and hasattr(command, "commands"):
            if word not in command.commands:
                return word
            command = command.commands[word]
        if option := OPTION.match(word):
            known = {name for each in command.params for name in (*each.opts, *each.secondary_opts)}
            if option[0] not in known | {"--help", "--version"}:
                return option[0]
    return None


@pytest.mark.parametrize("document", DOCS, ids=lambda path: path.name)
def test_every_link_leads_somewhere(document: Path) -> None:
    for link in LINK.findall(document.read_text()):
        if link.startswith(("http:", "https:")):
            continue
        path, _, anchor = link.partition("#")
        place = (document.parent / path).resolve() if path else document
        assert place.exists(), link
        assert not anchor or anchor in anchors(place.read_text()), link


@pytest.mark.parametrize("document", DOCS, ids=lambda path: path.name)
def test_every_command_and_option_that_is_named_exists(document: Path) -> None:
    for found in CODE.finditer(document.read_text()):
        for command in COMMAND.findall(found[1] or found[2]):
            assert unknown(command) is None, (unknown(command), command)


def test_what_is_not_there_is_noticed() -> None:
    assert unknown("promote web01 --no-such-option") == "--no-such-option"
    assert unknown("demote web01") == "demote"
    assert unknown("job show --scan DIR") == "--scan"
    assert unknown("run --disk /vm/web.qcow2 -- qemu --none-of-ours") is None


def test_every_runbook_is_played_and_in_the_index() -> None:
    runbooks = {path.stem for path in RUNBOOKS.glob("*.md")} - {"README"}
    assert runbooks == set(CASES)
    index = LINK.findall((RUNBOOKS / "README.md").read_text())
    assert {f"{name}.md" for name in runbooks} <= set(index)
