"""What the documents name is there: commands, options, and the places that links lead to."""

from __future__ import annotations

import html
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from promoter.cli.main import app
from promoter.storage.abilities import nfs_faults
from tests.hosts import OPTIONS
from tests.runbooks import RUNBOOKS
from tests.test_runbooks import CASES
from tests.vm import ROOT

DOCUMENTS = sorted((*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")))
LINK = re.compile(r"\]\(([^)\s]+)\)")
TYPED = re.compile(r"^```.*?^```$|^    .*?$|`[^`\n]*`", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"^(?: {4}|[\w-]*\$ )\s*(.*promoter .*)$|`(promoter [^`]+)`", re.MULTILINE)
COMMAND = re.compile(r"(?:^|[\s$])promoter ([a-z].*)")
OPTION = re.compile(r"--[a-z][a-z0-9-]+")


def anchor(heading: str) -> str:
    """What a heading is called in a link, by GitHub's rule."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def anchors(document: Path) -> set[str]:
    return {anchor(found) for found in re.findall(r"^#+ (.*)$", document.read_text(), re.MULTILINE)}


def links(document: Path) -> Iterator[str]:
    return (link for link in LINK.findall(TYPED.sub("", document.read_text())) if ":" not in link)


def leads_nowhere(document: Path, link: str) -> bool:
    name, _, heading = link.partition("#")
    there = document.parent / name if name else document
    return not there.exists() or bool(heading and heading not in anchors(there))


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


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_in_the_documents_leads_somewhere(document: Path) -> None:
    assert not [link for link in links(document) if leads_nowhere(document, link)]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
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


def test_the_picture_of_the_demo_shows_its_end_and_no_place_of_this_machine() -> None:
    drawn = html.unescape((ROOT / "docs" / "demo.svg").read_text()).replace(
        "\N{NO-BREAK SPACE}", " "
    )
    assert "Everything was proven" in drawn
    assert set(re.findall(r"(?<![\w/.])/[a-z]+/", drawn)) == {"/vm/", "/run/"}


@pytest.mark.parametrize("name", ["docs/lease.md", "Vagrantfile"])
def test_how_nfs_is_to_be_mounted_is_what_the_tests_try(name: str) -> None:
    assert re.search(rf"\b{OPTIONS}\b", (ROOT / name).read_text())
    assert nfs_faults(OPTIONS.split(",")) == ()
