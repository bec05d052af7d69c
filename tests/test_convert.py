"""What a converted model computes, and what it shares with the one it came from."""

import copy
from functools import cache

import pytest
import timm
import torch
from cases import SCHEDULES, Case, convert, converted, random_case, relative_error, same_selections, wanted
from models import MODELS, build, build_mixing, fingerprint, image_tokens, images
from timm.utils import ModelEmaV3
from torch import fx, nn

import idlefx
from idlefx.runtime.module import selections

HALF = Case((1, 3), 0.5)
DROPOUTS = {
    "proj_drop_rate": 0.2,
    "attn_drop_rate": 0.2,
    "drop_path_rate": 0.3,
    "drop_rate": 0.1,
    "pos_drop_rate": 0.1,
}


class Recorder(fx.Interpreter):
    """Runs a graph and remembers the value of every node by name."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.values: dict[str, torch.Tensor] = {}

    def run_node(self, n: fx.Node) -> object:
        self.values[n.name] = super().run_node(n)
        return self.values[n.name]


class Wrapper(nn.Module):
    """A model inside a model, with inputs and outputs of its own."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, picture: torch.Tensor, gain: torch.Tensor) -> dict[str, object]:
        logits = self.net(picture * gain)
        return {"logits": logits, "pair": (logits.argmax(-1), gain)}


@cache
def deit_s() -> tuple[nn.Module, fx.GraphModule]:
    torch.manual_seed(0)
    model = timm.create_model("deit_small_patch16_224").eval()
    return model, idlefx.convert(model, layers=[3, 6, 9], keep=0.7)


def gradients(module: nn.Module, output: torch.Tensor) -> dict[str, torch.Tensor | None]:
    names, parameters = zip(*module.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(output.square().mean(), parameters, allow_unused=True), strict=True))


@torch.no_grad()
def test_keeping_all_is_bit_identical(model):
    idle = idlefx.convert(model, layers=[1], keep=1.0)
    for batch in (1, 3):
        x = images(model, batch)
        assert torch.equal(idle(x), model(x))
    assert not [node.name for node in idle.graph.nodes if node.name.startswith("idle_")]


@torch.no_grad()
@pytest.mark.parametrize("schedule", SCHEDULES)
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
    dense = gradients(model, model(x))
    expected = gradients(model, wanted(model, name, case, x).output)
    actual = gradients(idle, idle(x))
    assert actual.keys() == dense.keys()
    for key, gradient in dense.items():
        assert (actual[key] is None) == (gradient is None), key
    for key, gradient in expected.items():
        if gradient is not None and gradient.norm() > 1e-6:
            assert relative_error(actual[key], gradient) < 1e-3, key


def test_conversion_without_gradients_still_trains():
    model = build("vit")
    with torch.no_grad():
        idle = idlefx.convert(model, layers=[1, 3], keep=0.5)
    missing = [key for key, gradient in gradients(idle, idle(images(model, 2))).items() if gradient is None]
    assert not missing


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
@pytest.mark.parametrize("schedule", SCHEDULES)
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
def test_checkpoints_load_both_ways(name, model):
    case = random_case(name, "stages")
    idle, other = copy.deepcopy(converted(name, case)), build(name, seed=1)
    assert idle.state_dict().keys() == model.state_dict().keys()
    assert [n for n, _ in idle.named_buffers()] == [n for n, _ in model.named_buffers()]
    idle.load_state_dict(other.state_dict(), strict=True)
    model.load_state_dict(idle.state_dict(), strict=True)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    x = images(model, 2, seed=3)
    expected = wanted(other, name, case, x)
    assert same_selections(selections(idle, x), expected.selected)
    assert relative_error(idle(x), expected.output) <= 1e-5


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


def test_graph_shows_scores_index_gather_and_scatter():
    names = {node.name for node in deit_s()[1].graph.nodes}
    for block in range(12):
        parts = {f"idle_{block}_{part}" for part in ("scores", "index", "gather", "scatter")}
        if block < 3:
            assert not parts & names
        else:
            assert parts <= names


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


@torch.no_grad()
def test_example_of_one_image_leaves_the_batch_free():
    model = build("vit")
    idle = convert(model, HALF, example_inputs=images(model, 1))
    x = images(model, 3)
    assert relative_error(idle(x), wanted(model, "vit", HALF, x).output) <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("form", ["tensor", "tuple", "dict"])
def test_inputs_go_by_position_or_by_name(form):
    model = build("vit")
    example = images(model, 2)
    given = {"tensor": example, "tuple": (example,), "dict": {"x": example}}[form]
    idle = convert(model, HALF, example_inputs=given)
    x = images(model, 3, seed=4)
    expected = wanted(model, "vit", HALF, x).output
    assert relative_error(idle(x), expected) <= 1e-5
    assert torch.equal(idle(x=x), idle(x))


@torch.no_grad()
def test_inputs_and_outputs_keep_their_structure():
    model = Wrapper(build("vit")).eval()
    x, gain = images(model.net, 3), torch.full((3, 1, 1, 1), 1.5)
    example = {"picture": images(model.net, 2), "gain": torch.ones(2, 1, 1, 1)}
    idle = convert(model, HALF, example_inputs=example)
    out = idle(picture=x, gain=gain)
    expected = wanted(model.net, "vit", HALF, x * gain).output
    assert list(out) == ["logits", "pair"] and isinstance(out["pair"], tuple)
    assert relative_error(out["logits"], expected) <= 1e-5
    assert torch.equal(out["pair"][0], expected.argmax(-1))
    assert torch.equal(out["pair"][1], gain)
    assert [step.path for step in idle.plan] == ["net.blocks.1", "net.blocks.2", "net.blocks.3"]
    assert torch.equal(idle(gain=gain, picture=x)["logits"], out["logits"])


@torch.no_grad()
@pytest.mark.parametrize("captured_in", ["train", "eval"])
@pytest.mark.parametrize("family", ["vit", "distilled", "parallel_things", "parallel_scaling", "hand_written"])
def test_dropout_follows_the_mode(family, captured_in):
    model = build(family, **DROPOUTS)
    x = images(model, 4)
    model.train(captured_in == "train")
    idle = convert(model, Case((1,), 1.0))
    assert idle.training == model.training

    idle.eval(), model.eval()
    still = idle(x)
    assert torch.equal(still, model(x))
    idle.train(), model.train()
    for seed in (1, 2):
        torch.manual_seed(seed)
        actual = idle(x)
        torch.manual_seed(seed)
        assert torch.equal(actual, model(x))
        assert not torch.allclose(actual, still, atol=1e-3)
    assert torch.equal(idle.eval()(x), still)


@torch.no_grad()
@pytest.mark.parametrize("captured_in", ["train", "eval"])
def test_dropout_follows_the_mode_where_tokens_idle(captured_in):
    model = build("vit", **DROPOUTS)
    x = images(model, 4)
    idle = convert(model.train(captured_in == "train"), HALF)
    expected = wanted(model.eval(), "vit", HALF, x)
    assert relative_error(idle.eval()(x), expected.output) <= 1e-5
    noisy = idle.train()(x)
    assert not torch.allclose(noisy, idle(x), atol=1e-3)
    assert relative_error(idle.eval()(x), expected.output) <= 1e-5


@torch.no_grad()
def test_distilled_training_returns_both_heads():
    model = build("distilled")
    model.set_distilled_training(True)
    x = images(model, 3)
    idle = convert(model.train(), Case((1,), 1.0))
    both, expected = idle(x), model(x)
    assert isinstance(both, tuple) and len(both) == 2
    assert torch.equal(both[0], expected[0]) and torch.equal(both[1], expected[1])
    assert not torch.equal(both[0], both[1])
    assert torch.equal(idle.eval()(x), model.eval()(x))


@pytest.mark.parametrize("training", [True, False])
def test_copy_leaves_the_model_untouched(training):
    model = build("vit", **DROPOUTS).train(training)
    model.blocks[2].eval()
    model.pos_embed.requires_grad_(False)
    model.head.register_forward_hook(lambda *_: None)
    before = fingerprint(model)
    idle = convert(model, HALF)
    assert fingerprint(model) == before
    assert not idle.get_parameter("pos_embed").requires_grad

    x = images(model, 2)
    idle(x).square().mean().backward()
    torch.optim.SGD(idle.parameters(), lr=0.1).step()
    assert fingerprint(model) == before
    assert not torch.equal(idle.get_parameter("head.weight"), model.head.weight)


@torch.no_grad()
def test_without_copy_the_parameters_are_shared():
    model = build("registers")
    idle = convert(model, HALF, copy=False)
    parameters = dict(model.named_parameters())
    assert all(parameter is parameters[key] for key, parameter in idle.named_parameters())
    model.load_state_dict(build("registers", seed=1).state_dict())
    x = images(model, 2)
    assert relative_error(idle(x), wanted(model, "registers", HALF, x).output) <= 1e-5


@torch.no_grad()
def test_deepcopy_is_whole_and_independent():
    model = build("vit", **DROPOUTS)
    idle = convert(model, HALF)
    x = images(model, 3)
    before = idle(x)
    twin = copy.deepcopy(idle)
    assert list(twin.plan) == list(idle.plan) and str(twin.plan.blocks) == str(idle.plan.blocks)
    assert same_selections(selections(twin, x), selections(idle, x))
    assert torch.equal(twin(x), before)
    assert not torch.equal(twin.train()(x), before)
    twin.eval().load_state_dict(build("vit", seed=1).state_dict())
    assert not torch.allclose(twin(x), before, atol=1e-3)
    assert torch.equal(idle(x), before)


@torch.no_grad()
def test_moving_average_of_weights_works():
    model, other = build("vit"), build("vit", seed=1)
    idle = convert(model, HALF)
    average = ModelEmaV3(idle, decay=0.5)
    idle.load_state_dict(other.state_dict())
    average.update(idle)
    for parameter, new in zip(model.parameters(), other.parameters(), strict=True):
        parameter.lerp_(new, 0.5)
    x = images(model, 2)
    assert relative_error(average(x), wanted(model, "vit", HALF, x).output) <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("family", ["vit", "qk_norm", "siglip", "hand_written"])
def test_bfloat16_stays_bfloat16(family):
    model = build(family).to(torch.bfloat16)
    x = images(model, 3).to(torch.bfloat16)
    idle = idlefx.convert(model, layers=[1, 3], keep=0.5)
    assert {parameter.dtype for parameter in idle.parameters()} == {torch.bfloat16}
    out = idle(x)
    assert out.dtype == torch.bfloat16 and out.isfinite().all()
    prefix, tokens = MODELS[family].prefix, image_tokens(model)
    assert {b: s.shape[1] for b, s in selections(idle, x).items()} == {
        1: prefix + tokens // 2,
        2: prefix + tokens // 2,
        3: prefix + tokens // 4,
    }
    assert torch.equal(idlefx.convert(model, layers=[0], keep=1.0)(x), model(x))
