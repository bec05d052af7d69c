"""The pages: their links lead somewhere, their code runs and prints what they show, their commands parse."""

import argparse
import importlib
import inspect
import pkgutil
import re
import shlex
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from idlefx import cli, pipeline
from idlefx.analysis.rules import registry
from idlefx.planning import selectors

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
DOORS = ("idlefx", "idlefx.demo", "idlefx.finetune")


@dataclass
class Fence:
    """A fenced block of a page.

    Attributes:
        language: What stands behind the opening fence.
        line: Where its text begins, from 1.
        mark: What a comment in the line before says: "slow: …", "not run: …", or nothing.
        text: Between the fences.
        shown: Lines that the page shows as its output.
    """

    language: str
    line: int
    mark: str
    text: str
    shown: list[str] = field(default_factory=list)


def fences(page: Path) -> list[Fence]:
    """The fenced blocks of a page; a `text` block is what the Python block before it prints."""
    found: list[Fence] = []
    opened: Fence | None = None
    mark = ""
    for number, line in enumerate(page.read_text().splitlines(), start=1):
        if line.startswith("```") and opened is None:
            opened = Fence(line[3:].strip(), number + 1, mark, "")
        elif line.startswith("```"):
            assert opened is not None
            if opened.language == "text":
                found[-1].shown += [" ".join(shown.split()) for shown in opened.text.splitlines() if shown.strip()]
            else:
                found.append(opened)
            opened = None
        elif opened is not None:
            opened.text += line + "\n"
        else:
            comment = re.fullmatch(r"<!-- (.*) -->", line)
            mark = comment[1] if comment else ""
    assert opened is None, f"{page.name}: the block of line {opened.line} has no end"
    return found


def python_of(page: Path) -> list[Fence]:
    blocks = [block for block in fences(page) if block.language == "python"]
    assert all(re.match(r"(slow|not run): |$", block.mark) for block in blocks), page
    return blocks


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """What links into a page may end in."""
    headings = re.findall(r"^#+ (.*)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if not link.startswith("https://"):
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


@pytest.fixture
def sandbox(monkeypatch, tmp_path):
    """A folder with a photograph, and the house as it is: what a page registers is forgotten."""
    monkeypatch.chdir(tmp_path)
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save("photo.jpg")
    monkeypatch.setattr(registry, "RULES", dict(registry.RULES))
    monkeypatch.setattr(selectors, "_REGISTRY", dict(selectors._REGISTRY))
    for name in ("SPELL", "REST", "FOLLOW"):
        monkeypatch.setattr(pipeline, name, getattr(pipeline, name))


def run(page: Path, capsys: pytest.CaptureFixture[str], *, slow: bool) -> None:
    """Run the blocks of a page one after the other, as somebody does who reads it."""
    names: dict[str, object] = {"__name__": "page"}
    for block in python_of(page):
        if block.mark.startswith("not run") or (block.mark and not slow):
            continue
        exec(compile("\n" * (block.line - 1) + block.text, str(page), "exec"), names)
        printed = {" ".join(line.split()) for line in capsys.readouterr().out.splitlines()}
        missing = [line for line in block.shown if line not in printed and line != "…"]
        assert not missing, f"{page.name}:{block.line} does not print {missing}"


@pytest.mark.parametrize("page", [page for page in PAGES if python_of(page)], ids=lambda page: page.name)
def test_python_runs(page, sandbox, capsys):
    run(page, capsys, slow=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if any(block.mark.startswith("slow") for block in python_of(page))],
    ids=lambda page: page.name,
)
def test_slow_python_runs(page, sandbox, capsys):
    run(page, capsys, slow=True)


def test_a_page_can_fail(sandbox, capsys, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```python\nprint(1)\n```\n\n```text\n2\n```\n")
    with pytest.raises(AssertionError, match="does not print"):
        run(page, capsys, slow=False)


def commands(page: Path) -> list[tuple[str, list[str]]]:
    """The commands of this package that a page shows: the module, and what stands behind it."""
    found = []
    for block in fences(page):
        if block.language == "":
            for line in block.text.replace("\\\n", " ").splitlines():
                for words in re.split(r"&&", line):
                    parts = shlex.split(words, comments=True)
                    found += [
                        (after, parts[at + 2 :])
                        for at, (word, after) in enumerate(pairwise(parts))
                        if word == "-m" and after in DOORS
                    ]
    return found


def parsers() -> dict[str, argparse.ArgumentParser]:
    """The parsers of the commands, by module: made by whatever functions of the shell take nothing and return one."""
    made = {}
    for each in pkgutil.iter_modules(cli.__path__):
        module = importlib.import_module(f"{cli.__name__}.{each.name}")
        for function in filter(inspect.isfunction, vars(module).values()):
            signature = inspect.signature(function, eval_str=True)
            if signature.return_annotation is argparse.ArgumentParser and not signature.parameters:
                parser = function()
                made[parser.prog.removeprefix("python -m ")] = parser
    return made


SHOWN = [(page.name, door, words) for page in PAGES for door, words in commands(page)]


def test_there_are_commands():
    assert {door for _, door, _ in SHOWN} == set(DOORS) == set(parsers())


@pytest.mark.parametrize(("page", "door", "words"), SHOWN, ids=lambda part: part if isinstance(part, str) else "")
def test_commands_parse(page, door, words, capsys):
    try:
        parsers()[door].parse_args(words)
    except SystemExit as end:
        assert end.code == 0, f"{page}: {' '.join(words)}\n{capsys.readouterr().err}"


def test_tests_are_run_as_the_readme_says():
    command = next(line for line in (ROOT / "README.md").read_text().splitlines() if "-m pytest" in line)
    assert command.startswith("python3 -m venv .venv && ")
