"""The token cut loss and its gradients: training gathered is training with masks."""

from typing import Any
from unittest.mock import patch

import pytest
import torch
from timm.models.vision_transformer import ResPostBlock
from torch import Tensor, nn

import idlefx
from idlefx.runtime import cut_loss
from idlefx.runtime.selections import selections
from tests.models import generated
from tests.models.generated.config import Config
from tests.models.small import DEPTH, MODELS, Spec, build, images
from tests.oracles import masked, masked_generated
from tests.support.cases import Case, convert, same_selections
from tests.support.gradients import of_value

HALF, LAST = Case((1, 3), 0.5), Case((1,), 0.5)
EXTRA = {
    "rotary": Spec("vit_small_patch16_dinov3", 5, None),
    "rotary_class": Spec("vit_pe_core_tiny_patch16_384", 1, 0),
    "bias": Spec("beit_base_patch16_224", 1, 0),
    "post_norm": Spec("vit_tiny_patch16_224", 1, 0, {"block_fn": ResPostBlock}),
}
TIMM = [
    "vit", "registers", "registers_gap", "gap", "qk_norm", "parallel_things", "parallel_scaling", "hand_written",
    "collision", *EXTRA,
]  # fmt: skip
SPELLINGS = [
    Config(core="matmul", scale="learned_per_head", talking="linear", bias="table"),
    Config(core="permute", scale="learned", mask="diagonal_added", prefix=0, head="mean"),
    Config(core="einsum", scale="both", talking="einsum", projection="interleaved"),
    Config(core="bmm", scale="divided", projection="separate", tokens_first=True, place="class_last", prefix=2),
    Config(core="sdpa", scale="after", groups="native", projection="separate", qk_norm="cosine"),
    Config(core="einsum_bnhd", rotary="complex", place="split", prefix=3, inputs="valid"),
    Config(core="multihead", block="post", positions="queries", tokens_first=True, bias="distances"),
    Config(block="two_cores", projection="raw_heads", scale="after", inputs="modulated"),
    Config(block="branches", place="late", positions="image", rotary="none"),
]


@pytest.fixture(scope="module", autouse=True)
def more_models() -> Any:
    """Families that only this file looks at."""
    with patch.dict(MODELS, EXTRA):
        yield


def double(name: str, **overrides: Any) -> tuple[nn.Module, Any]:
    """A model in double precision and what becomes of it; blocks 1 and 2 keep half of their tokens, 3 a quarter."""
    model = build(name, **overrides).double()
    return model, convert(model, HALF, example_inputs=images(model, 2, seed=99).double())


def reference_of(model: nn.Module, name: str, idle: Any, x: Tensor) -> masked.Result:
    spec, plan = MODELS[name], {step.block: step.kept for step in idle.plan if step.idles}
    return masked.run(model, plan, x, prefix=spec.prefix, class_position=spec.class_position)


def check_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    total = torch.stack([g.norm() for g in expected.values()]).norm()
    assert total > 1e-6
    for key, gradient in actual.items():
        assert (gradient - expected[key]).norm() <= 1e-11 * total, key


def check(student: Any, x: tuple[Tensor, ...], model: nn.Module, expected: masked.Result) -> None:
    """Output, loss, choice and the gradients of task and loss, against the reference in double precision."""
    output, loss = student(*x)
    assert same_selections(selections(student, *x), expected.selected)
    torch.testing.assert_close(output, expected.output, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(loss, expected.cut_loss, rtol=1e-12, atol=0)
    check_gradients(of_value(student, loss), of_value(model, expected.cut_loss))
    task, wanted = (out.square().mean() for out in (output, expected.output))
    check_gradients(of_value(student, task), of_value(model, wanted))


@pytest.mark.parametrize("family", TIMM)
def test_training_gathered_is_training_with_masks(family):
    model, idle = double(family)
    student = idlefx.with_cut_loss(idle)
    for batch in (1, 3):
        x = images(model, batch, seed=batch).double()
        check(student, (x,), model, reference_of(model, family, idle, x))


@pytest.mark.parametrize("config", SPELLINGS, ids=repr)
def test_every_spelling_of_attention_has_the_same_loss(config):
    config = config.normalised()
    example, x = (
        tuple(t.double() if t.is_floating_point() else t for t in generated.inputs(config, batch, seed=batch))
        for batch in (2, 3)
    )
    model = generated.build(config).double()
    idle = idlefx.convert(model, [0, 2], [0.6, 0.4], schedule="blocks", example_inputs=example)
    plan = {step.block: step.kept for step in idle.plan}
    check(idlefx.with_cut_loss(idle), x, model, masked_generated.run(model, plan, x))


RIGHT = cut_loss.token_cut
WRONG = {
    "scale": lambda q, k, index, prefix: RIGHT(1.1 * q, k, index, prefix),
    "prefix": lambda q, k, index, prefix: RIGHT(q, k, index, ()),
    "weight": lambda q, k, index, prefix: 1.001 * RIGHT(q, k, index, prefix),
    "gradient of the queries": lambda q, k, index, prefix: RIGHT(q.detach(), k, index, prefix),
    "columns for rows": lambda q, k, index, prefix: RIGHT(k, q, index, prefix),
    "choice": lambda q, k, index, prefix: RIGHT(q, k, index.roll(1, 0), prefix),
}


@pytest.fixture(scope="module")
def plain() -> tuple[nn.Module, Any, Tensor, masked.Result]:
    """A plain model, what becomes of it, images, and what the reference says."""
    model, idle = double("vit")
    x = images(model, 3).double()
    expected = reference_of(model, "vit", idle, x)
    check(idlefx.with_cut_loss(idle), (x,), model, expected)
    return model, idle, x, expected


@pytest.mark.parametrize("mistake", WRONG)
def test_a_wrong_formula_is_noticed(mistake, plain):
    model, idle, x, expected = plain
    with patch.object(cut_loss, "token_cut", WRONG[mistake]):
        student = idlefx.with_cut_loss(idle)
    with pytest.raises(AssertionError):
        check(student, (x,), model, expected)


def test_a_wrong_gather_is_noticed(plain):
    model, _, x, expected = plain
    other = convert(model, HALF._replace(keep=0.4), example_inputs=x)
    with pytest.raises(AssertionError):
        check(idlefx.with_cut_loss(other), (x,), model, expected)


def test_every_idling_block_counts_alike(plain):
    _, idle, x, _ = plain
    alone = []

    def noted(*arguments: Any) -> Tensor:
        found = RIGHT(*arguments)
        alone.append(found)
        return found

    with patch.object(cut_loss, "token_cut", noted):
        student = idlefx.with_cut_loss(idle)
        alone.clear()
        _, loss = student(x)
    assert len(alone) == DEPTH - 1
    torch.testing.assert_close(loss, torch.stack(alone).mean())
