"""``python -m promoter`` is the ``promoter`` command."""

from promoter.cli.main import app

app()
