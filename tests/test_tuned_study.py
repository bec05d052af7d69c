"""The study of tuned models, on a small one and few pictures."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch

import idlefx
from examples import tuned_study
from examples.real_study import Model
from tests.models.colours import Colours, vit


def pictures(count):
    return torch.stack([Colours(count, 0.0)[index][0] for index in range(count)])


@pytest.mark.slow
def test_it_measures_before_and_after_and_goes_on_where_it_was(monkeypatch, tmp_path, capsys):
    dense, held_out = vit(num_classes=0), pictures(32)

    def make(size, method, level):
        idle = idlefx.convert(dense, layers=[1], keep=0.4, reselect=method != "pruned")
        return Model(idle, idlefx.report(idle).idle_gmacs, "layers 1")

    @torch.no_grad()
    def measure(size, count, model):
        cosine = torch.cosine_similarity(model.run(held_out), dense(held_out)).mean().item()
        return dict.fromkeys(tuned_study.FIGURES, cosine) | {"gmacs": model.gmacs, "saving": model.saving}

    for name, replaced in (
        ("dense_model", lambda size: dense), ("make", make), ("measure", measure),
        ("measure_photographs", lambda *_: {}), ("photographs", lambda *_: (held_out,)),
        ("scenes", lambda count, seed, split: SimpleNamespace(images=pictures(count))),
    ):  # fmt: skip
        monkeypatch.setattr(tuned_study, name, replaced)
    results = tmp_path / "results" / "study.json"
    words = ["--methods", "rest", "pruned", "--steps", 8, "--train", 64, "--results", results]
    for seeds in ([0], [0, 1]):
        monkeypatch.setattr(sys, "argv", ["study", *map(str, [*words, "--seeds", *seeds])])
        tuned_study.main()
    found = json.loads(results.read_text())
    runs = [(result["method"], result["steps"], result["seed"]) for result in found]
    assert runs == [(method, steps, seed) for steps, seed in ((0, 0), (8, 0), (8, 1)) for method in ("rest", "pruned")]
    cosines = {run: result["cosine"] for run, result in zip(runs, found, strict=True)}
    assert all(cosines[method, 8, seed] >= cosines[method, 0, 0] for method in ("rest", "pruned") for seed in (0, 1))
    assert tuned_study.table(found) in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["study", *map(str, [*words, "--seeds", 0, "--scenes", 7])])
    tuned_study.main()
    other = json.loads(results.read_text())[len(found) :]
    assert [result["scenes"] for result in other] == [7] * 4, "other scenes, other results"
    assert capsys.readouterr().out.endswith(f"{tuned_study.table(other)}\n")
