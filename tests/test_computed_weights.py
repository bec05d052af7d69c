"""Weights that are computed from others in each call: weight norm, spectral norm, pruning masks."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.utils import parametrizations, prune, remove_weight_norm, weight_norm
from torch.nn.utils.parametrize import remove_parametrizations

import idlefx
from tests.models.small import build, images
from tests.support.gradients import of_squares

LAYERS = ("blocks.1.mlp.fc1", "blocks.1.attn.qkv", "head")


def permanent(layer):
    remove_parametrizations(layer, "weight")


CHANGES = {
    "weight norm": (weight_norm, remove_weight_norm),
    "new weight norm": (parametrizations.weight_norm, permanent),
    "spectral norm": (parametrizations.spectral_norm, permanent),
    "pruning": (
        lambda layer: prune.l1_unstructured(layer, "weight", 0.3),
        lambda layer: prune.remove(layer, "weight"),
    ),
}


def changed(name):
    model = build("vit")
    for layer in LAYERS:
        CHANGES[name][0](model.get_submodule(layer))
    return model


@pytest.mark.parametrize("name", CHANGES)
def test_computed_weights_are_those_of_the_model(name):
    model = changed(name)
    x = images(model, 2)
    model(x)  # leaves weights that have a history
    whole, idle = idlefx.convert(model, [1], 1.0), idlefx.convert(model, [1], 0.5)
    assert idle.state_dict().keys() == model.state_dict().keys()
    wanted, found = of_squares(model, model(x)), of_squares(whole, whole(x))
    assert all(torch.allclose(wanted[key], found[key], atol=1e-6) for key in wanted)
    assert all(gradient is not None for gradient in of_squares(idle, idle(x)).values())
    for layer in LAYERS:
        CHANGES[name][1](model.get_submodule(layer))
    with torch.no_grad():
        assert torch.allclose(idle(x), idlefx.convert(model, [1], 0.5)(x), atol=1e-4)


@pytest.mark.parametrize("name", ["weight norm", "pruning"])
def test_shared_weights_stay_real(name):
    model = changed(name)
    idle = idlefx.convert(model, [1], 0.5, copy=False)
    assert all(a is b for a, b in zip(idle.parameters(), model.parameters(), strict=True))
    assert not any(isinstance(model.get_submodule(layer).weight, FakeTensor) for layer in LAYERS)
