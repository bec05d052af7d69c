"""Residual streams (N, C), without a dimension for the batch: one image, or one sequence of several."""

import pytest
import torch
from torch import Tensor, nn

import idlefx
from idlefx.runtime.selections import groups, selections
from tests.models.packed import PATCH, WIDTH, Block, tower
from tests.models.small import randomise
from tests.oracles import segments as oracle
from tests.support.cases import CLEAR_MARGIN, relative_error
from tests.support.gradients import check_slopes, of_squares
from tests.support.messages import refusal, says

pytestmark = pytest.mark.filterwarnings("ignore:the model's own code fixes the batch size")

COUNT, KEEPS = 16, {0: 0.6, 1: 0.6, 2: 0.36}
PLAN = {"layers": [0, 2], "keep": 0.6}


def patches(seed: int = 1, count: int = COUNT) -> Tensor:
    return torch.randn(count, PATCH, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "options",
    [
        {"fused": False},
        pytest.param({"biased": True, "turns": True}, marks=pytest.mark.slow),
        pytest.param({"shares_keys": True, "fused": False}, marks=pytest.mark.slow),
        pytest.param({"post_norm": True, "biased": True, "fused": False}, marks=pytest.mark.slow),
    ],
)
def test_tokens_of_one_sequence_rest_and_follow_as_the_definition_says(options):
    model, x = tower((COUNT,), **options), patches(seed=2)
    idle = idlefx.convert(model, **PLAN, example_inputs=patches())
    assert (idle.plan.blocks[0].batch_dim, idle.plan.blocks[0].segments) == (None, ())
    wanted = oracle.rest(model, KEEPS, x)
    assert wanted.margin > CLEAR_MARGIN
    assert all(torch.equal(index[0], wanted.working[block]) for block, index in selections(idle, x).items())
    assert relative_error(idle(x), wanted.output) < 1e-6

    following = idlefx.convert(model, **PLAN, idle="follow", example_inputs=patches())
    wanted = oracle.follow(model, [(range(2), 0.6), (range(2, 3), 0.36)], x)
    assert wanted.margin > CLEAR_MARGIN
    assert all(torch.equal(led[0].unique(), wanted.working[block]) for block, led in groups(following, x).items())
    assert relative_error(following(x), wanted.output) < 1e-6


def test_gradients_are_those_of_the_definition():
    model, x = tower((COUNT,)), patches(seed=2)
    idle = idlefx.convert(model, **PLAN, example_inputs=x)
    wanted, found = of_squares(model, oracle.rest(model, KEEPS, x).output), of_squares(idle, idle(x))
    assert all(torch.allclose(found[name], grad, atol=1e-6) for name, grad in wanted.items())
    check_slopes(idlefx.convert(tower((COUNT,)).double(), **PLAN, idle="follow", example_inputs=x.double()), x.double())


class Classifier(nn.Module):
    """A class token and registers in front of the patches of one image, and a head on the class token."""

    def __init__(self, prefix: int, *, fused: bool = True) -> None:
        super().__init__()
        self.patches, self.tokens = nn.Linear(PATCH, WIDTH), nn.Parameter(torch.randn(prefix, WIDTH))
        self.blocks = nn.ModuleList(Block((COUNT + prefix,), fused=fused, biased=True) for _ in range(2))
        self.after, self.head = nn.Parameter(torch.randn(COUNT + prefix, WIDTH)), nn.Linear(WIDTH, 5)

    def forward(self, patches: Tensor) -> Tensor:
        x = torch.cat([self.tokens, self.patches(patches)])
        for block in self.blocks:
            x = block(x)
        return self.head((x + self.after)[0])


@pytest.mark.parametrize(("prefix", "fused"), [(1, False), pytest.param(4, True, marks=pytest.mark.slow)])
def test_class_token_and_registers_in_front_always_work_and_score(prefix, fused):
    torch.manual_seed(0)
    model, x = Classifier(prefix, fused=fused).eval(), patches(seed=2)
    randomise(model)
    idle = idlefx.convert(model, [0], 0.5, example_inputs=patches())
    block = idle.plan.blocks[0]
    assert (block.prefix, block.class_token) == (tuple(range(prefix)), 0)
    stream = torch.cat([model.tokens, model.patches(x)])
    for index, own in enumerate(model.blocks):
        q, k, _ = oracle.projected(own, own.norm(stream), torch.arange(len(stream)))
        scores = (q[:, :1] * k).sum(-1).mean(0)[prefix:]
        best = scores.sort(descending=True, stable=True).indices[: COUNT // 2].sort().values + prefix
        chosen = torch.cat([torch.arange(prefix), best])
        assert torch.equal(selections(idle, x)[index][0], chosen)
        stream = stream.index_copy(0, chosen, oracle.work(own, stream[chosen], chosen))
    assert relative_error(idle(x), model.head((stream + model.after)[0])) < 1e-6


def test_a_class_token_in_front_of_segments_is_refused_unless_it_may_idle():
    model = Classifier(1).eval()
    for block in model.blocks:
        block.lengths = (7, 10)
    said = refusal(idlefx.convert, model, [0], 0.5, example_inputs=patches())
    assert "which keep no prefix tokens; prefix=0 lets all idle" in said
    assert idlefx.convert(model, [0], 0.5, prefix=0, example_inputs=patches()).plan[0].kept_by_segment == (3, 5)


class Packed(nn.Module):
    """Two images of one sequence, which a mask keeps from one another in a single attention."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = tower((COUNT,), depth=1, biased=True)
        image = torch.arange(COUNT) // 8
        with torch.no_grad():
            self.tower.blocks[0].bias += torch.zeros(COUNT, COUNT).masked_fill(image[:, None] != image, -torch.inf)

    def forward(self, patches: Tensor) -> Tensor:
        return self.tower(patches)


def test_a_mask_in_place_of_segments_is_read_where_tokens_work_and_the_share_is_of_the_whole():
    model, x = Packed().eval(), patches(seed=2)
    idle = idlefx.convert(model, [0], 0.5, example_inputs=x)
    assert (idle.plan.blocks[0].segments, idle.plan[0].kept) == ((), 8)
    assert relative_error(idle(x), oracle.rest(model.tower, {0: 0.5}, x).output) < 1e-6


def test_another_number_of_tokens_is_refused():
    idle = idlefx.convert(tower((COUNT,)), [0], 0.5, example_inputs=patches())
    assert says(refusal(idle, patches(count=18)), r"has shape \(18, 12\)", r"traced for \(16, 12\)")


def test_patches_are_no_images_to_draw(tmp_path):
    idle = idlefx.convert(tower((COUNT,)), [0], 0.5, example_inputs=patches())
    said = refusal(idlefx.draw, idle, patches(), tmp_path / "tokens.png")
    assert "takes no images (B, C, H, W), but inputs of shape (B, 12)" in said


def test_state_goes_both_ways():
    model, x = tower((COUNT,)), patches()
    idle = idlefx.convert(model, **PLAN, example_inputs=x)
    with torch.no_grad():
        idle.get_parameter("blocks.1.mlp.0.weight").zero_()
    model.load_state_dict(idle.state_dict())
    assert torch.equal(idlefx.convert(model, **PLAN, example_inputs=x)(x), idle(x))


@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16])
def test_a_sequence_keeps_its_number_type(kind):
    idle = idlefx.convert(tower((4, 12)).to(kind), **PLAN, example_inputs=patches().to(kind))
    assert idle(patches().to(kind)).dtype is kind


@pytest.mark.slow
@pytest.mark.parametrize("lengths", [(COUNT,), (4, 12)])
@pytest.mark.parametrize("way", ["rest", "follow"])
def test_compiled_and_packaged_sequences_compute_as_eager_ones(lengths, way, tmp_path):
    x = patches(seed=2)
    idle = idlefx.convert(tower(lengths), **PLAN, idle=way, example_inputs=x)
    with torch.no_grad():
        wanted = idle(x)
        assert torch.allclose(idlefx.compile(idle)(x), wanted, atol=1e-5)
    for name in ("sequence.pt2", "sequence.onnx"):
        idlefx.package(idle, tmp_path / name)
    assert torch.allclose(idlefx.load(tmp_path / "sequence.pt2")(x), wanted, atol=1e-5)
    session = pytest.importorskip("onnxruntime").InferenceSession(tmp_path / "sequence.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert torch.allclose(torch.from_numpy(found), wanted, atol=1e-4)
