"""The study of recipes, on a small model and few pictures."""

import json
import sys

import pytest
import torch

from examples import recipe_study
from tests.models.colours import Colours, vit


def small(count, split):
    return torch.stack([Colours(count, 0.0)[index][0] for index in range(count)])


@pytest.mark.slow
def test_it_goes_on_where_it_was_and_prints_what_was_won(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(recipe_study, "dense_model", lambda: vit(num_classes=0))
    monkeypatch.setattr(recipe_study, "images", small)
    monkeypatch.delitem(recipe_study.RECIPES, "feature by squares")  # an output that this model does not have
    results = tmp_path / "results" / "study.json"
    words = ["--idle", "rest", "--layers", 1, "--keep", 0.4, "--steps", 5, "--scenes", 32, "--held-out", 16]
    for recipes in (["default"], list(recipe_study.RECIPES)):
        monkeypatch.setattr(sys, "argv", ["study", *map(str, [*words, "--results", results, "--recipes", *recipes])])
        recipe_study.main()
    found = json.loads(results.read_text())
    assert [result["recipe"] for result in found] == list(recipe_study.RECIPES)
    assert recipe_study.table(found) in capsys.readouterr().out
    assert all(0 < result["distance"] <= 1 for result in found)
