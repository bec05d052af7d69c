"""Models for dense prediction with converted encoders: what comes out of their heads."""

import re
import sys

import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils._pytree import tree_leaves

import idlefx
from idlefx.records import Step
from idlefx.runtime.selections import selections
from idlefx.zoo.comparisons import largest_difference

pytest.importorskip("transformers")
pytest.importorskip("torchvision")

from examples import dense
from examples.dense_models import SUBJECTS, sam

pytestmark = pytest.mark.filterwarnings("ignore:in train mode the model has other blocks")


@torch.no_grad()
def test_an_encoder_is_put_in_place_and_the_model_gets_its_own_back():
    subject, images = sam(), dense.scenes(2)
    own, answer = subject.encoder, subject.call(subject.model, images)

    class Dark(nn.Module):
        def forward(self, x):
            return own(torch.zeros_like(x))

    dark = dense.with_encoder(subject, Dark(), images)
    assert subject.encoder is own and largest_difference(answer, dark) > 0.01
    assert subject.same(answer, answer) == 1 > subject.same(answer, dark)
    assert torch.equal(dense.taken(subject, images), images)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("build", SUBJECTS, ids=lambda build: build.__name__)
def test_heads_get_what_idling_by_masks_gives(build, monkeypatch):
    subject, images = build(), dense.scenes(3)
    idle, row = dense.measure(subject, images)
    assert row["keeping all"] == 0 and row["by masks"] < 1e-5 and 0 < row["same"] < 1, row
    assert row["gmacs"][0] > 1.4 * row["gmacs"][1], row
    more = idlefx.convert(subject.encoder, subject.layers, 0.9, example_inputs=dense.taken(subject, images))
    answer = dense.with_encoder(subject, more, images)
    assert largest_difference(dense.by_masks(subject, more, images), answer) < 1e-5
    assert largest_difference(answer, dense.with_encoder(subject, idle, images)) > 1e-3, "another plan, another answer"

    monkeypatch.setattr(Step, "idles", True)  # or a block that keeps all would be left as it is
    whole = idlefx.convert(subject.encoder, subject.layers, 1.0, example_inputs=dense.taken(subject, images))
    assert len(selections(whole, dense.taken(subject, images))) == len(whole.plan)
    kept, wanted = dense.with_encoder(subject, whole, images), subject.call(subject.model, images)
    assert all(torch.equal(a, b) for a, b in zip(tree_leaves(kept), tree_leaves(wanted), strict=True))


@pytest.mark.slow
def test_the_script_shows_a_table_and_draws(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "argv", ["dense.py", "--picture", str(tmp_path / "dense.png")])
    dense.main()
    shown = capsys.readouterr().out
    rows = [line for line in shown.splitlines() if re.search(r"\| 0 +\| \de-0[678] +\| \d+% +\|$", line)]
    assert len(rows) == len(SUBJECTS) and "windows in 3, tokens in 2 of 6 blocks" in shown
    picture = Image.open(tmp_path / "dense.png")
    assert picture.height > 500 < picture.width
