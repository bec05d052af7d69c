"""What README.md and the pages of docs/ say, wherever in them it stands."""

import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]


@cache
def text() -> str:
    """README.md and all pages, one after the other."""
    return "\n".join(page.read_text() for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))])


def cells(line: str) -> tuple[str, ...]:
    """What stands in a row of a Markdown table; empty where it is no row."""
    line = line.strip()
    return tuple(cell.strip() for cell in line.strip("|").split("|")) if line.startswith("|") else ()


@cache
def rows() -> tuple[tuple[str, ...], ...]:
    """The rows of all tables, without the rules under their heads."""
    found = map(cells, text().splitlines())
    return tuple(row for row in found if row and not all(re.fullmatch(":?-+:?", cell) for cell in row))
