"""The reference of following tokens is itself held to the definition, by examples made by hand."""

import math

import pytest
import torch
from torch import Tensor, nn

from idlefx.zoo.reference import Attention, Tokens
from idlefx.zoo.reference.first_norm import first_norm
from idlefx.zoo.reference.groups import Stage, anchors, group
from tests.models.generated import Config, inputs
from tests.models.generated import build as build_generated
from tests.models.small import DEPTH, MODELS, build, image_tokens, images
from tests.oracles import following, following_generated, following_zoo

PATHS = [f"blocks.{index}" for index in range(DEPTH)]


def run(name: str, plan: list[Stage], x: Tensor, model: nn.Module | None = None) -> following.Result:
    spec, model = MODELS[name], model or build(name)
    tokens = Tokens(tuple(range(spec.prefix)), spec.class_position)
    return following_zoo.run(model, PATHS, plan, dict.fromkeys(PATHS, tokens), lambda: model(x))


def at(*degrees: float) -> Tensor:
    """One image of tokens (1, N, 2) in these directions, of different lengths."""
    turn = torch.tensor(degrees).deg2rad()
    return (torch.stack([turn.cos(), turn.sin()], -1) * torch.arange(1.0, len(degrees) + 1)[:, None])[None]


def test_anchors_by_hand():
    assert anchors(12, 6) == [0, 5]  # the fractions of r * 0.618… are 0, 0.618, 0.236, 0.854, 0.472, 0.090, 0.708, …
    assert anchors(12, 3) == [0]
    assert anchors(13, 13) == [0, 5, 10]  # ⌈13 / 6⌉ is 3 and ⌈13 / 3⌉ more; … 0.326, 0.944, 0.562, 0.180, …
    assert anchors(2, 1) == [0]
    assert len(anchors(1369, 800)) == 229


def test_groups_by_hand():
    #  position  0 (prefix) 1 (anchor) 2   3   4   5   6
    tokens = at(10.0, 0.0, 40.0, 5.0, 80.0, 42.0, 3.0)
    groups = group(tokens, None, 3, (0,))
    assert anchors(6, 3) == [0]
    # the nearest to the anchor at 0° are 3°, 5° and 40°: they idle, and 40° follows 42°
    assert groups.leaders.tolist() == [[0, 1, 5, 1, 4, 5, 1]]
    cos = [math.cos(math.radians(d)) for d in (40.0, 42.0)]
    assert groups.margins.item() == pytest.approx(cos[0] - cos[1], rel=1e-4)
    assert following.sizes_of(groups.leaders).tolist() == [[1, 3, 0, 0, 1, 2, 0]]
    assert following.means_of(tokens, groups.leaders)[0, 1].tolist() == pytest.approx(
        ((tokens[0, 1] + tokens[0, 3] + tokens[0, 6]) / 3).tolist()
    )


def test_attention_of_the_class_token_keeps_a_token_at_work():
    tokens = at(10.0, 0.0, 40.0, 5.0, 80.0, 42.0, 3.0)
    received = torch.tensor([[9.0, 9.0, 1.0, 46.0, 1.0, 1.0, 1.0]])  # five that are no anchors get 10 on average
    # redundancies: 0.766 − 0.01, 0.996 − 0.46, 0.174 − 0.01, 0.743 − 0.01, 0.999 − 0.01
    groups = group(tokens, received, 3, (0,))
    assert groups.leaders.tolist() == [[0, 1, 3, 3, 4, 3, 3]]
    assert groups.margins.item() == pytest.approx(math.cos(math.radians(2)) - math.cos(math.radians(3)), rel=1e-3)
    less = group(tokens, received, 5, (0,))  # 3° idles and follows 5°; 40° just works
    assert less.leaders.tolist() == [[0, 1, 2, 3, 4, 5, 3]]


def test_ties_go_to_the_lower_position():
    tokens = torch.eye(2)[[0, 1, 1, 1, 1, 0]][None]
    groups = group(tokens, None, 4, ())  # of four that are equally redundant the first idles
    assert anchors(6, 4) == [0]
    assert groups.leaders.tolist() == [[0, 2, 2, 3, 4, 0]]
    assert groups.margins.item() == 0.0


def test_keeping_one_or_all_by_hand():
    tokens = torch.randn(2, 5, 4)
    everybody = group(tokens, None, 4, (2,))
    assert everybody.leaders.tolist() == [[0, 1, 2, 3, 4]] * 2 and everybody.margins.min() == math.inf
    one = group(tokens, torch.rand(2, 5), 1, (2,))
    assert one.leaders.tolist() == [[0, 0, 2, 0, 0]] * 2 and one.margins.min() == math.inf


def test_class_attention_by_hand():
    q = torch.tensor([[[[1.0, 0.0], [9.0, 9.0]], [[0.0, 1.0], [9.0, 9.0]]]])
    k = torch.tensor([[[[2.0, 3.0], [5.0, 7.0]], [[1.0, 4.0], [1.0, 8.0]]]])
    logits = torch.tensor([[(2 + 4) / 2, (5 + 8) / 2]])
    assert torch.allclose(following.class_attention([(q, k, 0.5)], 0), (logits / 2).softmax(-1))
    each = torch.tensor([2.0, 1.0])[:, None, None]
    expected = torch.tensor([[(2 * 2 + 4) / 2, (2 * 5 + 8) / 2]])
    assert torch.allclose(following.class_attention([(q, k, each)], 0), expected.softmax(-1))
    assert following.class_attention([(q, k, 0.5)], None) is None


def test_stages_of_a_plan():
    assert following.stages([3, 6, 9], 0.7, "stages", 196, 12) == [Stage(3, 6, 137), Stage(6, 9, 96), Stage(9, 12, 67)]
    assert following.stages([1, 3], [0.5, 0.75], "stages", 16, 4) == [Stage(1, 3, 8), Stage(3, 4, 12)]
    assert following.stages([1, 3], 0.5, "blocks", 16, 4) == [Stage(1, 2, 8), Stage(3, 4, 8)]


@torch.no_grad()
def test_stage_by_hand():
    """Two blocks of a plain ViT, written out once more on the workers alone."""
    model, x = build("vit"), images(build("vit"), 2)
    result = run("vit", [Stage(1, 3, 20)], x, model)

    tokens = model.blocks[0](model._pos_embed(model.patch_embed(x)))
    leaders = result.groups[1].leaders
    expected = torch.empty_like(tokens)
    for image in range(2):
        workers = leaders[image].unique()
        belongs = (leaders[image] == workers[:, None]).float()  # (W, N)
        sizes = belongs.sum(1)
        means = belongs @ tokens[image] / sizes[:, None]
        z = means[None]
        for block in model.blocks[1:3]:
            attn = block.attn
            q, k, v = attn.qkv(block.norm1(z)).reshape(1, len(workers), 3, 3, 16).permute(2, 0, 3, 1, 4)
            weights = (q @ k.mT * attn.scale + sizes.log()).softmax(-1)
            z = z + attn.proj((weights @ v).transpose(1, 2).flatten(2))
            z = z + block.mlp(block.norm2(z))
        expected[image] = tokens[image] + belongs.T @ (z[0] - means)
        assert len(workers) == 21 and sizes[0] == 1
    expected = model.head(model.norm(model.blocks[3](expected))[:, 0])
    assert torch.allclose(result.output, expected, atol=1e-5)


@torch.no_grad()
def test_grouping_reads_normalised_input_and_scaled_class_logits():
    model, x = build("hand_written"), images(build("vit"), 2)
    result = run("hand_written", [Stage(0, 2, 14)], x, model)
    tokens = model._pos_embed(model.patch_embed(x))
    y, attn = model.blocks[0].norm1(tokens), model.blocks[0].attn
    q, k, _ = attn.qkv(y).reshape(2, 37, 3, 3, 16).permute(2, 0, 3, 1, 4)
    received = (q[:, :, :1] @ k.mT * attn.scale).mean(1)[:, 0].softmax(-1)
    expected = group(y, received, 14, (0,))
    assert torch.equal(result.groups[0].leaders, expected.leaders)
    assert result.margin == pytest.approx(expected.margins.min().item(), rel=1e-3)
    assert not torch.equal(group(tokens, received, 14, (0,)).leaders, expected.leaders)
    assert not torch.equal(group(y, received**5, 14, (0,)).leaders, expected.leaders)


@torch.no_grad()
def test_keeping_all_tokens_is_the_dense_model(model, spec, name):
    x = images(model, 2)
    result = run(name, [Stage(0, 2, image_tokens(model)), Stage(2, DEPTH, image_tokens(model))], x, model)
    assert torch.equal(result.output, model(x))
    assert result.margin == math.inf


@torch.no_grad()
@pytest.mark.parametrize("family", ["vit", "hand_written", "parallel_things", "layer_scale"])
def test_equal_tokens_may_follow_at_no_cost(family):
    """Where all tokens are equal to anchors they may follow: that is what the logarithm of the size is for."""
    model = build(family)
    x = images(model, 2)
    stream: list[Tensor] = []
    model.blocks[0].register_forward_pre_hook(lambda _, args: stream.append(args[0]))
    model(x)
    few = torch.cat([torch.zeros(1, dtype=torch.long), 1 + torch.arange(36) % 3])
    model.blocks[0].register_forward_pre_hook(lambda _, args: (stream[0][:, few],))
    result = run(family, [Stage(0, 2, 30), Stage(2, DEPTH, 24)], x, model)
    idle = [(groups.leaders != torch.arange(37)).sum(1).tolist() for groups in result.groups.values()]
    assert idle == [[6, 6], [12, 12]]
    assert torch.allclose(result.output, model(x), atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("talking", ["none", "linear"])
def test_equal_tokens_may_follow_at_no_cost_where_heads_talk(talking):
    config = Config(core="matmul", talking=talking, positions="none")
    model = build_generated(config)
    few = torch.randn(2, 3, 3, 4, 4)[:, torch.arange(16) % 3]  # (B, patch, colour, row, column)
    image = few.unflatten(1, (4, 4)).permute(0, 3, 1, 4, 2, 5).reshape(2, 3, 16, 16)
    result = following_generated.run(model, [Stage(0, 3, 12)], (image,))
    assert (result.groups[0].leaders == torch.arange(17)).sum() == 2 * 13
    assert torch.allclose(result.output, model(image), atol=1e-5)


@torch.no_grad()
def test_whoever_reads_between_blocks_sees_all_tokens_restored_and_nobody_may_write():
    model = build("vit")
    x, seen = images(model, 2), []
    hook = model.blocks[1].register_forward_hook(lambda *values: seen.append(values[2]))
    whole = run("vit", [Stage(1, 3, 12)], x, model)
    alone = run("vit", [Stage(1, 2, 12)], x, model)
    hook.remove()
    assert torch.equal(seen[0], seen[1]) and not torch.isclose(seen[0][0, 0], seen[0][1, 0]).all()
    assert not torch.allclose(whole.output, alone.output, atol=1e-3)
    writes = model.blocks[2].register_forward_pre_hook(lambda _, args: (args[0] + 1,))
    with pytest.raises(ValueError, match="writes the stream between two blocks"):
        run("vit", [Stage(1, 3, 12)], x, model)
    writes.remove()


@torch.no_grad()
@pytest.mark.parametrize(
    "config",
    [
        Config(),
        Config(core="multihead"),
        Config(core="matmul", scale="learned", groups="repeated", projection="separate", prefix=2),
        Config(core="matmul", block="post", bias="table"),
        Config(core="bmm", scale="before", residual="half"),
        Config(core="sdpa", rotary="given", norm="written", head="mean", prefix=0),
        Config(core="baddbmm", norm="none", mask="float"),
    ],
    ids=lambda config: repr(config)[7:-1] or "plain",
)
def test_two_references_agree(config):
    assert config.normalised() == config
    model, given = build_generated(config), inputs(config, 2)
    plan = [Stage(0, 2, 9), Stage(2, 3, 6)]
    ours = following_generated.run(model, plan, given)
    tokens = Tokens(config.prefix_positions, config.class_position)
    paths = [f"blocks.{index}" for index in range(3)]
    theirs = following_zoo.run(model, paths, plan, dict.fromkeys(paths, tokens), lambda: model(*given))
    assert ours.margin > 1e-5
    assert all(torch.equal(ours.groups[b].leaders, theirs.groups[b].leaders) for b in (0, 2))
    assert torch.allclose(ours.output, theirs.output, atol=1e-5)
    assert not torch.allclose(ours.output, model(*given), atol=1e-3)


def test_first_norm_is_found_or_there_is_none():
    x, norm = torch.randn(2, 5, 8), nn.LayerNorm(8)
    behind = nn.Sequential(nn.Identity(), nn.Sequential(norm, nn.Linear(8, 8)))
    assert torch.equal(first_norm(x, lambda: behind(x)), norm(x))
    assert torch.equal(first_norm(x, lambda: torch.rms_norm(x, [8])), torch.rms_norm(x, [8]))
    assert first_norm(x, lambda: norm(x + nn.Linear(8, 8)(x))) is None
    grid = torch.randn(2, 8, 3, 5)
    tokens = grid.flatten(2).transpose(1, 2)
    for moved in (grid.permute(0, 2, 3, 1), tokens):
        assert torch.equal(first_norm(tokens, lambda moved=moved: norm(moved)), norm(tokens))


def test_reference_of_attention_tells_its_scale():
    x = torch.randn(2, 3, 5, 4)
    with Attention(2, 5) as attention:
        (x @ x.mT * 0.25 / 2 + 1).softmax(-1) @ x
        torch.nn.functional.scaled_dot_product_attention(x, x, x)
        (x @ x.mT * torch.ones(3, 1, 1)).softmax(-1) @ x
    scales = [core.scale for core in attention.found]
    assert scales[:2] == [0.125, 0.5] and torch.equal(scales[2], torch.ones(3, 1, 1))
