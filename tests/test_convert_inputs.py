"""A converted model takes and returns what the model does, in both modes, for any batch."""

import pytest
import timm
import torch

import idlefx
from tests.models.small import DROPOUTS, Wrapper, build, images
from tests.support.cases import (
    Case,
    convert,
    relative_error,
    wanted,
)

HALF = Case((1, 3), 0.5)


@torch.no_grad()
def test_example_of_one_image_leaves_the_batch_free():
    model = build("vit")
    idle = convert(model, HALF, example_inputs=images(model, 1))
    x = images(model, 3)
    assert relative_error(idle(x), wanted(model, "vit", HALF, x).output) <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("form", ["tensor", "tuple", "dict"])
def test_inputs_go_by_position_or_by_name(form):
    model = build("vit")
    example = images(model, 2)
    given = {"tensor": example, "tuple": (example,), "dict": {"x": example}}[form]
    idle = convert(model, HALF, example_inputs=given)
    x = images(model, 3, seed=4)
    expected = wanted(model, "vit", HALF, x).output
    assert relative_error(idle(x), expected) <= 1e-5
    assert torch.equal(idle(x=x), idle(x))


@torch.no_grad()
def test_inputs_and_outputs_keep_their_structure():
    model = Wrapper(build("vit")).eval()
    x, gain = images(model.net, 3), torch.full((3, 1, 1, 1), 1.5)
    example = {"picture": images(model.net, 2), "gain": torch.ones(2, 1, 1, 1)}
    idle = convert(model, HALF, example_inputs=example)
    out = idle(picture=x, gain=gain)
    expected = wanted(model.net, "vit", HALF, x * gain).output
    assert list(out) == ["logits", "pair"] and isinstance(out["pair"], tuple)
    assert relative_error(out["logits"], expected) <= 1e-5
    assert torch.equal(out["pair"][0], expected.argmax(-1))
    assert torch.equal(out["pair"][1], gain)
    assert [step.path for step in idle.plan] == ["net.blocks.1", "net.blocks.2", "net.blocks.3"]
    assert torch.equal(idle(gain=gain, picture=x)["logits"], out["logits"])


@torch.no_grad()
@pytest.mark.parametrize("captured_in", ["train", "eval"])
@pytest.mark.parametrize("family", ["vit", "distilled", "parallel_things", "parallel_scaling", "hand_written"])
def test_dropout_follows_the_mode(family, captured_in):
    model = build(family, **DROPOUTS)
    x = images(model, 4)
    model.train(captured_in == "train")
    idle = convert(model, Case((1,), 1.0))
    assert idle.training == model.training

    idle.eval(), model.eval()
    still = idle(x)
    assert torch.equal(still, model(x))
    idle.train(), model.train()
    for seed in (1, 2):
        torch.manual_seed(seed)
        actual = idle(x)
        torch.manual_seed(seed)
        assert torch.equal(actual, model(x))
        assert not torch.allclose(actual, still, atol=1e-3)
    assert torch.equal(idle.eval()(x), still)


@torch.no_grad()
@pytest.mark.parametrize("captured_in", ["train", "eval"])
def test_dropout_follows_the_mode_where_tokens_idle(captured_in):
    model = build("vit", **DROPOUTS)
    x = images(model, 4)
    idle = convert(model.train(captured_in == "train"), HALF)
    expected = wanted(model.eval(), "vit", HALF, x)
    assert relative_error(idle.eval()(x), expected.output) <= 1e-5
    noisy = idle.train()(x)
    assert not torch.allclose(noisy, idle(x), atol=1e-3)
    assert relative_error(idle.eval()(x), expected.output) <= 1e-5


@torch.no_grad()
def test_distilled_training_returns_both_heads():
    model = build("distilled")
    model.set_distilled_training(True)
    x = images(model, 3)
    idle = convert(model.train(), Case((1,), 1.0))
    both, expected = idle(x), model(x)
    assert isinstance(both, tuple) and len(both) == 2
    assert torch.equal(both[0], expected[0]) and torch.equal(both[1], expected[1])
    assert not torch.equal(both[0], both[1])
    assert torch.equal(idle.eval()(x), model.eval()(x))


@torch.no_grad()
def test_size_of_a_model_of_features_is_found():
    name, small = "vit_tiny_patch16_224", {"img_size": (48, 32), "depth": 3, "in_chans": 1}
    model = timm.create_model(name, features_only=True, **small).eval()
    idle = idlefx.convert(model, layers=[1], keep=1.0)
    assert idle.conversion.facts.image_size == (1, 48, 32)
    x = torch.randn(3, 1, 48, 32)
    assert all(one.equal(other) for one, other in zip(idle(x), model(x), strict=True))
