"""Grouping, averaging and handing back, each by itself."""

import pytest
import torch

from idlefx.runtime import following, nearest, ops
from tests.oracles import following as reference

PREFIX = (0, 4)


def grouped(x, kept=5, prefix=PREFIX, logits=None):
    anchors = nearest.anchors(x.shape[1] - len(prefix), kept)
    return following.group_tokens(x, logits, prefix, kept, anchors)


def averaged(x, groups, dims=(1, 0)):
    workers, _place, order, leaders = groups
    return following.average_groups(x, workers, order, leaders, *dims)


@pytest.mark.parametrize("stand_for", [None, torch.arange(1.0, 61).view(3, 20)])
@pytest.mark.parametrize("kept", [1, 5, 17])
def test_sums_without_a_product_are_those_with_one(kept, stand_for):
    torch.manual_seed(0)
    x = torch.randn(3, 20, 6)
    groups = grouped(x, kept)
    given = x, groups[0], *groups[2:], 1, 0, stand_for
    with torch.enable_grad():
        means, sizes = following.average_groups(*given)
    with torch.no_grad():
        quick, same_sizes = following.average_groups(*given)
    assert torch.allclose(quick, means, atol=1e-6) and torch.equal(sizes, same_sizes)
    assert torch.equal(following.average_groups(*given)[0], means), "what needs gradients keeps the product"


def test_groups_are_those_of_the_reference():
    torch.manual_seed(0)
    x, logits = torch.randn(8, 20, 6), torch.randn(8, 20)
    workers, place, order, leaders = groups = grouped(x, logits=logits)
    _means, sizes = averaged(x, groups)
    expected = reference.group(x, logits.softmax(-1), 5, PREFIX)
    assert torch.equal(workers.gather(1, place), expected.leaders)
    assert torch.equal(sizes, reference.sizes_of(expected.leaders).gather(1, workers).float())
    assert torch.equal(leaders, place.gather(1, order[:, 7:]))
    assert torch.equal(order[:, :7], workers)
    everyone = order.sort(1).values
    assert torch.equal(everyone, torch.arange(20).expand(8, -1))


def test_anchors_are_spread_by_the_golden_ratio():
    for tokens in (*range(1, 60), 196, 256, 1024, 1369, 4096):
        for kept in {1, tokens // 3 + 1, tokens // 2 + 1, tokens}:
            spread = nearest.anchors(tokens, kept)
            for prefix in ((), (0,), (1, 2)):
                positions = torch.arange(tokens + len(prefix))
                ours = nearest.are_anchors(positions, prefix, spread) & ~ops.are_prefix(positions, prefix)
                image = [p for p in positions.tolist() if p not in prefix]
                assert spread[0] == ours.sum()
                assert ours.nonzero().flatten().tolist() == [image[rank] for rank in reference.anchors(tokens, kept)]


@pytest.mark.parametrize("prefix", [(), (0, 1), (2, 5)])
def test_likeness_is_that_to_the_nearest_anchor(prefix):
    torch.manual_seed(0)
    unit = torch.nn.functional.normalize(torch.randn(3, 40 + len(prefix), 5), dim=-1)
    image = [p for p in range(unit.shape[1]) if p not in prefix]
    cosines = unit @ unit[:, [image[rank] for rank in reference.anchors(40, 21)]].mT
    likeness = nearest.likeness_to_anchors(unit, prefix, nearest.anchors(40, 21))
    assert torch.allclose(likeness, cosines.amax(-1), atol=1e-6)


def test_among_equal_tokens_the_first_idle_and_the_first_is_followed():
    workers, place, order, _leaders = grouped(torch.ones(1, 8, 4), kept=2, prefix=())
    assert workers.tolist() == [[0, 7]] and order.tolist() == [[0, 7, 1, 2, 3, 4, 5, 6]]
    assert place.tolist() == [[0, 0, 0, 0, 0, 0, 0, 1]]


def test_one_worker_is_followed_by_all_but_the_prefix():
    x = torch.randn(2, 9, 4)
    groups = grouped(x, kept=1)
    assert groups[0].tolist() == [[0, 1, 4]] * 2 and averaged(x, groups)[1].tolist() == [[1, 7, 1]] * 2


@pytest.mark.parametrize("dims", [(1, 0), (0, 1)])
def test_means_and_what_is_handed_back(dims):
    torch.manual_seed(0)
    x = torch.randn(3, 12, 4)
    groups = grouped(x)
    leaders = groups[0].gather(1, groups[1])
    laid_out = x if dims == (1, 0) else x.transpose(0, 1)
    means, _sizes = averaged(laid_out, groups, dims)
    after = torch.randn(means.shape)
    back = following.restore_tokens(laid_out, means, after, *groups, *dims)
    means, after, back = (t if dims == (1, 0) else t.transpose(0, 1) for t in (means, after, back))
    for image in range(3):
        for place, worker in enumerate(groups[0][image].tolist()):
            group = leaders[image] == worker
            assert torch.allclose(means[image, place], x[image, group].mean(0), atol=1e-6)
            assert torch.allclose(back[image, group], x[image, group] + after[image, place] - means[image, place])


def test_gradients_are_those_of_the_formula():
    torch.manual_seed(0)
    x = torch.randn(2, 9, 3, dtype=torch.float64, requires_grad=True)
    groups = grouped(x.detach())

    def through(x):
        means, _sizes = averaged(x, groups)
        return following.restore_tokens(x, means, means.sin(), *groups)

    assert torch.autograd.gradcheck(through, x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(through, x)


def test_a_token_alone_is_what_became_of_it():
    x, after = torch.randn(2, 9, 3), torch.randn(2, 9, 3)
    workers, place, order, leaders = grouped(x, kept=7)
    assert torch.equal(place, workers) and torch.equal(order, workers) and leaders.shape == (2, 0)
    means, sizes = averaged(x, (workers, place, order, leaders))
    assert torch.equal(means, x) and sizes.eq(1).all()
    assert torch.equal(following.restore_tokens(x, means, after, workers, place, order, leaders), after)


def test_sums_of_half_precision_are_made_in_single():
    x = torch.full((1, 300, 2), 1.0, dtype=torch.bfloat16)
    x[:, ::2] = 1.0078125  # the next number in half precision
    groups = grouped(x, kept=1, prefix=())
    means, sizes = averaged(x, groups)
    assert means.dtype == torch.bfloat16 and sizes.tolist() == [[300]]
    assert means[0, 0, 0].item() in (1.0, 1.0078125)  # 300 of them summed in half precision stop at 256


def test_masks_take_the_term():
    term = following.size_term(torch.tensor([[1, 3]]), torch.zeros(1), 4, 3, 0)
    assert term.shape == (1, 1, 1, 2) and term[..., 1].item() == pytest.approx(1.0986123)
    seen = torch.tensor([[True, False]])
    assert following.add_to_mask(seen, term).flatten().tolist() == [0.0, -torch.inf]
    assert following.add_to_mask(seen.float(), term).flatten().tolist() == pytest.approx([1.0, 1.0986123])
    assert following.size_term(torch.tensor([[1, 3], [2, 2]]), torch.zeros(1), 3, 2, 0, 2).shape == (4, 1, 2)
