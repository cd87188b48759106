"""What the documents lead to is there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.vm import ROOT

LINK = re.compile(r"\]\(([^)\s]+)\)")
CODE = re.compile(r"^```.*?^```$|^    .*?$|`[^`\n]*`", re.MULTILINE | re.DOTALL)
DOCUMENTS = sorted((*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")))


def anchor(heading: str) -> str:
    """What a heading is called in a link, by GitHub's rule."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def anchors(document: Path) -> set[str]:
    return {anchor(found) for found in re.findall(r"^#+ (.*)$", document.read_text(), re.MULTILINE)}


def links(document: Path) -> Iterator[str]:
    return (link for link in LINK.findall(CODE.sub("", document.read_text())) if ":" not in link)


def leads_nowhere(document: Path, link: str) -> bool:
    name, _, heading = link.partition("#")
    there = document.parent / name if name else document
    return not there.exists() or bool(heading and heading not in anchors(there))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_in_the_documents_leads_somewhere(document: Path) -> None:
    assert not [link for link in links(document) if leads_nowhere(document, link)]
