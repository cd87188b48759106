"""``promoter``, and ``python -m promoter``. Its version is told without loading its commands."""

from __future__ import annotations

import sys


def main() -> None:
    if sys.argv[1:] == ["--version"]:
        from promoter.guests.versions import versions

        sys.stdout.write(versions())
    else:
        from promoter.cli import main as commands

        commands.main(sys.argv[1:])


if __name__ == "__main__":
    main()
