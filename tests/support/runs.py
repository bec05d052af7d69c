"""Runs of `python -m idlefx.finetune`: what they print, and what they write."""

import csv
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

from idlefx.cli.finetune import main


def run_into(directory: Path, arguments: Callable[[Path], list[str]]) -> SimpleNamespace:
    """A run from the shell: its directory, exit status and what it printed."""
    with redirect_stdout(StringIO()) as printed:
        status = main(arguments(directory))
    return SimpleNamespace(directory=directory, status=status, printed=printed.getvalue())


def rows(directory: Path) -> list[dict[str, str]]:
    """What stands in `metrics.csv`, without what no two runs share."""
    with (directory / "metrics.csv").open(newline="") as file:
        return [{**row, "images_per_s": ""} for row in csv.DictReader(file)]
