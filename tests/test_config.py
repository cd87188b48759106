"""The configuration file: what it says holds unless a command says otherwise."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import msgspec
import pytest

from promoter.cli.config import Settings
from tests.cli import Ran
from tests.vm import ROOT

SAMPLE = ROOT / "docs" / "promoter.toml"


def run(directory: Path, text: str, *words: object, **environment: str) -> Ran:
    file = directory / "promoter.toml"
    file.write_text(text)
    kept = {name: value for name, value in os.environ.items() if name != "PROMOTER_STATE_DIR"}
    said = {**kept, "PROMOTER_CONFIG": str(file), "COLUMNS": "300", **environment}
    command = [sys.executable, "-m", "promoter", *map(str, words)]
    ran = subprocess.run(command, env=said, capture_output=True, text=True, check=False)
    return Ran(ran.returncode, ran.stdout, ran.stderr)


def test_the_sample_has_every_key_and_is_right(tmp_path: Path) -> None:
    text = SAMPLE.read_text()
    keys = tomllib.loads(text)
    assert [*keys] == [*Settings.__struct_fields__]
    msgspec.convert(keys, Settings)
    listed = run(tmp_path, text, "job", "list", PROMOTER_STATE_DIR=str(tmp_path / "state"))
    assert (listed.code, listed.err) == (0, "")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('sped = "50M"', "no such key: sped. Did you mean speed?"),
        ("speed = 50", "$.speed"),
        ('old = "burn"', "$.old"),
        ("scan = [1]", "$.scan"),
        ("speed =", "Invalid value (at"),
    ],
)
def test_what_is_wrong_is_a_wrong_use(tmp_path: Path, text: str, why: str) -> None:
    refused = run(tmp_path, text, "promote", tmp_path / "nobody")
    assert refused.code == 2
    assert why in refused.err
    assert "promoter.toml" in refused.err


def test_the_command_line_and_the_environment_win(tmp_path: Path) -> None:
    own, other, third = (tmp_path / name for name in ("own", "other", "third"))
    text = f'state_dir = "{own}"\nspeed = "wrong"'
    nobody = tmp_path / "nobody"
    assert run(tmp_path, text, "job", "list", "--state-dir", other).code == 0
    assert run(tmp_path, text, "job", "list", PROMOTER_STATE_DIR=str(third)).code == 0
    assert (own.exists(), other.exists(), third.exists()) == (False, True, True)
    assert run(tmp_path, text, "job", "list").code == 0
    assert own.exists()
    assert run(tmp_path, text, "promote", nobody).code == 2
    assert run(tmp_path, text, "promote", nobody, "--speed", "5M").code == 3


def test_a_home_of_somebody_else_is_named(tmp_path: Path) -> None:
    home = tmp_path / "home"
    (home / ".config").mkdir(parents=True)
    home.chmod(0o700)
    tmp_path.chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if name != "PROMOTER_CONFIG"}
    ran = subprocess.run(
        ["setpriv", "--reuid=65534", sys.executable, "-m", "promoter", "chain", "/nobody"],
        env={**kept, "HOME": str(home)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 2
    assert f"Permission denied: is {home}, which is HOME, another user's?" in ran.stderr
