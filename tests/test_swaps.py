"""Modules that are pruned, parametrised or replaced after the conversion do what they would have done before it."""

import copy
import pickle

import pytest
import torch
from timm.layers import LayerNorm
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.testing._internal.two_tensor import TwoTensor

import idlefx
from idlefx.graph.notes import Layer
from idlefx.graph.state import wrapper_kind
from idlefx.runtime.parts import Part
from idlefx.runtime.selections import selections
from idlefx.runtime.swaps import read_weight
from tests.models.small import build, images

PLAN = {"layers": [1], "keep": 0.5}


class Shrunk(nn.Module):
    def forward(self, weight):
        return 0.9 * weight


def layers(model, kind=nn.Linear):
    return [module for module in model.modules() if isinstance(module, kind)]


def pruned(model):
    for layer in layers(model, (nn.Linear, nn.Conv2d)):
        prune.l1_unstructured(layer, "weight", amount=0.5)


def parametrised(model):
    for layer in layers(model, (nn.Linear, nn.LayerNorm)):
        parametrize.register_parametrization(layer, "weight", Shrunk())


def weight_normed(model):
    for layer in layers(model):
        nn.utils.weight_norm(layer)


def replaced(model):
    torch.manual_seed(1)
    width = model.head.in_features
    model.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 5))
    model.blocks[1].mlp.fc1 = nn.Sequential(model.blocks[1].mlp.fc1, nn.Linear(4 * width, 4 * width))
    model.patch_embed.proj = nn.Conv2d(3, width, 8, 8, bias=False)


CHANGES = [pruned, parametrised, pytest.param(weight_normed, marks=pytest.mark.slow), replaced]


@pytest.fixture(scope="module")
def model():
    return build("vit")


@pytest.fixture(scope="module")
def converted(model):
    return idlefx.convert(model, **PLAN)


@pytest.fixture
def idle(converted):
    return copy.deepcopy(converted)


@pytest.fixture(scope="module", params=CHANGES, ids=lambda change: change.__name__)
def pair(request, model, converted):
    """What was converted and then changed, and what was changed and then converted."""
    before, after = copy.deepcopy(model), copy.deepcopy(converted)
    request.param(before)
    request.param(after)
    return after, idlefx.convert(before, **PLAN)


def test_layers_stand_where_they_stood(model, idle):
    for kind in (nn.Linear, nn.LayerNorm, nn.Conv2d):
        assert [str(layer) for layer in layers(idle, kind)] == [str(layer) for layer in layers(model, kind)], (
            f"{kind.__name__} with other settings, or not all of them"
        )
    assert [name for name, _ in idle.named_parameters()] == [name for name, _ in model.named_parameters()]


def test_a_change_does_the_same_before_and_after(model, pair):
    after, before = pair
    x = images(model, 3)
    for _ in range(2):
        assert torch.equal(after(x), before(x))
        chosen = selections(before, x)
        assert all(where.equal(chosen[block]) for block, where in selections(after, x).items())
        for each in (after, before):  # and what is trained takes effect
            gradients = torch.autograd.grad(each(x).square().mean(), list(each.parameters()))
            with torch.no_grad():
                torch._foreach_sub_(list(each.parameters()), gradients, alpha=0.1)


def test_it_goes_wherever_the_model_goes(model, pair):
    after, _ = pair
    x = images(model, 2)
    wanted = after(x)
    assert torch.equal(idlefx.with_cut_loss(after)(x)[0], wanted)
    assert torch.equal(copy.copy(after)(x), wanted)
    assert torch.equal(copy.deepcopy(after)(x), wanted)
    assert torch.equal(torch.export.export(copy.deepcopy(after), (x,)).module()(x), wanted)
    if not any(map(parametrize.is_parametrized, after.modules())):  # torch pickles none that is
        assert torch.equal(pickle.loads(pickle.dumps(after))(x), wanted)


def test_it_compiles_as_one_graph(model, idle):
    pruned(idle)
    x = images(model, 3)
    compiled = torch.compile(idle, backend="eager", fullgraph=True, dynamic=True)
    torch.testing.assert_close(compiled(x), idle(x))


def test_parameters_of_containers_are_pruned_too():
    model = build("layer_scale")
    before, after = copy.deepcopy(model), idlefx.convert(model, **PLAN)
    for each in (before, after):
        prune.l1_unstructured(each.blocks[2].ls1, "gamma", amount=0.5)
        with torch.no_grad():
            each.blocks[2].ls1.gamma_orig.mul_(100)
    x = images(model, 2)
    assert torch.equal(after(x), idlefx.convert(before, **PLAN)(x))


class Block(nn.Module):
    def forward(self, x):
        return x


def wrapped(layer):
    return nn.Sequential(layer)


REFUSED = {  # containers behind the back of `parts`, which refuses them where they are assigned
    "block": lambda idle: idle.blocks._modules.update({"2": Block()}),
    "attention": lambda idle: idle.blocks[0]._modules.update(attn=Block()),
    "nothing": lambda idle: idle.blocks[0]._modules.update(mlp=None),
    "scores": lambda idle: setattr(idle.blocks[1].attn, "qkv", wrapped(idle.blocks[1].attn.qkv)),
    "norm": lambda idle: setattr(idle.blocks[2], "norm1", nn.LayerNorm(48, eps=0.1)),
    "kind of norm": lambda idle: setattr(idle.blocks[2], "norm1", LayerNorm(48, eps=1e-6)),
    "hook": lambda idle: idle.blocks[1].attn.qkv.register_forward_hook(lambda *_: None),
    "hook before": lambda idle: idle.blocks[1].attn.qkv.register_forward_pre_hook(lambda *_: None),
    "forward": lambda idle: setattr(idle.blocks[1].attn.qkv, "forward", lambda x: x),
}
WORDS = {
    "block": r"call: `blocks.2` was replaced by a Block after .*: replace it in the model and convert that",
    "attention": r"call: `blocks.0.attn` was replaced by a Block",
    "nothing": r"call: `blocks.0.mlp` was replaced by a NoneType",
    "scores": r"call: `blocks.1.attn.qkv` is a torch.nn.modules.container.Sequential now, .* change it before",
    "norm": r"call: `blocks.2.norm1` has other sizes or settings now",
    "kind of norm": r"call: `blocks.2.norm1` is a timm.layers.norm.LayerNorm now",
    "hook": r"call: `blocks.1.attn.qkv` has a forward hook now",
    "hook before": r"call: `blocks.1.attn.qkv` has a forward hook now",
    "forward": r"call: `blocks.1.attn.qkv` is a torch.nn.modules.linear.Linear now",
}


@pytest.mark.parametrize("change", REFUSED)
def test_what_would_not_run_is_refused_at_the_call(model, idle, change):
    idle(images(model, 2))
    REFUSED[change](idle)
    with pytest.raises(idlefx.InputError, match=WORDS[change]):
        idle(images(model, 2))
    if "was replaced" in WORDS[change]:
        for use in (idlefx.with_cut_loss, idlefx.compile, idlefx.report):
            with pytest.raises(idlefx.InputError, match=WORDS[change]):
                use(idle)


def test_layers_that_share_a_weight_are_only_read():
    model = build("vit")
    model.blocks[2].mlp.fc1.weight = model.blocks[0].mlp.fc1.weight
    idle, x = idlefx.convert(model, layers=[1], keep=1.0), images(model, 2)
    kinds = [type(block.mlp.fc1) for block in idle.blocks]
    assert kinds == [Part, nn.Linear, Part, nn.Linear]
    assert torch.equal(idle(x), model(x))


def test_a_spectral_norm_where_tokens_are_scored_is_for_inference(model, idle):
    parametrizations.spectral_norm(idle.blocks[1].attn.qkv)
    idle.eval()(images(model, 2))
    with pytest.raises(idlefx.InputError, match=r"`blocks.1.attn.qkv` has a spectral norm now"):
        idle.train()(images(model, 2))


class Counted(torch.Tensor):
    """A stand-in for a quantised weight."""

    def dequantize(self):
        return self.as_subclass(torch.Tensor) / 4


def test_quantised_weights_are_read_as_what_they_stand_for():
    layer = nn.Linear(3, 2)
    layer.weight = nn.Parameter(torch.ones(2, 3).as_subclass(Counted))
    assert torch.equal(read_weight(layer, "weight", *Layer("head", "Linear", (3, 2), True)), torch.full((2, 3), 0.25))
    assert torch.equal(read_weight(layer, "bias", *Layer("head", "Linear", (3, 2), True)), layer.bias)


def hold_twice(layer):
    """Another stand-in, which holds its values in two tensors."""
    layer.weight = nn.Parameter(TwoTensor(layer.weight.data, layer.weight.data.clone()))


def test_weights_that_no_file_holds_are_not_emitted(idle, tmp_path):
    hold_twice(idle.head)
    with pytest.raises(idlefx.InputError, match=r"emit: weights .* are torch.*TwoTensor, .* before it is quantised"):
        idlefx.emit(idle, tmp_path / "emitted")


def test_what_the_backend_cannot_look_into_is_refused(model):
    twice = copy.deepcopy(model)
    hold_twice(twice.head)
    assert wrapper_kind(model.parameters()) == ""
    torch._dynamo.reset()
    compiled = torch.compile(twice, backend="idlefx", options=PLAN)
    with pytest.raises(
        Exception, match=r"are torch.*TwoTensor, which the backend cannot look into; use idlefx.convert"
    ):
        compiled(images(model, 2))
