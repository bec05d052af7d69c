"""The module that returns its token cut loss too: it is the idle model in all else, and no attention map is kept."""

import copy
import math
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import idlefx
from idlefx.graph.sizes import number
from idlefx.runtime import cut_loss
from idlefx.runtime.selections import selections
from tests.models.small import DROPOUTS, SMALL, Wrapper, build, image_tokens, images
from tests.oracles import masked
from tests.support.cases import Case, convert, same_selections
from tests.support.gradients import of_value

HALF, LAST = Case((1, 3), 0.5), Case((1,), 0.5)


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
        torch.manual_seed(1)
        chosen = selections(idle, x)
        torch.manual_seed(1)
        assert same_selections(selections(student, x), chosen)
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


@pytest.mark.slow
@pytest.mark.parametrize("family", ["vit", "qk_norm_gap"])
def test_compiled_is_eager_in_one_graph(family):
    model = build(family, depth=2)
    student = idlefx.with_cut_loss(convert(model, LAST)).train()
    x = images(model, 3)

    def step(run: Any) -> tuple[Tensor, dict[str, Tensor]]:
        output, loss = run(x)
        return loss, of_value(student, output.square().mean() + 20 * loss, retain_graph=False)

    expected_loss, expected = step(student)
    loss, actual = step(torch.compile(student, fullgraph=True))
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-6)
    total = torch.stack([g.norm() for g in expected.values()]).norm()
    for key, gradient in actual.items():
        assert (gradient - expected[key]).norm() <= 1e-4 * total, key
