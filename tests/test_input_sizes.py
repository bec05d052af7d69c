"""Every size of an input but the batch is built into a converted model, so another one is refused at each call."""

import copy

import pytest
import timm
import torch
from torch import nn

import idlefx
from idlefx.runtime.selections import selections
from tests.models.small import build, images

OTHER_SHAPE = r"^input: `x` has shape \(2, 3, 48, 64\), but the model was traced for \(batch, 3, 64, 48\); bring it to"


def upright() -> nn.Module:
    """A model of images that are not square; turned, they have as many patches."""
    return build("vit", img_size=(64, 48)).eval()


@pytest.fixture(scope="module")
def idle():
    return idlefx.convert(upright(), layers=[1], keep=0.5)


TURNED = torch.zeros(2, 3, 48, 64)


@torch.no_grad()
def test_turned_images_are_refused_as_the_model_does(idle):
    with pytest.raises(AssertionError):
        upright()(TURNED)
    for form in (idle, copy.deepcopy(idle), copy.deepcopy(idle).train()):
        with pytest.raises(idlefx.InputError, match=OTHER_SHAPE):
            form(TURNED)
    with pytest.raises(idlefx.InputError, match=OTHER_SHAPE):
        idle(x=TURNED)
    with pytest.raises(idlefx.InputError, match=OTHER_SHAPE):
        selections(idle, TURNED)
    with pytest.raises(idlefx.InputError, match=OTHER_SHAPE):
        torch.func.functional_call(idle, dict(idle.named_parameters()), (TURNED,))


@torch.no_grad()
@pytest.mark.parametrize("keep", [0.5, pytest.param(1.0, marks=pytest.mark.slow)])
def test_a_model_of_all_sizes_takes_that_of_the_example(keep):
    model = timm.create_model("vit_tiny_patch16_224", depth=2, img_size=64, num_classes=10, dynamic_img_size=True)
    idle = idlefx.convert(model.eval(), layers=[1], keep=keep)
    with pytest.raises(idlefx.InputError, match=r"traced for .batch, 3, 64, 64.; bring it to that size, or convert"):
        idle(torch.zeros(2, 3, 32, 128))
    long = idlefx.convert(model, layers=[1], keep=keep, example_inputs=torch.zeros(2, 3, 32, 128))
    assert long(torch.zeros(3, 3, 32, 128)).shape == (3, 10)


@torch.no_grad()
def test_too_few_dimensions_and_no_tensor_are_refused(idle):
    with pytest.raises(idlefx.InputError, match=r"has shape \(3, 64, 48\), but"):
        idle(torch.zeros(3, 64, 48))
    with pytest.raises(idlefx.InputError, match="`x` must be a tensor, as in the example; got None"):
        idle(None)


@torch.no_grad()
def test_number_types_that_take_other_ways_are_refused():
    class Pixels(nn.Module):
        """A model that reads bytes in another way than numbers."""

        def __init__(self) -> None:
            super().__init__()
            self.vit = build("vit")

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.vit(x * (1 / 255) if x.dtype == torch.uint8 else x)

    x = images(Pixels().vit, 2)
    idle = idlefx.convert(Pixels(), layers=[1], keep=0.5, example_inputs=x)
    with pytest.raises(idlefx.InputError, match="`x` is uint8, but was float32 when the model was traced"):
        idle((255 * x).to(torch.uint8))
    assert copy.deepcopy(idle).double()(x.double()).dtype == torch.float64
    with torch.autocast("cpu"):
        assert idle(x.bfloat16()).dtype == torch.bfloat16


@torch.no_grad()
def test_a_batch_that_the_model_fixes_is_checked_too():
    class Two(nn.Module):
        """A model that only takes two images."""

        def __init__(self) -> None:
            super().__init__()
            self.vit = build("vit")
            self.register_buffer("gain", torch.ones(2, 1, 1, 1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.vit(x * self.gain)

    model = Two().eval()
    with pytest.warns(UserWarning, match="fixes the batch size"):
        idle = idlefx.convert(model, layers=[1], keep=0.5, example_inputs=images(model.vit, 2))
    with pytest.raises(idlefx.InputError, match=r"has shape \(1, 3, 48, 48\), but the model was traced for \(2, 3"):
        idle(images(model.vit, 1))


@torch.no_grad()
def test_compiled_models_refuse_in_the_same_words(idle):
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = idlefx.compile(idle, backend=count)
    for batch in (2, 3, 5):
        x = torch.randn(batch, 3, 64, 48)
        assert torch.equal(compiled(x), idle(x))
        with pytest.raises(idlefx.InputError, match=OTHER_SHAPE):
            compiled(TURNED)
    assert len(graphs) == 1
    for whole, refusal in ((False, idlefx.InputError), (True, torch._dynamo.exc.Unsupported)):
        torch._dynamo.reset()
        with pytest.raises(refusal, match=r"has shape .2, 3, 48, 64., but the model was traced for .batch, 3, 64, 48."):
            torch.compile(idle, backend="eager", fullgraph=whole, dynamic=True)(TURNED)


@torch.no_grad()
@pytest.mark.parametrize("strict", [False, True])
def test_export_keeps_the_batch_free(idle, strict):
    free = {"x": {0: torch.export.Dim("batch", min=1, max=64)}}
    program = torch.export.export(idle, (torch.zeros(2, 3, 64, 48),), dynamic_shapes=free, strict=strict)
    x = torch.randn(5, 3, 64, 48)
    assert torch.equal(program.module()(x), idle(x))


@torch.no_grad()
def test_a_graph_of_plain_operations_can_be_traced_anew():
    idle, x = idlefx.convert(upright(), layers=[1], keep=1.0), torch.randn(3, 3, 64, 48)
    assert torch.equal(torch.fx.symbolic_trace(idle)(x), idle(x))
