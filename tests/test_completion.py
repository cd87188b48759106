"""What a shell is offered where the tab key is pressed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import cli


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("promoter job re", {"resume"}),
        ("promoter promote web --see", {"--seed"}),
        ("promoter promote web --seed co", {"copy", "convert"}),
    ],
)
def test_bash_completes_commands_options_and_their_values(
    line: str, offered: set[str], tmp_path: Path
) -> None:
    asked = {
        "_PROMOTER_COMPLETE": "complete_bash",
        "COMP_WORDS": line,
        "COMP_CWORD": str(line.count(" ")),
    }
    # bash looks the words up by the command's name
    process = cli.start(
        tmp_path, enter=["sh", "-c", 'exec "$(dirname "$1")/promoter"', "sh"], environment=asked
    )
    assert set(cli.ended(process).out.split()) == offered
