"""Emitting: a directory with all that a model needs, whole or not there, whose script tunes that very model."""

import copy
import json
import runpy
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

import idlefx
from idlefx import InputError
from idlefx.deploy import bundle
from tests.models import colours

ROOT = Path(__file__).parents[1]
FILES = {"model.pt2", "weights.safetensors", "plan.json", "report.md", "tokens.png", "finetune.py"}
CALL = {"layers": [1], "keep": 0.5, "schedule": "blocks"}


@idlefx.selector
def brightness(x):
    return x.mean(-1)


def encoder():
    return colours.vit(num_classes=0)


@cache
def converted(**options):
    """Shared between tests, so only read it."""
    return idlefx.convert(colours.vit(), **CALL, **options)


@pytest.fixture
def quick(monkeypatch):
    """Without compiling an artifact."""
    monkeypatch.setattr(bundle, "package", lambda idle, path, **_: path.write_bytes(b"artifact"))


@pytest.mark.slow
@pytest.mark.parametrize("idle", ["rest", "follow"])
def test_artifact_and_script_are_of_this_model_and_plan(idle, tmp_path):
    directory = idlefx.emit(converted(idle=idle), tmp_path / "vit", model=colours.MODEL, batch=(1, 64))
    x = torch.randn(3, 3, colours.SIDE, colours.SIDE)
    artifact = idlefx.load(directory / "model.pt2")
    torch.testing.assert_close(artifact(x), converted(idle=idle)(x), rtol=1e-4, atol=1e-4)
    data = colours.folder(tmp_path / "data", train=16, val=4)
    command = [sys.executable, directory / "finetune.py", data, "1"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "idle, tuned" in run.stdout
    tuned = copy.deepcopy(converted(idle=idle))
    safetensors.torch.load_model(tuned, directory / "tuned.safetensors")
    torch.testing.assert_close(idlefx.load(directory / "tuned.pt2")(x), tuned(x), rtol=1e-4, atol=1e-4)
    assert not torch.equal(tuned(x), converted(idle=idle)(x))


@pytest.mark.slow
def test_the_script_of_a_model_without_classes_needs_no_labels(quick, tmp_path):
    idle = idlefx.convert(colours.vit(num_classes=0), **CALL)
    directory = idlefx.emit(idle, tmp_path / "vit", model=f"{__name__}:encoder")
    for number in range(24):
        colours.picture(number, number).save(tmp_path / f"{number}.png")
    command = [sys.executable, directory / "finetune.py", tmp_path, "1"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "read without labels" in run.stdout and "held-out images, untuned = 1" in run.stdout
    assert (directory / "tuned.pt2").exists()


def test_what_is_written(quick, tmp_path):
    idle = converted()
    directory = idlefx.emit(idle, tmp_path / "vit", model=colours.MODEL)
    assert {path.name for path in directory.iterdir()} == FILES
    plan = json.loads((directory / "plan.json").read_text())
    assert plan["model"] == colours.MODEL
    assert plan["layers"] == [1]
    assert [step["kept"] for step in plan["blocks"]] == [step.kept for step in idle.plan]
    weights = safetensors.torch.load_file(directory / "weights.safetensors")
    assert weights.keys() == colours.vit().state_dict().keys()
    assert str(idlefx.report(idle)) in (directory / "report.md").read_text()


def test_the_script_is_short_and_says_what_the_user_said(quick, tmp_path):
    script = (idlefx.emit(converted(), tmp_path / "vit", model=colours.MODEL) / "finetune.py").read_text()
    compile(script, "finetune.py", "exec")
    assert len(script.splitlines()) <= 60
    assert "layers=[1], keep=0.5, schedule='blocks'" in script
    assert "$" not in script


def test_what_is_written_where_tokens_follow(quick, tmp_path):
    directory = idlefx.emit(converted(idle="follow"), tmp_path / "vit", model=colours.MODEL)
    assert {path.name for path in directory.iterdir()} == FILES
    assert json.loads((directory / "plan.json").read_text())["idle"] == "follow"
    assert "keep=0.5, schedule='blocks', idle='follow'" in (directory / "finetune.py").read_text()
    told = (directory / "report.md").read_text()
    assert "idle tokens follow the worker most like them; they are grouped anew at block 1" in told
    assert "idle ones in the mean colour of the patch that they follow" in told


@pytest.mark.parametrize(
    ("arguments", "words", "status"),
    [
        (["--help"], "[DATA] [STEPS]", 0),
        (["pictures", "x"], "argument STEPS: invalid int value: 'x'", 2),
        ([], "there is no path/to/images; name a folder", "error"),
    ],
)
def test_the_script_says_how_it_is_run(arguments, words, status, quick, tmp_path, monkeypatch, capsys):
    script = idlefx.emit(converted(), tmp_path / "vit", model=colours.MODEL) / "finetune.py"
    monkeypatch.setattr(sys, "argv", [str(script), *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    assert words in "".join([*capsys.readouterr(), str(ended.value)])
    assert str(ended.value.code).startswith(str(status))


def test_a_failure_leaves_nothing_behind(monkeypatch, tmp_path):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(bundle, "package", full)
    with pytest.raises(InputError, match="No space left on device; name another directory"):
        idlefx.emit(converted(), tmp_path / "vit", model=colours.MODEL)
    assert list(tmp_path.iterdir()) == []


def test_a_directory_with_files_is_refused(quick, tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(InputError, match="is there already"):
        idlefx.emit(converted(), tmp_path, model=colours.MODEL)
    assert (tmp_path / "mine.txt").read_text() == "precious"


def test_a_model_that_the_script_could_not_make_again_is_refused(quick, tmp_path):
    with pytest.raises(InputError, match=r"could not make this model again .* model='package.module:callable'"):
        idlefx.emit(converted(), tmp_path / "vit", model="idlefx.models:glyph_vit")
    assert not (tmp_path / "vit").exists()


def test_a_model_that_computes_something_else_with_these_weights_is_refused(quick, tmp_path):
    import timm

    idle = idlefx.convert(timm.create_model("test_vit", num_heads=4).eval(), **CALL)
    with pytest.raises(InputError, match=r"again as test_vit: with the same weights it computes something else"):
        idlefx.emit(idle, tmp_path / "vit")
    with pytest.raises(InputError, match=r"__main__:vit is defined in the program itself; move it into a module"):
        idlefx.emit(converted(), tmp_path / "vit", model="__main__:vit")


def test_numbers_of_another_library_end_up_as_plain_ones(quick, tmp_path):
    idle = idlefx.convert(colours.vit(), [1], np.float32(0.5), prefix=np.arange(1))
    directory = idlefx.emit(idle, tmp_path / "vit", model=colours.MODEL)
    assert "layers=[1], keep=0.5, prefix=[0], example" in (directory / "finetune.py").read_text()
    assert json.loads((directory / "plan.json").read_text())["prefix"] == [0]


def test_the_script_packages_as_it_was_packaged(quick, tmp_path):
    options = {"dtype": torch.bfloat16, "batch": (1, 8), "device": torch.device("cpu")}
    script = (idlefx.emit(converted(), tmp_path / "vit", model=colours.MODEL, **options) / "finetune.py").read_text()
    assert "\"tuned.pt2\", dtype=torch.bfloat16, batch=(1, 8), device='cpu')" in script


def test_the_present_directory_will_do_if_it_is_empty(quick, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    idlefx.emit(converted(), ".", model=colours.MODEL)
    assert {path.name for path in tmp_path.iterdir()} == FILES


def test_a_model_that_was_not_converted_is_refused(tmp_path):
    dense = colours.vit()
    for refuse in (idlefx.compile, lambda m: idlefx.package(m, tmp_path / "a.pt2"), lambda m: idlefx.emit(m, tmp_path)):
        with pytest.raises(InputError, match="a VisionTransformer was not converted; give what"):
            refuse(dense)


def test_a_timm_model_names_itself(quick, tmp_path):
    import timm

    idle = idlefx.convert(timm.create_model("test_vit", img_size=96), **CALL)
    script = (idlefx.emit(idle, tmp_path / "vit") / "finetune.py").read_text()
    assert "load_model('test_vit', checkpoint=HERE / \"weights.safetensors\", img_size=96)" in script


def test_the_script_imports_the_users_token_score(quick, tmp_path):
    directory = idlefx.emit(converted(selector="brightness"), tmp_path / "vit", model=colours.MODEL)
    assert f"import {__name__}  # registers the token score" in (directory / "finetune.py").read_text()


def test_a_token_score_that_cannot_be_imported_is_refused(quick, monkeypatch, tmp_path):
    monkeypatch.setattr(brightness, "__module__", "__main__")
    with pytest.raises(InputError, match=r"`brightness` .* move it into a module"):
        idlefx.emit(converted(selector="brightness"), tmp_path / "vit", model=colours.MODEL)
