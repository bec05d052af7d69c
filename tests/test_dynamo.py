"""The backend idlefx of torch.compile: as convert does it; not for half a model; refusals keep their words."""

import dataclasses
import inspect
import re

import pytest
import torch
import torchvision
from torch._dynamo.exc import BackendCompilerFailed

import idlefx
from idlefx.deploy import torch_compile
from tests.models.breaking import Autocast, Broken, HalfFrozen
from tests.models.small import build, images

OPTIONS = {"layers": [1, 3], "keep": 0.5, "schedule": "blocks"}


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def graphs(monkeypatch):
    """Lets the graphs run eagerly, which is fast, and lists them."""
    seen = []

    def keep(module, _):
        seen.append(module)
        return module

    monkeypatch.setattr(torch_compile, "compile_graph", keep)
    return seen


def compiled(model, options=OPTIONS, **others):
    return torch.compile(model, backend="idlefx", options=options, **others)


def idles(module):
    return any(node.name.endswith("_scatter") for node in module.graph.nodes)


@pytest.mark.slow
def test_inductor_computes_what_convert_gives_and_its_gradients():
    model = build("vit")
    idle, fast = idlefx.convert(model, **OPTIONS), compiled(model, fullgraph=True)
    x = images(model, 2)
    found, wanted = fast(x), idle(x)
    assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-4) and not torch.allclose(found, model(x), atol=1e-2)
    found.square().sum().backward()
    wanted.square().sum().backward()
    grads = {name: parameter.grad for name, parameter in idle.named_parameters()}
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter.grad, grads[name], rtol=1e-3, atol=1e-4), name


@pytest.mark.parametrize("name", ["registers_gap", "hand_written", "collision"])
@torch.no_grad()
def test_graph_is_what_convert_makes(name, graphs):
    model = build(name)
    idle, fast = idlefx.convert(model, **OPTIONS), compiled(model, fullgraph=True)
    for batch in (1, 2, 3, 5):
        x = images(model, batch)
        assert torch.allclose(fast(x), idle(x), atol=1e-5)
    assert all(map(idles, graphs)) and 0 < len(graphs) <= 3, "two batches, and once for all others"


def test_dropout_is_the_models_own_in_both_modes(graphs):
    model = build("vit", proj_drop_rate=0.2, drop_path_rate=0.3, attn_drop_rate=0.1)
    x, seen = images(model, 3), {}
    idle, fast = idlefx.convert(model, **OPTIONS), compiled(model)
    for training in (True, False):
        for which in (model, idle):
            which.train(training)
        for seed in (0, 1):
            torch.manual_seed(seed)
            seen[training, seed] = fast(x)
            torch.manual_seed(seed)
            assert torch.allclose(seen[training, seed], idle(x), atol=1e-5)
    assert not torch.equal(seen[True, 0], seen[True, 1]) and torch.equal(seen[False, 0], seen[False, 1])


def test_all_sizes_free_leave_the_batch_free(graphs):
    model = build("vit")
    fast = compiled(model, dynamic=True)
    for batch in (2, 4):
        assert torch.allclose(fast(images(model, batch)), idlefx.convert(model, **OPTIONS)(images(model, batch)))
    assert len(graphs) == 1


class ScaledByBatch(torch.nn.Module):
    """What its blocks give is multiplied by a fraction of the number of images."""

    def __init__(self):
        super().__init__()
        self.vit = build("vit")

    def forward(self, x):
        tokens = self.vit._pos_embed(self.vit.patch_embed(x))
        for block in self.vit.blocks:
            tokens = block(tokens) * (len(x) / 2.0)
        return self.vit.head(tokens[:, 0])


@torch.no_grad()
def test_fractions_of_the_batch_leave_it_free(graphs):
    model = ScaledByBatch().eval()
    fast = compiled(model, fullgraph=True, dynamic=True)
    for batch in (2, 3, 5):
        fast(images(model.vit, batch))
    assert len(graphs) == 1 and idles(graphs[0])


def test_module_stays_the_users(graphs):
    model, seen = build("vit"), []
    names = list(model.state_dict())
    fast = compiled(model)
    model.register_forward_hook(lambda *_: seen.append("hook"))
    fast(images(model, 2)).sum().backward()
    assert seen == ["hook"] and list(model.state_dict()) == names and model.head.weight.grad is not None
    with torch.no_grad():
        before = fast(images(model, 2))
        model.head.bias.add_(1.0)
        assert torch.allclose(fast(images(model, 2)), before + 1, atol=1e-5)


def test_own_selector_is_used(graphs):
    def farthest_first(x):
        return torch.arange(x.shape[1], device=x.device, dtype=x.dtype).expand(x.shape[0], -1)

    idlefx.selector(farthest_first)
    model, options = build("vit"), {**OPTIONS, "selector": "farthest_first"}
    x = images(model, 2)
    found = compiled(model, options)(x)
    assert torch.allclose(found, idlefx.convert(model, **options)(x), atol=1e-5)
    assert not torch.allclose(found, idlefx.convert(model, **OPTIONS)(x), atol=1e-2)


def test_options_are_those_of_convert(graphs):
    known = {each.name for each in dataclasses.fields(idlefx.PlanOptions)}
    assert known == inspect.signature(idlefx.convert).parameters.keys() - {"model", "plan", "example_inputs", "copy"}
    model, options, x = build("vit"), {**OPTIONS, "multiple_of": 8}, torch.randn(2, 3, 48, 48)
    assert torch.allclose(compiled(model, options)(x), idlefx.convert(model, **options)(x), atol=1e-5)


@pytest.mark.filterwarnings("ignore:a graph break")
def test_half_a_model_is_refused_again_and_again(graphs):
    model = Broken(2)
    fast = compiled(model, {"layers": [0], "keep": 0.5})
    words = r"breaking\.py:\d+ .*vit\.blocks\.2 to vit\.blocks\.3.*vit\.blocks\.0 to vit\.blocks\.1.*fullgraph=True"
    for batch in (2, 2, 3):
        with pytest.raises(BackendCompilerFailed, match=words):
            fast(images(model.vit, batch))


def test_blocks_that_share_one_graph_are_refused(graphs):
    model = build("vit")
    model.blocks[1].register_forward_hook(lambda *_: print("a side effect"))
    with pytest.raises(BackendCompilerFailed, match="is a Block, of which the model has 4"):
        compiled(model, {"layers": [0], "keep": 0.5})(images(model, 2))


@torch.no_grad()
def test_head_behind_a_break_is_compiled_as_it_is(graphs):
    model = Broken(4)
    fast = compiled(model)
    idle = idlefx.convert(build("vit"), **OPTIONS)
    for batch in (2, 3):  # a recompilation is no break
        x = images(model.vit, batch)
        with pytest.warns(UserWarning, match=r"a graph break .* at .*breaking\.py:\d+"):
            assert torch.allclose(fast(x), idle(x), atol=1e-5)
    assert [idles(graph) for graph in graphs] == [True, False] * 2


def test_plan_that_does_not_fit_a_part_tells_of_the_break(graphs):
    with pytest.raises(BackendCompilerFailed, match=r"(?s)there is no block 3; blocks count .*a graph break cuts"):
        compiled(Broken(2))(torch.randn(2, 3, 48, 48))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (None, "InputError: backend: .* needs options="),
        ({"layers": [1]}, "PlanError: plan: options lack keep"),
        ({**OPTIONS, "ratio": 0.5}, r"PlanError: plan: unknown options \['ratio'\]; known are layers, keep"),
        ({**OPTIONS, "prefix": "x"}, "PlanError: plan: prefix='x' is neither"),
        ({**OPTIONS, "reselect": 3}, "PlanError: plan: reselect=3 is neither"),
        ({**OPTIONS, "layers": "3"}, "PlanError: plan: layers='3' is not a list"),
        ({**OPTIONS, "layers": [9]}, "PlanError: plan: there is no block 9"),
        ({**OPTIONS, "keep": 2.0}, "PlanError: plan: keep=2.0 is not in"),
        ({**OPTIONS, "schedule": "x"}, "PlanError: plan: unknown schedule 'x'"),
        ({**OPTIONS, "selector": "x"}, "PlanError: plan: unknown selector 'x'"),
    ],
)
def test_bad_options_are_refused_in_words(options, words, graphs):
    model = build("vit")
    with pytest.raises(BackendCompilerFailed, match=re.compile(words, re.DOTALL)) as refused:
        compiled(model, options)(images(model, 2))
    assert isinstance(refused.value.inner_exception, idlefx.IdleFxError)


@torch.no_grad()
def test_batch_of_one_that_cannot_be_told_apart_is_named(graphs):
    model = torchvision.models.VisionTransformer(48, 8, 4, 3, 48, 96).eval()
    fast, x = compiled(model), torch.randn(3, 3, 48, 48)
    with pytest.raises(BackendCompilerFailed, match=r"(?s)block 1 .* cannot idle.*a batch of two or more may do"):
        fast(x[:1])
    assert torch.allclose(fast(x), idlefx.convert(model, **OPTIONS)(x), atol=1e-5)


def test_mode_is_refused(graphs):
    with pytest.raises(BackendCompilerFailed, match="mode='max-autotune' is of backend='inductor'"):
        torch.compile(build("vit"), backend="idlefx", mode="max-autotune")(torch.randn(2, 3, 48, 48))


@torch._dynamo.config.patch(suppress_errors=True)
def test_suppressed_errors_do_not_let_the_model_run_dense(graphs):
    model = build("vit")
    fast = compiled(model, {**OPTIONS, "layers": [9]})
    for _ in range(2):
        with pytest.raises(idlefx.PlanError, match="there is no block 9"):
            fast(images(model, 2))


@torch.no_grad()
def test_autocast_belongs_around_the_call(graphs):
    model, x = Autocast(False), torch.randn(2, 3, 48, 48)
    fast, idle = compiled(model), idlefx.convert(model.vit, **OPTIONS)
    assert torch.allclose(fast(x), idle(x), atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(compiled(model.vit)(x), idle(x)) and idle(x).dtype == torch.bfloat16
    with pytest.raises(BackendCompilerFailed, match=r"CaptureError: .*autocast inside its forward \(at .*breaking"):
        compiled(Autocast(True))(x)


def test_what_has_no_gradients_gets_none(graphs):
    model = HalfFrozen()
    found = compiled(model, fullgraph=True)(images(model.vit, 2))
    found.sum().backward()
    assert torch.allclose(found, idlefx.convert(build("vit"), **OPTIONS)(images(model.vit, 2)), atol=1e-5)
    assert model.vit.blocks[3].attn.qkv.weight.grad is not None
    assert all(parameter.grad is None for parameter in model.vit.blocks[:2].parameters())
