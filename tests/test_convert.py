"""What a converted model computes."""

import pytest
import torch
from torch import fx

import idlefx
from idlefx.capture.export import capture
from idlefx.pipeline import spell
from idlefx.records import Step
from idlefx.runtime.selections import selections
from tests.models.small import DEPTH, build_mixing, image_tokens, images
from tests.support.cases import (
    Case,
    convert,
    converted,
    deit_s,
    random_case,
    relative_error,
    same_selections,
    wanted,
)
from tests.support.gradients import of_squares

HALF = Case((1, 3), 0.5)


class Recorder(fx.Interpreter):
    """Runs a graph and remembers the value of every node by name."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.values: dict[str, torch.Tensor] = {}

    def run_node(self, n: fx.Node) -> object:
        self.values[n.name] = super().run_node(n)
        return self.values[n.name]


@torch.no_grad()
def test_keeping_all_is_bit_identical(model):
    idle = idlefx.convert(model, layers=[1], keep=1.0)
    for batch in (1, 3):
        x = images(model, batch)
        assert torch.equal(idle(x), model(x))
    assert not [node.name for node in idle.graph.nodes if node.name.startswith("idle_")]


@torch.no_grad()
def test_choosing_all_tokens_is_bit_identical_too(model, spec, monkeypatch):
    monkeypatch.setattr(Step, "idles", True)  # or a block that keeps all would be left as it is
    idle = idlefx.convert(model, layers=range(DEPTH), keep=1.0)
    names = {node.name for node in idle.graph.nodes}
    assert {f"idle_{block}_{part}" for block in range(DEPTH) for part in ("index", "gather", "scatter")} <= names
    # Attention written by hand is spelled as the fused kernel before anything else, and that rounds on its own.
    wanted = model if spec.fused else spell(capture(model).eval_graph)
    for batch in (1, 3):
        x = images(model, batch)
        assert torch.equal(idle(x), wanted(x))
        assert relative_error(idle(x), model(x)) <= 1e-6


@torch.no_grad()
@pytest.mark.parametrize("schedule", ["stages", pytest.param("blocks", marks=pytest.mark.slow)])
def test_converted_equals_reference(name, model, schedule):
    case = random_case(name, schedule)
    idle = converted(name, case)
    for batch in (1, 3, 5):
        x = images(model, batch, seed=batch)
        expected = wanted(model, name, case, x)
        assert same_selections(selections(idle, x), expected.selected)
        assert relative_error(idle(x), expected.output) <= 1e-5


def test_gradients_equal_those_of_reference(name, model):
    case = random_case(name, "stages")
    idle = converted(name, case)
    x = images(model, 3)
    dense = of_squares(model, model(x))
    expected = of_squares(model, wanted(model, name, case, x).output)
    actual = of_squares(idle, idle(x))
    assert actual.keys() == dense.keys()
    for key, gradient in dense.items():
        assert (actual[key] is None) == (gradient is None), key
    for key, gradient in expected.items():
        if gradient is not None and gradient.norm() > 1e-6:
            assert relative_error(actual[key], gradient) < 1e-3, key


@torch.no_grad()
def test_idle_tokens_are_bit_identical_and_the_others_work(name, model, spec):
    case = random_case(name, "stages")
    idle = converted(name, case)
    x = images(model, 3)
    recorder = Recorder(idle)
    recorder.run(x)
    chosen = selections(idle, x)
    shape = (3, image_tokens(model) + spec.prefix, model.embed_dim)
    pairs = [(block, block + 1) for block in chosen if block + 1 in chosen]
    assert pairs
    for block, following in pairs:
        before = recorder.values[f"idle_{block}_scatter"].reshape(shape)
        after = recorder.values[f"idle_{following}_scatter"].reshape(shape)
        works = torch.zeros(shape[:2], dtype=torch.bool).scatter(1, chosen[following], True)
        assert torch.equal(before[~works], after[~works])
        assert (before[works] != after[works]).any(-1).all()
        assert works[:, : spec.prefix].all()


@torch.no_grad()
@pytest.mark.parametrize("schedule", ["stages", pytest.param("blocks", marks=pytest.mark.slow)])
def test_selections_are_ascending_and_hold_the_prefix(name, model, spec, schedule):
    case = random_case(name, schedule)
    idle = converted(name, case)
    chosen = selections(idle, images(model, 4))
    kept = {step.block: step.kept for step in idle.plan}
    assert {block: s.shape for block, s in chosen.items()} == {b: (4, spec.prefix + k) for b, k in kept.items()}
    for positions in chosen.values():
        assert positions.dtype == torch.int64
        assert (positions.diff(dim=1) > 0).all()
        assert torch.equal(positions[:, : spec.prefix], torch.arange(spec.prefix).expand(4, -1))
        assert positions.max() < spec.prefix + image_tokens(model)


@torch.no_grad()
def test_result_of_an_image_does_not_depend_on_its_neighbours(name, model):
    idle = converted(name, random_case(name, "stages"))
    x, others = images(model, 4, seed=1), images(model, 3, seed=2)
    image, broken = x[2:3], torch.full_like(x[:1], torch.nan)
    together = {block: positions[2:3] for block, positions in selections(idle, x).items()}
    for batch in (image, torch.cat([others, image]), torch.cat([broken, image])):
        assert same_selections({block: s[-1:] for block, s in selections(idle, batch).items()}, together)
        assert relative_error(idle(batch)[-1:], idle(x)[2:3]) < 1e-5


@torch.no_grad()
def test_deit_s_keeps_137_96_67_of_196():
    model, idle = deit_s()
    kept = dict.fromkeys((3, 4, 5), 137) | dict.fromkeys((6, 7, 8), 96) | dict.fromkeys((9, 10, 11), 67)
    assert {step.block: step.kept for step in idle.plan} == kept
    assert {step.tokens for step in idle.plan} == {196}
    x = images(model, 1)
    expected = wanted(model, "deit", Case((3, 6, 9), 0.7), x)
    chosen = selections(idle, x)
    assert {block: s.shape for block, s in chosen.items()} == {b: (1, 1 + k) for b, k in kept.items()}
    assert same_selections(chosen, expected.selected)
    assert relative_error(idle(x), expected.output) <= 1e-5


def test_graph_of_deit_s_shows_scores_index_gather_and_scatter():
    names = {node.name for node in deit_s()[1].graph.nodes}
    for block in range(12):
        parts = {f"idle_{block}_{part}" for part in ("scores", "index", "gather", "scatter")}
        if block < 3:
            assert not parts & names
        else:
            assert parts <= names


@pytest.mark.slow
@torch.no_grad()
def test_one_token_may_do_all_the_work(name, model):
    case = Case((0, 1, 2, 3), 0.001, "blocks")
    idle = converted(name, case)
    x = images(model, 2)
    expected = wanted(model, name, case, x)
    assert {step.kept for step in idle.plan} == {1}
    assert same_selections(selections(idle, x), expected.selected)
    assert relative_error(idle(x), expected.output) <= 1e-5


@torch.no_grad()
def test_neighbours_of_a_block_that_cannot_idle_still_can():
    model, case = build_mixing(), Case((0, 2), 0.5, "blocks")
    idle = convert(model, case)
    x = images(model, 3)
    assert relative_error(idle(x), wanted(model, "vit", case, x).output) <= 1e-5
