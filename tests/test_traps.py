"""Models that are not what they look like: colliding sizes, tokens in odd places, attention that is none."""

import inspect as pyinspect
import re
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import idlefx
from idlefx.runtime import ops
from tests.models.generated import ViT, build, inputs, randomise
from tests.models.generated.config import Config
from tests.oracles import generated_reference
from tests.support.generated_check import check, convert, error_of

SOME = {0: 0.5, 2: 0.3}
SQUARE = Config(collision="all", prefix=0, head="mean", grid=(8, 8))


def thorough(value: Any) -> Any:
    """One more value of a parameter, which is tried in the slow tests only."""
    return pytest.param(value, marks=pytest.mark.slow)


def kept(config: Config, keep: dict[int, float]) -> dict[int, int]:
    return {block: int(ratio * config.image_tokens) for block, ratio in keep.items()}


def quietly(model: nn.Module, example: Any) -> Any:
    """A conversion during which a warning is an error, but for those of torch about itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return idlefx.convert(model, list(SOME), list(SOME.values()), schedule="blocks", example_inputs=example)


@pytest.mark.parametrize("tokens_first", [False, thorough(True)], ids=["batch_first", "tokens_first"])
@pytest.mark.parametrize("core", ["sdpa", "matmul", thorough("einsum_bnhd"), thorough("baddbmm"), "multihead"])
def test_tokens_head_width_and_width_are_all_64(core, tokens_first):
    config = replace(SQUARE, core=core, tokens_first=tokens_first, bias="distances")
    assert (config.tokens, config.head_width, config.width, config.hidden) == (64, 64, 64, 64)
    assert check(config.normalised(), SOME)


@pytest.mark.parametrize("collision", ["width", "head", "hidden"])
@pytest.mark.parametrize("mlp", ["plain", thorough("flattened"), thorough("raw")])
def test_tokens_are_as_many_as_features(mlp, collision):
    config = Config(collision=collision, mlp=mlp, prefix=2, projection="chunked", rotary="image_only").normalised()
    assert config.tokens == {"width": config.width, "head": config.head_width, "hidden": config.hidden}[collision]
    assert check(config, SOME)


@torch.no_grad()
def test_images_are_as_many_as_tokens_and_features():
    config = Config(collision="width", prefix=0, head="mean", core="bmm", tokens_first=True)
    model, x = build(config), inputs(config, 3)
    idle = quietly(model, inputs(config, config.tokens, seed=1))
    assert idle.plan.blocks[0].token_dim == 0 and idle.plan.blocks[0].batch_dim == 1
    expected = generated_reference.run(model, kept(config, SOME), x)
    assert error_of(idle(*x), expected.output) <= 1e-5


@pytest.mark.parametrize("prefix", [1, thorough(3)])
@pytest.mark.parametrize("rotary", ["none", "image_only"])
def test_class_token_stands_at_the_end(rotary, prefix):
    config = Config(prefix=prefix, place="end", rotary=rotary)
    assert config.prefix_positions[0] == config.class_position == config.image_tokens
    assert check(config, SOME)


def test_class_token_joins_at_the_last_block():
    config = Config(place="late", positions="image", prefix=2)
    table = idlefx.inspect(build(config), inputs(config, 2))
    assert [block.tokens for block in table] == [16, 16, 18]
    assert [block.class_token for block in table] == [None, None, 0]
    assert check(config, SOME)


@torch.no_grad()
def test_batch_is_read_by_len():
    config = Config(batch="len", core="matmul")
    model = build(config)
    idle = quietly(model, inputs(config, 2))
    for batch in (1, 5):
        x = inputs(config, batch, seed=batch)
        assert error_of(idle(*x), generated_reference.run(model, kept(config, SOME), x).output) <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("given", ["image", "label", "valid"])
def test_example_of_one_image_leaves_the_batch_free(given):
    config = Config(inputs=given)
    model = build(config)
    idle = quietly(model, inputs(config, 1))
    for batch in (1, 4):
        x = inputs(config, batch, seed=batch)
        assert error_of(idle(*x), generated_reference.run(model, kept(config, SOME), x).output) <= 1e-5


class Frozen(nn.Module):
    """Takes two images, no more and no less."""

    def __init__(self) -> None:
        super().__init__()
        self.vit = build(Config())

    def forward(self, image: Tensor) -> Tensor:
        return self.vit(image.view(2, 3, 16, 16))


def test_batch_that_cannot_stay_free_is_announced():
    with pytest.warns(UserWarning, match="batch"):
        idle = idlefx.convert(Frozen(), [1], 0.5, example_inputs=inputs(Config(), 2))
    assert idle(*inputs(Config(), 2)).shape[0] == 2
    assert re.search(r"batch", str(idlefx.report(idle)))


@pytest.mark.parametrize("form", ["two_cores", thorough("branches"), "nested"])
@pytest.mark.parametrize("head", ["class", thorough("mean")])
def test_block_holds_two_attention_cores(head, form):
    config = Config(block=form, head=head)
    table = idlefx.inspect(build(config), inputs(config, 2))
    assert [len(block.cores) for block in table] == [2] * config.depth
    assert check(config, SOME)


@pytest.mark.parametrize("head", ["pooling", "image_pooling"])
@pytest.mark.parametrize("prefix", [thorough(0), 1])
def test_pooling_head_is_no_block(prefix, head):
    config = Config(head=head, prefix=prefix)
    table = idlefx.inspect(build(config), inputs(config, 2))
    assert [block.path for block in table] == ["blocks.0", "blocks.1", "blocks.2"]
    assert check(config, SOME)


def test_shared_block_idles_in_one_layer_and_not_in_another():
    config = Config(shared=True)
    assert check(config, {1: 0.4})
    idle = convert(build(config), config, {1: 0.4})
    assert len(list(idle.parameters())) == len(list(build(config).parameters()))


class Norm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return torch.layer_norm(x, self.normalized_shape, weight=self.weight, bias=self.bias)


class Sampling(ViT):
    def leave(self, x: Tensor, features: list[Tensor]) -> Any:
        dim, cut = 0 if self.config.tokens_first else 1, torch.ops.aten.slice.Tensor
        return super().leave(x, features), cut(x, dim, 0, 9, 2), cut(x, dim, None, 2), cut(x, dim)


@torch.no_grad()
@pytest.mark.parametrize("tokens_first", [False, True], ids=["batch_first", "tokens_first"])
def test_norms_and_slices_leave_out_what_is_the_default(tokens_first):
    config = Config(tokens_first=tokens_first, prefix=3)
    model, x = Sampling(config), inputs(config, 3, seed=1)
    for block in model.blocks:
        block.norms[0] = Norm(config.width)
    randomise(model)
    idle = convert(model.eval(), config, SOME)
    expected = generated_reference.run(model, kept(config, SOME), x)
    assert sum(node.target is ops.norm_linear for node in idle.graph.nodes) == (0 if tokens_first else len(SOME))
    assert error_of(idle(*x), expected.output) <= 1e-5


def test_example_on_another_device_is_refused():
    config = Config()
    (image,) = inputs(config, 2)
    with pytest.raises(idlefx.IdleFxError, match=r"example input is on meta, the model on cpu"):
        idlefx.convert(build(config), [1], 0.5, example_inputs=image.to("meta"))


class Counting(ViT):
    """Makes a plain number of a tensor."""

    def embed(self, image: Tensor, other: Tensor | None) -> Any:
        brightest = image.abs().max().item()
        return super().embed(image / max(brightest, 1.0), other)


@torch.no_grad()
def test_number_read_from_the_images_stays_free():
    config = Config()
    model = Counting(config).eval()
    randomise(model)
    idle = quietly(model, inputs(config, 2))
    x = tuple(3 * image for image in inputs(config, 4, seed=1))
    assert error_of(idle(*x), generated_reference.run(model, kept(config, SOME), x).output) <= 1e-5


class Branching(ViT):
    """Looks at the image to decide what to compute."""

    def embed(self, image: Tensor, other: Tensor | None) -> Any:
        if image.mean() > 0:
            image = -image
        return super().embed(image, other)


class Looping(ViT):
    """Goes on until the data say stop."""

    def embed(self, image: Tensor, other: Tensor | None) -> Any:
        while image.abs().max() > 1:
            image = image / 2
        return super().embed(image, other)


def line_of(model: type[nn.Module], code: str) -> str:
    lines, first = pyinspect.getsourcelines(model)
    return f"test_traps.py:{first + next(at for at, line in enumerate(lines) if code in line)}"


@pytest.mark.parametrize(
    ("model", "code", "remedy"),
    [
        (Branching, "if image.mean()", r"torch\.where|torch\.cond"),
        (Looping, "while image.abs()", r"torch\.where|control flow"),
    ],
)
def test_model_that_cannot_be_traced_names_the_line(model, code, remedy):
    config = Config()
    with pytest.raises(idlefx.IdleFxError) as caught:
        idlefx.convert(model(config).eval(), [1], 0.5, example_inputs=inputs(config, 2))
    message = str(caught.value)
    assert line_of(model, code) in message, message
    assert re.search(remedy, message), message
