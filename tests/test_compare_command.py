"""`python -m idlefx compare`: what it prints and writes, a row for each way of idling, and what it refuses."""

import io
import json
import sys

import pytest

import idlefx
from idlefx.cli import ways
from idlefx.cli.main import main
from idlefx.demo.glyphs import Glyphs
from idlefx.errors import BlockError
from idlefx.pipeline import convert
from tests.models.small import build

COMMAND = ["compare", "--model", f"{__name__}:named", "--layers", "1", "--keep", "0.5"]


def named():
    return build("vit", depth=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("scenes")
    for number in range(6):
        Glyphs("test", size=6).scene(number).image.save(place / f"{number}.png")
    return place


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_command_prints_and_writes_what_python_finds(folder, tmp_path, capsys, monkeypatch):
    target, terminal, idle = tmp_path / "figures.json", Terminal(), []
    words = [*COMMAND, "--data", str(folder), "--limit", "3", "--batch-size", "2", "--json", str(target)]
    words += ["--idle", "follow"]
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(ways, "convert", lambda *args, **options: idle.append(convert(*args, **options)) or idle[0])
    assert main(words) == 0
    monkeypatch.undo()
    wanted = idlefx.compare(named(), {"follow": idle[0]}, folder, limit=3, batch_size=2)
    shown = capsys.readouterr()
    assert str(wanted) in shown.out and "3 images" in shown.out and not shown.err, "no bar where no terminal is"
    assert "compare:" in terminal.getvalue() and "0/3" in terminal.getvalue()
    told = json.loads(target.read_text())
    assert {key: told[key] for key in ("images", "left_out", "models")} == wanted.to_dict()
    assert told["plans"]["follow"] == idle[0].conversion.options.to_dict() and told["model"] == COMMAND[2]
    assert {"torch", "timm"} <= set(told["versions"]) and told["measured"]


@pytest.mark.parametrize("refused", [(), ("follow",), ("rest", "follow")])
def test_each_way_of_idling_is_a_row(folder, capsys, monkeypatch, refused):
    def converted(model, *, idle, **_):
        if idle in refused:
            raise BlockError(f"blocks: {idle} is not for this model")
        return model

    monkeypatch.setattr(ways, "convert", converted)
    code = main([*COMMAND, "--data", str(folder), "--limit", "2", "--idle", "rest", "follow"])
    shown = capsys.readouterr()
    rows = [line.split()[0] for line in shown.out.splitlines() if " output " in line][1:]
    assert code == (2 if refused else 0)
    assert rows == [word for word in ("rest", "follow") if word not in refused]
    if refused == ("follow",):
        assert "error: follow: blocks: follow is not for this model" in shown.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data", "nowhere"], "error: images: nowhere does not exist; name a folder with photographs"),
        (["--data", "text/words.txt"], "error: images: text/words.txt is no folder"),
        (["--data", "text"], "error: images: there is no image in text"),
        (["--data", "broken"], "error: images: broken/1.png is no image"),
        (["--data", "broken", "--limit", "0"], "error: images: limit is 0"),
        (["--data", "broken", "--keep", "1.5"], "keep=1.5"),
        (["--data", "broken", "--json", "no/such/file.json"], "cannot write"),
        (["--data", "broken", "--device", "toaster"], "toaster"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_words(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ways, "convert", lambda model, **_: model)
    for file in ("text/words.txt", "broken/1.png"):
        (tmp_path / file).parent.mkdir()
        (tmp_path / file).write_text("words")
    assert main([*COMMAND, "--json", "figures.json", *words]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert len(list(tmp_path.rglob("*.*"))) == 2, "nothing is written"
