import sys

import pytest

from assay import cli


@pytest.fixture
def assay_command(monkeypatch, capsys):
    """Runs the command in this process: (status, standard output, standard error)."""

    def run(*arguments):
        capsys.readouterr()  # what others wrote before
        monkeypatch.setattr(sys, "argv", ["assay", *map(str, arguments)])
        try:
            cli.main()
            status = 0
        except SystemExit as end:
            status = end.code or 0
        out, err = capsys.readouterr()
        return status, out, err

    return run
