"""Every script of examples/ runs, on little data and for a few steps."""

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch
from PIL import Image

import idlefx
from examples import figure, in_house, quickstart, study, train_glyphs
from idlefx.data import Glyphs
from idlefx.demo.model import GLYPH_VIT, glyph_vit
from idlefx.demo.samples import fetch_samples
from idlefx.demo.weights import fetch_weights
from idlefx.runtime.selections import selections
from tests.support.documents import ROOT


def started(monkeypatch, script, *arguments):
    """Run a script as the shell would."""
    monkeypatch.setattr(sys, "argv", [script.__file__, *map(str, arguments)])
    script.main()


@pytest.mark.slow
def test_quickstart_shows_the_shipped_model_where_nothing_can_be_fetched(monkeypatch, tmp_path, capsys):
    def silent():
        raise idlefx.InputError("fetch: there is no network")

    monkeypatch.setattr(quickstart, "fetch_weights", silent)
    monkeypatch.setattr(quickstart, "SECONDS", 0)
    timed = timm.create_model("deit_tiny_patch16_224", img_size=64)
    monkeypatch.setattr(quickstart.timm, "create_model", lambda name: timed)
    monkeypatch.chdir(tmp_path)
    quickstart.main()
    shown = capsys.readouterr().out
    assert "there is no network" in shown and "this is the small model that idlefx ships" in shown
    assert "keeping every token changes nothing" in shown
    assert str(idlefx.inspect(glyph_vit())) in shown
    assert re.search(r"\n +8 +\d+ +\d+ +\d+\.\d\d× +\d+%", shown), "what a call takes at batch 8"
    assert Image.open(tmp_path / quickstart.PICTURE).width > 100


@pytest.mark.slow
def test_quickstart_goes_on_where_nothing_can_be_compiled(monkeypatch, tmp_path, capsys):
    def failing(*_):
        raise idlefx.ArtifactError("package: InvalidCxxCompiler: No working C++ compiler found")

    model, scenes = glyph_vit(), Glyphs("test", size=2)
    photographs = [scenes.scene(number).image for number in range(2)]
    monkeypatch.setattr(quickstart, "subject", lambda: quickstart.Subject(model, photographs, glyph_vit()))
    monkeypatch.setattr(quickstart, "times", failing)
    monkeypatch.chdir(tmp_path)
    quickstart.main()
    shown = capsys.readouterr().out
    assert "(is there a C++ compiler?): package: InvalidCxxCompiler: No working C++ compiler found\n" in shown
    assert (tmp_path / quickstart.PICTURE).exists()


@pytest.mark.slow
def test_quickstart_shows_the_real_model_where_it_can_be_had(monkeypatch, tmp_path, capsys):
    try:
        fetch_weights()
        fetch_samples()
    except idlefx.InputError as refusal:
        pytest.skip(str(refusal))
    monkeypatch.setattr(quickstart, "times", lambda dense, idle: f"timed {dense is not None}")
    monkeypatch.chdir(tmp_path)
    quickstart.main()
    shown = capsys.readouterr().out
    assert "a DINOv2 ViT-S/14" in shown and "keeping every token changes nothing" in shown
    cosine = {name: float(value) for name, value in re.findall(r"(follow|rest) +feature +384 +(\S+)", shown)}
    assert cosine["follow"] > 0.95 > 0.8 > cosine["rest"]
    assert Image.open(tmp_path / quickstart.PICTURE).height > 1000


def test_figure_is_the_one_in_the_docs(monkeypatch, tmp_path):
    shipped = Image.open(figure.TARGET)
    monkeypatch.setattr(figure, "TARGET", tmp_path / "docs" / "how_it_works.png")
    figure.main()
    assert Image.open(figure.TARGET).size == shipped.size


@torch.no_grad()
def test_model_in_house_is_what_idling_by_masks_gives():
    image = torch.randn(2, 3, in_house.GRID * in_house.PATCH, in_house.GRID * in_house.PATCH)
    idle = idlefx.convert(in_house.build(), [2, 4], 0.6, example_inputs=image)
    expected = in_house.masked_reference(in_house.build(), image, selections(idle, image))
    torch.testing.assert_close(idle(image), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_in_house_goes_from_conversion_to_serving(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "examples.in_house"],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "keeping every token gives the model's own output: True" in done.stdout
    assert "two steps later the artifact says" in done.stdout


@pytest.mark.slow
def test_study_goes_on_where_it_was_interrupted_and_draws(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(study, "LOOKED_AT", 24)
    # A process that has run backward passes, as other tests do, must not fork.
    monkeypatch.setattr(study, "ProcessPoolExecutor", ThreadPoolExecutor)
    steps, scenes, results = 1, 48, tmp_path / "results" / "study.json"
    results.parent.mkdir()
    shipped = json.loads((ROOT / "examples" / "results" / "study.json").read_text())
    finished = [run | {"steps": steps, "scenes": scenes} for run in shipped if run["seed"] == 0]
    results.write_text(json.dumps(finished[2:]))
    size = ["--steps", steps, "--scenes", scenes, "--seeds", 1, "--jobs", 1]
    started(monkeypatch, study, *size, "--results", results, "--plot", tmp_path / "study.png")
    found = json.loads(results.read_text())
    assert sorted(map(repr, map(study.run_of, found))) == sorted(map(repr, map(study.run_of, finished)))
    assert found[:-2] == finished[2:] and found[-1] not in finished
    assert study.tables(found) in capsys.readouterr().out
    assert Image.open(tmp_path / "study.png").width > 100


def test_training_of_the_shipped_model_is_written_with_its_account(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(train_glyphs, "ROUND", 2)
    weights, checkpoint = tmp_path / "vit.safetensors", tmp_path / "state.pt"
    options = ["--batch", 4, "--scenes", 48, "--output", weights, "--checkpoint", checkpoint]
    started(monkeypatch, train_glyphs, "--rounds", 1, *options)
    started(monkeypatch, train_glyphs, "--rounds", 2, "--resume", *options)
    shown = capsys.readouterr().out
    assert [shown.count(f"\n{number},") for number in (1, 2)] == [1, 1], "the second run goes on"
    told = json.loads(weights.with_suffix(".json").read_text())
    assert told["scenes_seen"] == 2 * 2 * 4
    assert told.keys() == json.loads(GLYPH_VIT.with_suffix(".json").read_text()).keys()
    model = glyph_vit(pretrained=False)
    idlefx.demo.model.load_weights(model, weights)
    assert torch.equal(model.head.weight, torch.load(checkpoint, weights_only=True)["model"]["head.weight"])
