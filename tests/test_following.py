"""Idle tokens that follow: a converted model does what the definition says, however it is spelled, or says why not."""

from typing import Any

import pytest
import torch
from hypothesis import given, seed, settings
from hypothesis import strategies as st
from torch import nn

import idlefx
from idlefx.capture.export import capture
from idlefx.graph.notes import made_for
from idlefx.pipeline import spell
from idlefx.records import Step
from idlefx.runtime.selections import groups
from idlefx.zoo.reference import Tokens
from tests.models.generated import Config, inputs
from tests.models.generated import build as build_generated
from tests.models.generated.config import CHOICES, MOSTLY_THE_SIMPLEST
from tests.models.small import DEPTH, MODELS, build, images
from tests.oracles import following_zoo
from tests.support.cases import relative_error
from tests.support.following_check import agrees, check_following, stages_of

BASIC = ("vit", "gap", "hand_written")
PATHS = [f"blocks.{index}" for index in range(DEPTH)]


def converted(name: str, **options: Any) -> tuple[nn.Module, idlefx.IdleModule]:
    model = build(name)
    plan = {"layers": [0, 2], "keep": 0.6, "idle": "follow", "example_inputs": images(model, 2, seed=99)}
    return model, idlefx.convert(model, **(plan | options))


@pytest.mark.parametrize("name", [n if n in BASIC else pytest.param(n, marks=pytest.mark.slow) for n in MODELS])
def test_converted_equals_the_reference(name):
    spec = MODELS[name]
    model, idle = converted(name)
    tokens = dict.fromkeys(PATHS, Tokens(tuple(range(spec.prefix)), spec.class_position))
    assert [step.opens for step in idle.plan] == [True, False, True, False]

    def compare(seed: int) -> bool:
        x = images(model, 3, seed=seed)
        assert relative_error(idle(x), model(x)) > 1e-3
        return agrees(idle, (x,), following_zoo.run(model, PATHS, stages_of(idle), tokens, lambda: model(x)))

    assert any(map(compare, range(5))), "rounding decides who follows whom"


HARD = [
    (Config(outputs="features"), [0, 2]),  # what is read between two blocks
    (Config(outputs="skips", residual="in_place", block="attention_only"), [0]),  # what is joined with the stream
    (Config(core="matmul", talking="linear", scale="learned_per_head", mask="boolean", bias="table"), [0]),
    (Config(tokens_first=True, place="split", prefix=2, rotary="given", block="branches"), [1]),
    (Config(norm="written", inputs="modulated", positions="queries", projection="separate"), [0, 1]),
    (Config(block="mlp_first"), [0]),
    (Config(place="late", positions="image"), [0]),  # a stage that ends early
]


@pytest.mark.parametrize(("config", "layers"), HARD, ids=lambda value: None)
def test_hard_combination(config, layers):
    assert config.normalised() == config
    assert check_following(config, layers, 0.5)


def configs() -> st.SearchStrategy[Config]:
    """Configs whose parts fit together, and whose blocks can all idle.

    Nothing is injected: for the first block it is the stream itself, whose mean a graph then takes: a matter of taste.
    """
    options = {
        name: st.sampled_from(values[:1] * MOSTLY_THE_SIMPLEST.get(name, 0) + values)
        for name, values in CHOICES.items()
        if name not in ("unfit", "injected")
    }
    return st.builds(Config, **options).map(Config.normalised)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(2), ids="part{}".format)
def test_any_spelling_equals_its_reference(part):
    compared = []

    @given(st.data())
    @settings(max_examples=25)
    def converts(data: st.DataObject) -> None:
        config = data.draw(configs(), label="config")
        layers = data.draw(st.sets(st.sampled_from(range(config.depth)), min_size=1), label="layers")
        keep, reselect = data.draw(st.integers(17, 95), label="keep") / 100, data.draw(st.booleans(), label="reselect")
        compared.append(check_following(config, sorted(layers), keep, reselect))

    seed(part)(converts)()
    assert sum(compared) >= 0.8 * len(compared), "rounding decided too often"


def test_only_the_size_term_is_added_between_the_blocks_of_a_stage():
    _, idle = converted("vit", layers=[1], keep=0.5)
    dense = [node.target for node in idle.conversion.evaluation.source.nodes if "blocks.2" in str(node.meta)]
    assert len(dense) > 10
    worked = made_for(idle.graph, 2)
    assert all(node.op == "call_module" or node.target in dense for node in worked) and len(worked) <= len(dense)
    terms = [node for node in idle.graph.nodes if node.target is idlefx.runtime.following.size_term]
    assert len(terms) == 1 and len(terms[0].users) == 3


def test_a_stage_ends_where_prefix_tokens_join():
    config = Config(place="late", positions="none")
    idle = idlefx.convert(build_generated(config), [0], 0.5, idle="follow", example_inputs=inputs(config, 2))
    assert [(step.block, step.opens) for step in idle.plan] == [(0, True), (1, False), (2, True)]
    assert "they are grouped anew at blocks 0, 2" in str(idle.plan)


def test_with_exact_blocks_each_groups_anew():
    _, idle = converted("vit", layers=[1, 2], schedule="blocks")
    assert [len(stage) for stage in idle.plan.stages] == [1, 1]


def test_keeping_all_is_the_model():
    model, idle = converted("vit", keep=1.0)
    x = images(model, 2)
    assert torch.equal(idle(x), model(x))


def test_equal_tokens_follow_at_no_cost():
    """The logarithm of its size makes a key count as often as the tokens that it stands for would."""
    term = idlefx.runtime.following.size_term
    config = Config(core="matmul", talking="linear", positions="none")
    model = build_generated(config)
    patches = torch.randn(2, 3, 3, 4, 4)[:, torch.arange(16) % 3]
    image = patches.unflatten(1, (4, 4)).permute(0, 3, 1, 4, 2, 5).reshape(2, 3, 16, 16)
    idle = idlefx.convert(model, [0], 0.75, idle="follow", example_inputs=inputs(config, 2))
    assert torch.allclose(idle(image), model(image), atol=1e-5)
    for node in idle.graph.find_nodes(op="call_function", target=term):
        node.target = lambda *given: torch.zeros_like(term(*given))
    idle.recompile()
    assert not torch.allclose(idle(image), model(image), atol=1e-3)


def test_an_image_does_not_depend_on_its_neighbours():
    model, idle = converted("vit")
    x = images(model, 4)
    assert torch.allclose(idle(x)[1:2], idle(x[1:2]), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions(dtype):
    model, idle = converted("vit")
    x = images(model, 3)
    expected = idle(x)
    moved = idle.to(dtype)(x.to(dtype))
    assert moved.dtype == dtype
    assert relative_error(moved.to(expected.dtype), expected) <= (0.1 if dtype is torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("name", [n if n in BASIC else pytest.param(n, marks=pytest.mark.slow) for n in MODELS])
def test_rewritten_to_keep_all_tokens_is_the_original_bit_by_bit(name, monkeypatch):
    monkeypatch.setattr(Step, "idles", True)  # or a block that keeps all would be left as it is
    model, idle = converted(name, keep=1.0)
    x = images(model, 3)
    assert [len(stage) for stage in idle.plan.stages] == [2, 2] and len(groups(idle, x)) == DEPTH
    # Attention written by hand is spelled as the fused kernel before anything else, and that rounds on its own.
    wanted = model if MODELS[name].fused else spell(capture(model).eval_graph)
    assert torch.equal(idle(x), wanted(x))


def test_gradients_reach_all_tokens_and_parameters():
    model, idle = converted("vit")
    x = images(model, 2).requires_grad_()
    idle(x).square().sum().backward()
    patches = x.grad.unfold(2, 8, 8).unfold(3, 8, 8).abs().sum((1, 4, 5))
    assert (patches > 0).all()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in idle.parameters())


def test_there_is_no_cut_loss_of_tokens_that_follow():
    with pytest.raises(idlefx.InputError, match="those of this model follow"):
        idlefx.with_cut_loss(converted("vit")[1])


def test_report_says_what_idle_tokens_do_and_what_that_asks_for():
    _, idle = converted("vit")
    assert str(idlefx.report(idle)).endswith("they are grouped anew at blocks 0, 2")
    _, resting = converted("vit", idle="rest")
    assert "rest, which wants fine-tuning" in str(idlefx.report(resting)).splitlines()[-1]
    with torch.no_grad():
        next(resting.parameters()).mul_(1.01)
    assert "fine-tuning" not in str(idlefx.report(resting))
