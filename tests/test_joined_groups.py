"""Groups that join: with `reselect=False` tokens stay with the worker that they follow, which may come to follow."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import idlefx
from idlefx.graph.notes import made_for
from idlefx.runtime import following
from idlefx.runtime.selections import groups, selections
from idlefx.zoo.reference import Tokens
from tests.models.generated import Config, inputs
from tests.models.generated import build as build_generated
from tests.models.small import DEPTH, MODELS, build, images
from tests.oracles import following_zoo
from tests.support.cases import relative_error
from tests.support.following_check import agrees, check_following, stages_of

PLAN = {"layers": [0, 1, 2], "keep": 0.7, "idle": "follow", "reselect": False}
PATHS = [f"blocks.{index}" for index in range(DEPTH)]
BASIC = ("vit",)


def converted(name: str, **options: Any) -> tuple[nn.Module, idlefx.IdleModule]:
    model = build(name)
    return model, idlefx.convert(model, example_inputs=images(model, 2, seed=99), **(PLAN | options))


@pytest.mark.parametrize("name", [n if n in BASIC else pytest.param(n, marks=pytest.mark.slow) for n in MODELS])
def test_converted_equals_the_reference(name):
    spec = MODELS[name]
    model, idle = converted(name)
    tokens = dict.fromkeys(PATHS, Tokens(tuple(range(spec.prefix)), spec.class_position))
    assert [stage.joins for stage in stages_of(idle)] == [False, True, True]

    def compare(seed: int) -> bool:
        x = images(model, 3, seed=seed)
        assert relative_error(idle(x), model(x)) > 1e-3
        return agrees(idle, (x,), following_zoo.run(model, PATHS, stages_of(idle), tokens, lambda: model(x)))

    assert any(map(compare, range(8))), "rounding decides who follows whom"


HARD = [
    Config(outputs="features"),  # what is read between two stages
    Config(rotary="image_only", bias="table", mask="float"),  # what is read where the worker stands
    pytest.param(Config(prefix=2, place="end", head="class"), marks=pytest.mark.slow),
    pytest.param(Config(prefix=2, place="split", tokens_first=True), marks=pytest.mark.slow),
    pytest.param(Config(core="matmul", talking="linear", block="branches"), marks=pytest.mark.slow),
]


@pytest.mark.parametrize("config", HARD, ids=lambda value: None)
def test_hard_combination(config):
    assert config.normalised() == config
    assert check_following(config, [0, 1, 2], 0.7, reselect=False)


def test_who_is_together_stays_together():
    model, idle = converted("vit")
    x = images(model, 4)
    told, working = groups(idle, x), selections(idle, x)
    for before, after in ((0, 1), (1, 2)):
        for image in range(4):
            assert set(working[after][image].tolist()) < set(working[before][image].tolist())
            for leader in told[before][image].unique():
                together = told[before][image] == leader
                assert len(told[after][image][together].unique()) == 1


def test_all_tokens_are_put_back_at_the_end_alone():
    _, idle = converted("vit")
    tokens = idle.plan.blocks[0].tokens
    restoring = [node for node in idle.graph.nodes if node.target is following.restore_tokens]
    assert [node.meta["val"].shape[1] == tokens for node in restoring] == [False, False, True]
    values = [node.meta["val"] for block in (1, 2) for node in made_for(idle.graph, block) if node not in restoring]
    shapes = [value.shape for value in values if isinstance(value, Tensor)]
    assert shapes and all(tokens not in shape for shape in shapes)


def test_keeping_all_is_the_model():
    model, idle = converted("vit", keep=1.0)
    x = images(model, 2)
    assert torch.equal(idle(x), model(x))


def test_equal_tokens_join_at_no_cost():
    """A key counts as often as all tokens that have come together in it would, so the passes change nothing."""
    config = Config(core="matmul", talking="linear", positions="none")
    model = build_generated(config)
    patches = torch.randn(2, 3, 3, 4, 4)[:, torch.arange(16) % 3]
    image = patches.unflatten(1, (4, 4)).permute(0, 3, 1, 4, 2, 5).reshape(2, 3, 16, 16)
    plan = PLAN | {"keep": [0.75, 0.6, 0.45], "example_inputs": inputs(config, 2)}
    idle = idlefx.convert(model, **plan)
    assert [stage.joins for stage in stages_of(idle)] == [False, True, True]
    assert torch.allclose(idle(image), model(image), atol=1e-5)
    for node in idle.graph.find_nodes(op="call_function", target=following.average_groups):
        node.args = (*node.args[:6], None)  # as if a mean counted once
    idle.recompile()
    assert not torch.allclose(idle(image), model(image), atol=1e-3)


def test_groups_of_which_as_many_are_kept_go_on():
    _, idle = converted("vit", keep=[0.5, 0.5, 0.25])
    assert [(step.opens, step.joins) for step in idle.plan][:3] == [(True, False), (False, False), (True, True)]
    assert "they are grouped anew at block 0, and groups join at block 2 (reselect=False)" in str(idle.plan)


def test_groups_cannot_part_again():
    with pytest.raises(idlefx.PlanError, match=r"groups only join, so block 1 .* lower its keep ratio") as refusal:
        converted("vit", layers=[0, 1], keep=[0.5, 0.75])
    assert "reselect=True" in str(refusal.value)


def test_blocks_apart_group_anew():
    _, idle = converted("vit", layers=[0, 2], schedule="blocks")
    assert [stage.joins for stage in stages_of(idle)] == [False, False]


def test_a_mean_counts_as_often_as_it_has_tokens():
    x = torch.tensor([[[4.0], [1.0], [7.0]]])
    index, order, leaders = torch.tensor([[0, 1]]), torch.tensor([[0, 1, 2]]), torch.tensor([[1]])
    means, sizes = following.average_groups(x, index, order, leaders, stand_for=torch.tensor([[2.0, 3.0, 1.0]]))
    assert means.tolist() == [[[4.0], [2.5]]] and sizes.tolist() == [[2.0, 4.0]]


def test_a_saved_model_keeps_which_groups_join(tmp_path):
    model, idle = converted("vit")
    x = images(model, 2)
    torch.save(idle, tmp_path / "idle.pt")
    again = torch.load(tmp_path / "idle.pt", weights_only=False)
    assert again.plan == idle.plan and torch.equal(again(x), idle(x))
