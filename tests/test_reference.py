"""The reference that the conversions are compared with is itself held to the definition."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.models.small import DEPTH, MODELS, build, fingerprint, image_tokens, images
from tests.oracles import reference

CHANGES = {
    "mode": lambda model: model.blocks[0].train(),
    "weight": lambda model: model.head.bias.data.add_(1),
    "replaced parameter": lambda model: setattr(model.head, "bias", nn.Parameter(model.head.bias.detach())),
    "frozen": lambda model: model.pos_embed.requires_grad_(False),
    "gradient": lambda model: model(images(model, 1)).sum().backward(),
    "hook": lambda model: model.blocks[1].register_forward_hook(lambda *_: None),
    "attribute": lambda model: setattr(model.blocks[1], "forward", model.blocks[1].forward),
    "module": lambda model: setattr(model, "norm", nn.Identity()),
}


def test_models_are_alive(model):
    x = images(model, 3)
    with torch.no_grad():
        out = model(x)
        tokens = model.forward_features(x)
    assert out.shape == (3, 10)
    assert out.std(dim=0).mean() > 0.1, "images are told apart"
    assert 0.2 < tokens.std() < 20


def test_same_seed_gives_same_model(name, model):
    again, other = build(name), build(name, seed=1)
    for (key, a), b, c in zip(
        model.state_dict().items(), again.state_dict().values(), other.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), key
        assert not torch.equal(a, c), key
        assert a.count_nonzero() == a.numel(), key


def test_table_of_prefix_tokens_is_right(model, spec):
    assert spec.prefix == model.num_prefix_tokens
    x = images(model, 1)
    tokens = model.forward_features(x).detach().requires_grad_()
    model.forward_head(tokens).sum().backward()
    read = tokens.grad[0].abs().sum(-1) > 0
    if not read[: spec.prefix].any():
        assert read[spec.prefix :].all() and spec.class_position == (0 if spec.prefix == 1 else None)
    else:
        assert read[spec.class_position] and not read[spec.prefix :].any()


@torch.no_grad()
def test_keeping_all_tokens_is_the_dense_model(model, spec):
    x = images(model, 3)
    everything = dict.fromkeys(range(DEPTH), image_tokens(model))
    result = reference.run(model, everything, x, prefix=spec.prefix, class_position=spec.class_position)
    assert torch.equal(result.output, model(x))
    assert all(torch.equal(s[0], torch.arange(s.shape[1])) for s in result.selected.values())
    assert sorted(result.selected) == list(range(DEPTH))


@torch.no_grad()
def test_idling_changes_the_output_and_restores_the_model(model, spec):
    x = images(model, 2)
    before = model(x)
    result = reference.run(model, {1: 3, 2: 5}, x, prefix=spec.prefix, class_position=spec.class_position)
    assert not torch.allclose(result.output, before, atol=1e-3)
    assert torch.equal(model(x), before)
    assert {block: s.shape for block, s in result.selected.items()} == {
        1: (2, spec.prefix + 3),
        2: (2, spec.prefix + 5),
    }


def test_choice_by_hand():
    scores = torch.tensor([[9.0, 1.0, 3.0, 3.0, 2.0, 3.0], [0.0, 5.0, 4.0, 3.0, 2.0, 9.0]])
    selected, margin = reference.choose(scores, 2, prefix=1)
    assert selected.tolist() == [[0, 2, 3], [0, 1, 5]]
    assert margin == 0.0


def test_choice_without_prefix_by_hand():
    selected, margin = reference.choose(torch.tensor([[1.0, 7.0, 3.0, 5.0]]), 3, prefix=0)
    assert selected.tolist() == [[1, 2, 3]]
    assert margin == pytest.approx(2 / torch.tensor([1.0, 7.0, 3.0, 5.0]).std().item())


def test_scores_by_hand():
    q = torch.tensor([[[[1.0, 0.0], [0.0, 2.0], [0.0, 4.0]], [[0.0, 1.0], [6.0, 0.0], [2.0, 0.0]]]])
    k = torch.tensor([[[[1.0, 1.0], [2.0, 3.0], [5.0, 7.0]], [[1.0, 0.0], [1.0, 8.0], [3.0, 2.0]]]])
    assert reference.attention_scores(q, k, 1, 0).tolist() == [[0.5, 5.0, 3.5]]
    assert reference.attention_scores(q, k, 1, None).tolist() == [[3.5, 6.5, 16.5]]


@torch.no_grad()
@pytest.mark.parametrize("family", ["vit", "layer_scale", "hand_written", "gap", "registers_gap"])
def test_scores_are_the_logits_of_the_block(family):
    model, spec = build(family), MODELS[family]
    x = images(model, 2)
    result = reference.run(model, {0: 7}, x, prefix=spec.prefix, class_position=spec.class_position)

    tokens = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(x))))
    attn = model.blocks[0].attn
    q, k, _ = attn.qkv(model.blocks[0].norm1(tokens)).reshape(2, tokens.shape[1], 3, 3, 16).unbind(2)
    logits = torch.einsum("bihd,bjhd->bij", q, k)[:, :, spec.prefix :]
    image_mean = logits[:, spec.prefix :].mean(1)
    received = image_mean if spec.class_position is None else logits[:, spec.class_position]
    best = received.topk(7).indices.sort().values + spec.prefix
    assert torch.equal(result.selected[0][:, spec.prefix :], best)


@torch.no_grad()
def test_parallel_attentions_vote_together():
    model = build("parallel_things")
    x = images(model, 2)
    result = reference.run(model, {0: 7}, x, prefix=1, class_position=0)

    tokens = model._pos_embed(model.patch_embed(x))
    votes = []
    for attention in model.blocks[0].attns:
        q, k, _ = attention.attn.qkv(attention.norm(tokens)).reshape(2, tokens.shape[1], 3, 48).unbind(2)
        votes.append((q[:, :1] * k).sum(-1)[:, 1:])
    best = (votes[0] + votes[1]).topk(7).indices.sort().values + 1
    alone = votes[0].topk(7).indices.sort().values + 1
    assert torch.equal(result.selected[0][:, 1:], best)
    assert not torch.equal(best, alone)


@torch.no_grad()
def test_fused_and_hand_written_attention_choose_alike():
    fused, by_hand = build("vit"), build("hand_written")
    x = images(fused, 3)
    results = [reference.run(m, {1: 9, 3: 4}, x, prefix=1, class_position=0) for m in (fused, by_hand)]
    assert all(torch.equal(results[0].selected[block], results[1].selected[block]) for block in (1, 3))
    assert torch.allclose(results[0].output, results[1].output, atol=1e-5)


def test_schedules_by_hand():
    assert reference.schedule_plan([3, 6, 9], 0.7, "stages", 196, 12) == (
        dict.fromkeys((3, 4, 5), 137) | dict.fromkeys((6, 7, 8), 96) | dict.fromkeys((9, 10, 11), 67)
    )
    assert reference.schedule_plan([1, 3], [0.5, 0.75], "stages", 16, 4) == {1: 8, 2: 8, 3: 12}
    assert reference.schedule_plan([1, 3], 0.5, "blocks", 16, 4) == {1: 8, 3: 8}
    assert reference.schedule_plan([0, 2], [0.25, 1.0], "blocks", 16, 4) == {0: 4, 2: 16}


@settings(deadline=None, max_examples=50, derandomize=True)
@given(st.lists(st.integers(-3, 3), min_size=1, max_size=9), st.integers(0, 3), st.data())
def test_choice_is_the_sorted_head_of_a_stable_ranking(values, prefix, data):
    kept = data.draw(st.integers(1, len(values)))
    scores = torch.tensor([[99.0] * prefix + [float(v) for v in values]])
    ranked = sorted(range(len(values)), key=lambda j: (-values[j], j))
    expected = [*range(prefix), *sorted(prefix + j for j in ranked[:kept])]
    assert reference.choose(scores, kept, prefix)[0][0].tolist() == expected


@pytest.mark.parametrize("change", CHANGES)
def test_fingerprint_notices(change):
    model = build("vit")
    before = fingerprint(model)
    assert fingerprint(model) == before
    CHANGES[change](model)
    assert fingerprint(model) != before
