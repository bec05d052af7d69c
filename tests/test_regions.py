"""Parts of a forward that run without gradients: what they write and read has the gradients that the model gives it."""

import copy

import pytest
import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

import idlefx
from idlefx.deploy import torch_compile
from tests.models.small import build, images
from tests.support.gradients import of_squares
from tests.support.messages import refusal, says


class Watching(nn.Module):
    """A ViT that keeps a moving mean of its patches and counts images."""

    def __init__(self):
        super().__init__()
        self.vit = build("vit")
        self.register_buffer("mean", torch.zeros(self.vit.embed_dim))
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        patches = self.vit.patch_embed(x)
        with torch.no_grad():
            self.mean.lerp_(patches.mean((0, 1)), 0.1)
            self.seen += len(x)
        tokens = self.vit.norm(self.vit.blocks(self.vit._pos_embed(patches)))
        return self.vit.head(tokens[:, 0])


class Writing(Watching):
    """Writes into a tensor that has gradients, into a parameter's twin, and computes with gradients in between."""

    def forward(self, x):
        patches = self.vit.patch_embed(x)
        with torch.no_grad():
            patches.mul_(1.5)
            with torch.enable_grad():
                inner = self.vit.norm(patches).mean((0, 1))
            torch.mul(patches.mean((0, 1)), 0.5, out=self.mean)
            offset = patches.std()
        tokens = self.vit.norm(self.vit.blocks(self.vit._pos_embed(patches))) + inner + offset
        return self.vit.head(tokens[:, 0])


def spectral():
    vit = build("vit").train()
    spectral_norm(vit.blocks[1].mlp.fc1)
    return vit


MODELS = {"buffers": Watching, "gradients": Writing, "spectral": spectral}


@pytest.fixture
def graphs(monkeypatch):
    """Lets the graphs of the backend run as they are."""
    seen = []
    monkeypatch.setattr(torch_compile, "compile_graph", lambda module, _: seen.append(module) or module)
    torch._dynamo.reset()
    yield seen
    torch._dynamo.reset()


def converted(model, keep, way):
    plan = {"layers": [1], "keep": keep}
    if way == "backend":
        return torch.compile(copy.deepcopy(model), backend="idlefx", options=plan)
    vit = getattr(model, "vit", model)
    return idlefx.convert(model, **plan, example_inputs=images(vit, 2))


@pytest.mark.parametrize("way", ["convert", "backend"])
@pytest.mark.parametrize("name", MODELS)
def test_everything_is_as_in_the_model_where_all_tokens_work(name, way, graphs):
    model = MODELS[name]()
    x = images(getattr(model, "vit", model), 2)
    idle = converted(model, 1.0, way)
    for _ in range(2):  # a graph that hangs on to the last call would fail in the second
        wanted, found = of_squares(model, model(x)), of_squares(idle, idle(x))
        for key, gradient in wanted.items():
            twin = found[f"_orig_mod.{key}" if way == "backend" else key]
            assert (gradient is None) == (twin is None), key
            assert gradient is None or torch.allclose(gradient, twin, rtol=1e-4, atol=1e-6), key
    buffers = {key.removeprefix("_orig_mod."): buffer for key, buffer in idle.named_buffers()}
    for key, buffer in model.named_buffers():
        assert torch.allclose(buffers[key], buffer) and buffers[key].requires_grad == buffer.requires_grad, key


@pytest.mark.parametrize("way", ["convert", "backend"])
@pytest.mark.parametrize("name", MODELS)
def test_it_trains_where_tokens_idle(name, way, graphs):
    model = MODELS[name]()
    x = images(getattr(model, "vit", model), 2)
    idle = converted(model, 0.5, way)
    before = [buffer.clone() for buffer in idle.buffers()]
    for _ in range(2):
        idle(x).square().mean().backward()
    assert all(p.grad is not None for p in idle.parameters())
    assert not any(b.requires_grad for b in idle.buffers())
    assert any(not torch.equal(a, b) for a, b in zip(before, idle.buffers(), strict=True))


def test_converted_models_are_copied_and_averaged():
    model = Watching()
    idle = converted(model, 0.5, "convert")
    average = ModelEmaV3(idle)
    idle(images(model.vit, 2)).sum().backward()
    average.update(idle)
    twin = copy.deepcopy(idle)
    assert torch.equal(twin.get_buffer("mean"), idle.get_buffer("mean"))


class Autocast(nn.Module):
    """A ViT that switches autocast off around its head, or around everything."""

    def __init__(self, around):
        super().__init__()
        self.vit, self.around, self.drop = build("vit"), around, nn.Identity()

    def forward(self, x):
        x = self.drop(x)
        if self.around == "head":
            x = self.vit.forward_features(x)
            with torch.autocast("cpu", enabled=False):
                return self.vit.head(x[:, 0].float())
        with torch.autocast("cpu", enabled=False):
            return self.vit(x)


@pytest.mark.parametrize("keep", [0.5, pytest.param(1.0, marks=pytest.mark.slow)])
def test_autocast_around_attention_is_refused_in_words(keep):
    model = Autocast("everything")
    said = refusal(converted, model, keep, "convert")
    assert says(said, r"capture: .*switches autocast inside its forward \(at .*:\d+", "around the call")


def test_autocast_around_the_head_is_kept():
    model = Autocast("head").eval()
    x = images(model.vit, 2)
    idle = converted(model, 1.0, "convert")
    for twin in (idle, copy.deepcopy(idle)):
        assert torch.equal(twin(x), model(x))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert twin(x).dtype == model(x).dtype == torch.float32
    idlefx.with_cut_loss(converted(model, 0.5, "convert"))(x)[1].backward()


def test_autocast_around_the_head_is_kept_in_both_modes():
    model = Autocast("head")
    model.drop = nn.Dropout(0.5)
    x = images(model.vit, 2)
    idle = converted(model, 1.0, "convert")
    for training in (True, False):
        for twin in (idle.train(training), copy.deepcopy(idle)):
            results = []
            for each in (twin, model.train(training)):
                torch.manual_seed(0)
                results.append(each(x))
            assert torch.equal(*results)


class AutocastMlp(nn.Module):
    """An MLP that computes its activation in full precision."""

    def __init__(self, mlp):
        super().__init__()
        self.mlp = mlp

    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            return self.mlp(x.float())


def test_autocast_inside_a_block_is_refused_in_words():
    model = build("vit", depth=2)
    model.blocks[1].mlp = AutocastMlp(model.blocks[1].mlp)
    first, second = idlefx.inspect(model)
    assert first.can_idle
    assert says(second.refusal, "switches autocast inside the block", "around the call", r"test_regions\.py:\d+")
