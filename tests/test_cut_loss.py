"""The token cut loss: what it is, that training with it is training with masks, and what it costs in memory."""

import copy
import math
from typing import Any
from unittest.mock import patch

import generated
import generated_reference
import masked
import pytest
import torch
from cases import Case, convert, same_selections
from generated_config import Config
from models import DEPTH, MODELS, SMALL, Spec, build, image_tokens, images
from test_convert import DROPOUTS, Wrapper
from timm.models.vision_transformer import ResPostBlock
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import idlefx
from idlefx.graph.sizes import number
from idlefx.runtime import cut_loss
from idlefx.runtime.module import selections
from idlefx.training import losses

HALF, LAST = Case((1, 3), 0.5), Case((1,), 0.5)
EXTRA = {
    "rotary": Spec("vit_small_patch16_dinov3", 5, None),
    "rotary_class": Spec("vit_pe_core_tiny_patch16_384", 1, 0),
    "bias": Spec("beit_base_patch16_224", 1, None),
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


def gradients(module: nn.Module, value: Tensor) -> dict[str, Tensor]:
    """By name, zeros where there is none."""
    named = dict(module.named_parameters(remove_duplicate=False))
    options = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    found = torch.autograd.grad(value, list(named.values()), **options)
    return dict(zip(named, found, strict=True))


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
    check_gradients(gradients(student, loss), gradients(model, expected.cut_loss))
    task, wanted = (out.square().mean() for out in (output, expected.output))
    check_gradients(gradients(student, task), gradients(model, wanted))


@pytest.mark.parametrize("family", TIMM)
def test_training_gathered_is_training_with_masks(family):
    model, idle = double(family)
    student = idlefx.with_cut_loss(idle)
    for batch in (1, 3):
        x = images(model, batch, seed=batch).double()
        check(student, (x,), model, reference_of(model, family, idle, x))


def run_generated(model: generated.ViT, plan: dict[int, int], given: tuple[Tensor, ...]) -> masked.Result:
    """The same of a generated model, from the masked reference that its conversion is compared with."""
    config, found, selected = model.config, [], {}

    def through(index: int, x: Tensor, context: tuple[Tensor | None, ...]) -> Tensor:
        block, prefix, first = model.blocks[index], config.prefix_at(index), config.tokens_first
        if index not in plan:
            return block(x, *context)
        everyone = torch.ones(x.shape[:2][::-1] if first else x.shape[:2], dtype=torch.bool)
        _, q, k = generated_reference.run_block(block, x, context, everyone)
        scores = generated_reference.attention_scores(q, k, prefix, config.class_at(index))
        works, _ = generated_reference.choose(scores.detach(), plan[index], prefix)
        selected[index] = works.nonzero()[:, 1].view(len(works), -1)
        learned = config.scale.startswith("learned")
        scales = [a.temperature.exp() if learned else torch.tensor(a.scale, dtype=q.dtype) for a in block.attentions]
        scale = torch.cat([s.expand(config.heads, 1, 1) for s in scales])
        found.append(masked.token_cut_loss(scale * (q @ k.transpose(-2, -1)), works, prefix))
        worked, *_ = generated_reference.run_block(block, x, context, works)
        return torch.where((works.t() if first else works)[..., None], worked, x)

    with patch.object(model, "through", through):
        output = model(*given)
    return masked.Result(output, torch.stack(found).mean(), selected)


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
    check(idlefx.with_cut_loss(idle), x, model, run_generated(model, plan, x))


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


def test_loss_by_hand():
    # All weights are 1/5; tokens 0 (prefix), 1 and 3 work: S = 3/5, c = 1/5.
    flat, index = torch.zeros(1, 5, 7, dtype=torch.float64), torch.tensor([[0, 1, 3]])
    working, idle = 2 * (1 - 3 / 5) ** 2, (3 / 5 - 1 / 5) ** 2
    assert cut_loss.token_cut(flat, flat, index, (0,)).item() == pytest.approx((3 * working + 2 * idle) / 5)
    assert cut_loss.token_cut(flat, flat, index, ()).item() == pytest.approx((3 * working + 2 * (3 / 5) ** 2) / 5)
    # The last token is the prefix, and the only one that anybody looks at: nothing crosses.
    keys = torch.tensor([0.0, 0.0, 0.0, 0.0, 99.0]).view(1, 5, 1)
    assert cut_loss.token_cut(torch.ones(1, 5, 1), keys, torch.tensor([[0, 1, 4]]), (4,)).item() == 0
    assert cut_loss.token_cut(torch.ones(1, 5, 1), keys, torch.tensor([[0, 1, 4]]), (0,)).item() == pytest.approx(2 / 5)


def test_half_precision_keeps_a_small_loss():
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 20, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    index = torch.arange(11).expand(2, -1)
    q[:, :11], k[:, :11], k[:, 11:] = 1.0, 1.0, -1.0  # working tokens hardly look at idle ones
    q[:, 11:] = -1.0
    exact = cut_loss.token_cut(q, k, index, (0,))
    assert exact < 1e-9
    with torch.autocast("cpu", torch.bfloat16):
        rough = cut_loss.token_cut(q.float(), k.float(), index, (0,))
    assert rough.dtype == torch.float32
    assert rough.item() == pytest.approx(exact.item(), rel=0.05)
    assert cut_loss.token_cut(q.bfloat16(), k.bfloat16(), index, (0,)).item() == pytest.approx(exact.item(), rel=0.05)


def test_distillation_by_hand():
    student = torch.tensor([[0.0, 0.0], [0.0, 1.0]], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([[0.0, 2.0], [0.0, 1.0]], dtype=torch.float64, requires_grad=True)
    p = teacher[0].softmax(0)
    expected = (p * (p / 0.5).log()).sum() / 2
    found = losses.distillation(student, teacher)
    assert found.item() == pytest.approx(expected.item())
    assert losses.distillation(teacher, student).item() != pytest.approx(expected.item())
    found.backward()
    assert student.grad is not None and teacher.grad is None


def test_feature_distance_by_hand():
    student = torch.tensor([[3.0, 4.0]], requires_grad=True)
    teacher = torch.tensor([[0.0, 7.0]], requires_grad=True)
    found = losses.feature_distance(student, teacher)
    assert found.item() == pytest.approx((0.6**2 + 0.2**2) / 2)
    assert losses.feature_distance(5 * student, teacher).item() == pytest.approx(found.item())
    found.backward()
    assert student.grad is not None and teacher.grad is None


class Largest(TorchDispatchMode):
    """The most entries that any tensor made inside it has, in the backward pass too."""

    def __init__(self) -> None:
        super().__init__()
        self.entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.entries = max([self.entries, *(t.numel() for t in tree_leaves(result) if isinstance(t, Tensor))])
        return result


def check_no_map_for_each_head(student: Any, x: Tensor, heads: int, tokens: int) -> None:
    """Neither the graph nor a run of it holds as much as an attention map for each head."""
    a_map_each = heads * tokens**2
    for graph in (student.conversion.evaluation.graph, student.conversion.training.graph):
        for node in graph.nodes:
            for value in tree_leaves(node.meta.get("val")):
                if isinstance(value, Tensor):
                    assert math.prod(number(size, 1) for size in value.shape) < a_map_each, node.name
    with Largest() as largest:
        output, loss = student(x[:1])
        (output.square().mean() + loss).backward()
    assert largest.entries < a_map_each


@pytest.mark.parametrize("family", ["vit", "qk_norm", "hand_written"])
def test_nothing_as_large_as_a_map_for_each_head(family):
    wide = {"img_size": 96, "num_heads": 12}
    model = build(family, **wide)
    tokens = image_tokens(model) + 1
    assert 12 * tokens**2 > 5 * tokens * 4 * SMALL["embed_dim"], "maps are far larger than features here"
    idle = convert(model, HALF)
    check_no_map_for_each_head(idlefx.with_cut_loss(idle), images(model, 2), 12, tokens)

    def by_maps(q: Tensor, k: Tensor, index: Tensor, prefix: tuple[int, ...]) -> Tensor:
        heads = q.unflatten(2, (12, -1)).transpose(1, 2) @ k.unflatten(2, (12, -1)).permute(0, 2, 3, 1)
        works = torch.zeros(q.shape[:2], dtype=torch.bool).scatter(1, index, True)
        return masked.token_cut_loss(12 * heads, works, prefix)

    with patch.object(cut_loss, "token_cut", by_maps):
        student = idlefx.with_cut_loss(idle)
    with pytest.raises(AssertionError):
        check_no_map_for_each_head(student, images(model, 2), 12, tokens)


def test_what_trains_it_trains_the_idle_model():
    model = build("registers", depth=2)
    idle = convert(model, LAST)
    student = idlefx.with_cut_loss(idle)
    names = [name for name, _ in idle.named_parameters()]
    assert [name for name, _ in student.named_parameters()] == names
    assert all(a is b for a, b in zip(student.parameters(), idle.parameters(), strict=True))
    assert student.state_dict().keys() == idle.state_dict().keys() == model.state_dict().keys()
    x = images(model, 3)
    before, alone = idle(x), dict(idle.named_parameters())
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    output, loss = student(x)
    assert torch.equal(output, before)
    loss.backward()
    read = {name for name, parameter in alone.items() if parameter.grad is not None}
    assert {"blocks.0.mlp.fc2.weight", "blocks.1.attn.qkv.weight"} <= read and "head.weight" not in read
    optimizer.step()
    assert not torch.equal(idle(x), before)
    assert torch.equal(idle(x), student(x)[0])


def test_training_lowers_the_loss():
    model = build("gap")
    student = idlefx.with_cut_loss(convert(model, HALF))
    x = images(model, 8)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    first = student(x)[1].item()
    for _ in range(10):
        optimizer.zero_grad()
        student(x)[1].backward()
        optimizer.step()
    assert student(x)[1].item() < 0.9 * first


def test_module_stays_an_idle_module():
    model = build("vit", depth=2, **DROPOUTS)
    idle = convert(model.train(), LAST)
    student = idlefx.with_cut_loss(idle)
    assert isinstance(student, idlefx.IdleModule) and student.training
    assert student.plan == idle.plan and str(student.plan.blocks) == str(idle.plan.blocks)
    x = images(model, 4)
    for mode in (True, False):
        idle.train(mode), student.train(mode)
        torch.manual_seed(1)
        expected = idle(x)
        torch.manual_seed(1)
        output, loss = student(x)
        assert torch.equal(output, expected)
        assert loss.ndim == 0 and loss > 0
        assert same_selections(selections(student, x), selections(idle, x)) or mode
    assert not idlefx.with_cut_loss(idle).training
    again = idlefx.with_cut_loss(student)
    assert torch.equal(again(x)[0], output) and torch.equal(again(x)[1], loss)


def test_inputs_and_outputs_keep_their_structure():
    model = Wrapper(build("vit")).eval()
    x, gain = images(model.net, 3), torch.full((3, 1, 1, 1), 1.5)
    idle = convert(model, HALF, example_inputs={"picture": images(model.net, 2), "gain": torch.ones(2, 1, 1, 1)})
    output, loss = idlefx.with_cut_loss(idle)(gain=gain, picture=x)
    expected = idle(picture=x, gain=gain)
    assert list(output) == ["logits", "pair"] and isinstance(output["pair"], tuple)
    assert torch.equal(output["logits"], expected["logits"]) and torch.equal(output["pair"][1], gain)
    assert loss.ndim == 0


def test_where_nothing_idles_nothing_is_lost():
    model = build("vit")
    student = idlefx.with_cut_loss(convert(model, Case((1,), 1.0)))
    x = images(model, 3)
    output, loss = student(x)
    assert torch.equal(output, model(x))
    assert loss.shape == () and loss.item() == 0
    (output.square().mean() + 20 * loss).backward()


def test_copies_are_whole_and_independent():
    model = build("vit", depth=2, **DROPOUTS)
    model.register_parameter("unread", nn.Parameter(torch.ones(3)))
    idle = convert(model, LAST)
    student = idlefx.with_cut_loss(idle)
    x = images(model, 3)
    expected = student(x)
    for twin in (copy.deepcopy(student), idlefx.with_cut_loss(copy.deepcopy(idle))):
        assert all(torch.equal(a, b) for a, b in zip(twin(x), expected, strict=True))
        assert not set(twin.parameters()) & set(student.parameters())
        assert twin.state_dict().keys() == student.state_dict().keys()
        twin.train()(x)[1].backward()
        torch.optim.SGD(twin.parameters(), lr=0.1).step()
        assert all(torch.equal(a, b) for a, b in zip(student(x), expected, strict=True))
        assert not torch.equal(twin.eval()(x)[0], expected[0])


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


@pytest.mark.slow
@pytest.mark.parametrize("family", ["vit", "qk_norm_gap"])
def test_compiled_is_eager_in_one_graph(family):
    model = build(family, depth=2)
    student = idlefx.with_cut_loss(convert(model, LAST)).train()
    x = images(model, 3)

    def step(run: Any) -> tuple[Tensor, dict[str, Tensor]]:
        output, loss = run(x)
        return loss, gradients(student, output.square().mean() + 20 * loss)

    expected_loss, expected = step(student)
    loss, actual = step(torch.compile(student, fullgraph=True))
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-6)
    total = torch.stack([g.norm() for g in expected.values()]).norm()
    for key, gradient in actual.items():
        assert (gradient - expected[key]).norm() <= 1e-4 * total, key
