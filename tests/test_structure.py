"""How the tests themselves are kept: no test module leans on another, and what is compared with stands on its own."""

import ast
from pathlib import Path

import pytest

from tests.conftest import companions

TESTS = Path(__file__).parent
FILES = sorted(TESTS.rglob("*.py"))
LONGEST = 250


def imported(file: Path) -> set[str]:
    """Full names of all modules and members that a file imports, wherever it does."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(TESTS)))
def test_nobody_imports_a_test_module(file):
    parts = {part for name in imported(file) for part in name.split(".")}
    assert not {part for part in parts if part.startswith("test_") and (TESTS / f"{part}.py").exists()}


@pytest.mark.parametrize("file", sorted((TESTS / "oracles").glob("*.py")), ids=lambda file: file.stem)
def test_an_oracle_knows_nothing_of_what_it_judges(file):
    known = {name for name in imported(file) if name.partition(".")[0] == "idlefx"}
    assert all(name.startswith("idlefx.zoo.reference") for name in known)


def test_no_file_is_too_long():
    lengths = {file.name: len(file.read_text().splitlines()) for file in FILES}
    assert not {name: length for name, length in lengths.items() if length > LONGEST}


def test_tests_of_one_model_share_a_worker():
    ids = [
        "test_a.py::test_x[blocks-qk_norm]",
        "test_b.py::test_y[qk_norm]",
        "test_b.py::test_deit_s_z",
        "test_b.py::test_w[2]",
        "test_b.py::test_w[part2]",
    ]
    assert list(map(companions, ids)) == ["qk_norm", "qk_norm", "deit_s", "test_b.py", ids[-1]]
