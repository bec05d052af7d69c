"""The shell on the model that the package ships: what `inspect`, `convert` and `draw` print and write."""

from functools import cache

import pytest
from PIL import Image

import idlefx
from idlefx.cli.main import main
from idlefx.demo.model import glyph_vit

MODEL = ["--model", "idlefx.models:glyph_vit"]
PLAN = ["--layers", "2", "6", "--keep", "0.5"]


@cache
def converted() -> idlefx.IdleModule:
    """What the shell should have converted."""
    return idlefx.convert(glyph_vit(), [2, 6], 0.5)


def test_inspect_prints_the_table(capsys):
    assert main(["inspect", *MODEL]) == 0
    assert str(idlefx.inspect(glyph_vit())) in capsys.readouterr().out


def test_convert_prints_plan_and_report_and_that_keeping_all_changes_nothing(capsys):
    assert main(["convert", *MODEL, *PLAN]) == 0
    shown = capsys.readouterr().out
    assert str(converted().plan) in shown and str(idlefx.report(converted())) in shown
    assert "largest difference 0." in shown


def test_draw_writes_a_picture_of_scenes_and_of_photographs(tmp_path, capsys):
    photograph = tmp_path / "photo.png"
    Image.new("RGB", (50, 40), "red").save(photograph)
    sizes = []
    for images in ([], [str(photograph)]):
        picture = tmp_path / f"{len(images)}.png"
        assert main(["draw", *images, *MODEL, *PLAN, "--out", str(picture)]) == 0
        assert str(picture) in capsys.readouterr().out
        sizes.append(Image.open(picture).size)
    assert sizes[0][1] > 2 * sizes[1][1], "five scenes stand below one another"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["inspect", "--model", "no_such_vit"], "no_such_vit"),
        (["convert", *MODEL, "--layers", "12"], "there is no block 12"),
        (["convert", *MODEL, "--layers", "2", "--keep", "1.5"], "keep=1.5"),
        (["draw", *MODEL, *PLAN, "--out", "tokens.txt"], "tokens.txt"),
        (["draw", "no/photo.png", *MODEL, *PLAN, "--out", "tokens.png"], "no/photo.png"),
    ],
)
def test_what_cannot_be_done_is_refused_in_words(arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert words in error and "error: " in error and "Traceback" not in error
    assert not list(tmp_path.iterdir())
