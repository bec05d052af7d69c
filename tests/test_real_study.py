"""The study on the real model: merging of its own, tables and drawings; all of it where the model can be had."""

import json
import sys

import pytest
import torch
from PIL import Image

from examples import real_study, real_study_shown, tome
from idlefx.demo.photographs import fetch_photographs
from idlefx.demo.samples import fetch_samples
from idlefx.demo.weights import fetch_weights
from idlefx.errors import InputError
from tests.models.small import build, images


def features(model, run):
    """What runs on the tokens in front of the blocks."""
    x = model.patch_embed(images(model, 2))
    return run(model._pos_embed(x))


@torch.no_grad()
def test_merging_nothing_is_the_dense_model():
    model = build("layer_scale")
    dense = features(model, model.blocks)
    assert torch.allclose(features(model, tome.Merging(model.blocks, [0] * 4)), dense, atol=1e-5)
    assert not torch.allclose(features(model, tome.Merging(model.blocks, [3] * 4)), dense, atol=1e-2)


def test_the_most_alike_of_every_second_token_join_the_others():
    turns = torch.tensor([0.0, 90.0, 3.0, 0.0, 88.0, 40.0, 41.0]).deg2rad()
    keys = torch.stack([turns.cos(), turns.sin()], -1)[None]
    moves = tome.match(keys, 2)  # 41° joins 40°, 88° joins 90°; 3°, like 0° as it is, stays
    assert moves.tolist() == [[0, 1, 2, 3, 1, 4, 4]]
    x = torch.arange(7.0)[None, :, None]
    sizes = torch.tensor([[1.0, 3.0, 1.0, 1.0, 1.0, 1.0, 1.0]])
    merged, larger = tome.merge(x, sizes, moves, 5)
    assert larger.tolist() == [[1, 4, 1, 1, 2]]
    assert merged.flatten().tolist() == [0, (3 * 1 + 4) / 4, 2, 3, 5.5]


@torch.no_grad()
def test_equal_tokens_merge_at_no_cost():
    model = build("vit")
    x = model._pos_embed(model.patch_embed(images(model, 2)))
    few = torch.cat([torch.zeros(1, dtype=torch.long), 1 + torch.arange(36) // 2 % 2])
    merged = tome.Merging(model.blocks, [9, 7, 0, 3])(x[:, few])
    assert torch.allclose(merged, model.blocks(x[:, few]), atol=1e-4)


def test_budget_of_merging_is_just_met():
    counts = tome.spread(3.8, 257, 384, 12)
    assert max(counts) - min(counts) <= 1
    assert 3.75 < tome.gmacs(counts, 257, 384) <= 3.8
    assert tome.gmacs([0] * 12, 257, 384) == pytest.approx(6.066, abs=1e-3)
    with pytest.raises(ValueError, match="no merging"):
        tome.spread(0.1, 257, 384, 12)


def test_tables_and_plot_show_every_result(tmp_path):
    shared = {"size": 224, "scenes": 600, "saving": "how", "accuracy": 0.5, "difference": 0.01, "iou": 0.7}
    whole = {f"photographs' {name}": 0.25 for name in ("cosine", "worst cosine", "difference")}
    shared |= {"photographs": 9, **whole}
    results = [
        shared | {"method": method, "level": level, "gmacs": 4.0 - level, "cosine": 0.9, "agreement": 0.95}
        for method in ("dense", *real_study.METHODS)
        for level in range(1 if method == "dense" else 2)
    ]
    results[-1]["ms at batch 1"] = 20.0, 50.0
    text = real_study_shown.tables(results)
    assert text.count("| ToMe") == 4 and "9 whole photographs" in text and "| 0.250 " in text
    assert "| 20.0            | 2.50×" in text and "right in 50%" in text
    real_study_shown.draw(results, tmp_path / "plot.png")
    assert Image.open(tmp_path / "plot.png").width > 500


@pytest.mark.slow
def test_study_runs_and_goes_on_where_it_was_interrupted(monkeypatch, tmp_path, capsys):
    try:
        fetch_weights(), fetch_photographs()
        samples = fetch_samples()
    except InputError as refusal:
        pytest.skip(str(refusal))
    monkeypatch.setattr(real_study, "KEEPS", {224: [(0.7, 0.85)]})
    monkeypatch.setattr(real_study_shown, "SHOWN", {"0.7": 0})
    monkeypatch.setattr(real_study_shown, "COLUMNS", ("follow, 3 stages",))
    monkeypatch.setattr(real_study, "TAUGHT", 30)
    paths = [
        f"--{name}={tmp_path / name}.{kind}"
        for name, kind in (("results", "json"), ("plot", "png"), ("picture", "png"))
    ]
    told = ["--scenes=15", "--large=0", f"--photographs={samples}"]
    monkeypatch.setattr(sys, "argv", ["real_study", *told, *paths])
    real_study.main()
    results = {r["method"]: r for r in json.loads((tmp_path / "results.json").read_text())}
    assert results.keys() == {"dense", *real_study.METHODS}
    assert results["dense"]["cosine"] > 0.9999 and results["dense"]["agreement"] == 1
    assert min(results[name]["cosine"] for name in ("ToMe", "follow, 3 stages", "follow, 6 stages")) > 0.98
    assert results["rest"]["cosine"] < 0.9
    assert min(results[name]["photographs' cosine"] for name in ("ToMe", "follow, 3 stages")) > 0.98
    assert results["dense"]["photographs' worst cosine"] > 0.9999
    assert Image.open(tmp_path / "picture.png").width > 400
    monkeypatch.setattr(real_study, "measure", lambda *_: pytest.fail("measured again"))
    real_study.main()
    assert "| rest" in capsys.readouterr().out
