"""Models and inputs that cannot be converted: said early, in words, without touching the model."""

import re

import pytest
import timm
import torch
from torch import nn

import idlefx
from idlefx.analysis.blocks import find_blocks, open_blocks
from idlefx.analysis.subset import Subset
from idlefx.capture.export import capture
from idlefx.graph.build import add_call
from idlefx.graph.notes import Made
from idlefx.pipeline import spell
from idlefx.rewriting.rebuilder import Rebuilder
from tests.models.small import build, build_mixing, fingerprint, images
from tests.support.cases import Case, convert
from tests.support.messages import says

aten = torch.ops.aten
FAILURES = {
    "layer": {"layers": [9]},
    "keep": {"keep": 2.0},
    "broken selector": {"selector": "broken_selector"},
    "unknown selector": {"selector": "no_such_selector"},
    "schedule": {"schedule": "sometimes"},
    "shape": {"example_inputs": torch.zeros(2, 3, 5, 5)},
}


class Fickle(nn.Module):
    """Decides by the content of the image what to compute."""

    def __init__(self) -> None:
        super().__init__()
        self.vit = build("vit")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.mean() > 0:
            return self.vit(x)
        return self.vit(-x)


class Private(nn.Module):
    """A model of no known library."""

    def __init__(self) -> None:
        super().__init__()
        self.vit = build("vit")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.vit(x)


class NoResidual(nn.Module):
    """An encoder whose attention is added to nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 48, 8, stride=8)
        self.attention = timm.layers.Attention(48, num_heads=3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(self.patches(x).flatten(2).transpose(1, 2)).mean(1)


@idlefx.selector
def broken_selector(x):
    raise RuntimeError("the selector is broken")


def refusal(model: nn.Module, **arguments: object) -> str:
    with pytest.raises(idlefx.IdleFxError) as caught:
        idlefx.convert(model, **({"layers": [1], "keep": 0.5} | arguments))
    return str(caught.value)


def test_model_without_attention_is_refused():
    model = timm.create_model("resnet10t", num_classes=10)
    before = fingerprint(model)
    message = refusal(model, example_inputs=torch.randn(2, 3, 64, 64))
    assert says(message, r"no .*(attention|transformer block)", r"attention"), message
    assert fingerprint(model) == before


def test_attention_without_a_residual_connection_is_refused():
    message = refusal(NoResidual().eval(), layers=[0], example_inputs=torch.randn(2, 3, 48, 48))
    assert says(message, r"^blocks: ", r"no attention .*added back to a residual stream.*nothing can idle"), message


def test_model_on_the_meta_device_is_refused():
    model = build("vit").to("meta")
    message = refusal(model)
    assert says(message, r"\bmeta\b", r"load|to_empty|weights"), message
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def test_model_with_lazy_parameters_is_refused():
    model = build("vit")
    model.head = nn.LazyLinear(10)
    message = refusal(model, example_inputs=torch.randn(2, 3, 48, 48))
    assert says(message, r"lazy|uninitiali[sz]ed", r"run|forward|call", r"head"), message
    assert model.head.has_uninitialized_params()


@pytest.mark.parametrize("shape", [(2, 3, 40, 40), (2, 4, 48, 48), (3, 48)], ids=str)
def test_example_of_the_wrong_shape_is_refused(shape):
    model = build("vit")
    before = fingerprint(model)
    message = refusal(model, example_inputs=torch.randn(shape))
    assert says(message, r"captur|trac", r"example_inputs", re.escape(", ".join(map(str, shape)))), message
    assert fingerprint(model) == before


def test_control_flow_that_depends_on_data_is_refused():
    model = Fickle().eval()
    before = fingerprint(model)
    message = refusal(model, example_inputs=torch.randn(2, 3, 48, 48))
    assert says(message, r"captur|trac", r"test_refusals\.py", r"torch\.where|control flow|branch"), message
    assert fingerprint(model) == before


def test_unknown_model_asks_for_an_example():
    message = refusal(Private())
    assert says(message, r"example_inputs", r"Private"), message


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("failure", FAILURES)
def test_model_is_untouched_whatever_fails(failure, training):
    model = build("distilled", drop_path_rate=0.2).train(training)
    model.blocks[1].eval()
    model.head.register_forward_pre_hook(lambda *_: None)
    before = fingerprint(model)
    refusal(model, **FAILURES[failure])
    assert fingerprint(model) == before


def test_model_still_converts_after_a_refusal():
    model = build("vit")
    x = images(model, 2)
    expected = model(x)
    refusal(model, layers=[9])
    assert torch.equal(convert(model, Case((1,), 1.0))(x), expected)


def test_refusals_are_of_one_family():
    kinds = [kind for kind in vars(idlefx).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    assert idlefx.IdleFxError in kinds
    assert all(issubclass(kind, idlefx.IdleFxError) for kind in kinds)


def test_block_that_cannot_be_followed_is_no_block_to_open():
    model = build_mixing()
    graph = spell(capture(model, images(model, 2)).eval_graph)
    mixing = find_blocks(graph)[1]
    with pytest.raises(idlefx.BlockError, match=r"block 1 \(blocks\.1\).*conv1d.*over neighbouring tokens"):
        open_blocks(graph.graph, [mixing])


def test_tokens_that_an_operation_takes_apart_are_refused_by_the_rebuilder():
    model = timm.create_model("eva02_tiny_patch14_224", img_size=48, patch_size=8, embed_dim=48, depth=1, num_heads=3)
    graph = spell(capture(model.eval(), images(model, 2)).eval_graph)
    block = find_blocks(graph)[0]
    (opened,) = open_blocks(graph.graph, [block])
    half = block.tokens // 2
    any_half = Subset(None, (), tuple(range(block.tokens)), half)  # though the block cuts behind the class token
    with graph.graph.inserting_before(opened.exit):
        tokens = add_call(graph.graph, aten.narrow.default, opened.entry, 1, 0, half, name="half", like=opened.entry)
        note = Made(block.index, "work")
        rebuild = Rebuilder(graph.graph, opened.walk, any_half, {opened.entry: tokens}, "half_", note)
        with pytest.raises(idlefx.PassError, match=r"cuts the image tokens apart"):
            rebuild(opened.exit)
