"""The tensor code that ends up in graphs, against the plainest spelling of what it should do."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from idlefx.runtime import gather_scatter, ops

DIMS = [(1, 0, 3), (0, 1, 3), (2, 1, 4), (1, 3, 4)]


def chosen_by_hand(scores: list[float], prefix: tuple[int, ...], kept: int) -> list[int]:
    image = [p for p in range(len(scores)) if p not in prefix]
    best = sorted(image, key=lambda p: (-scores[p], p))[:kept]
    return sorted([*prefix, *best])


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_choice_is_the_highest_scores_with_ties_to_the_lower_position(data):
    count = data.draw(st.integers(2, 12))
    prefix = tuple(sorted(data.draw(st.sets(st.integers(0, count - 1), max_size=count - 1))))
    kept = data.draw(st.integers(1, count - len(prefix)))
    scores = data.draw(st.lists(st.sampled_from([-1.0, 0.0, 0.5, 2.0]), min_size=count, max_size=count))
    found = ops.choose_tokens(torch.tensor([scores, scores[::-1]]), prefix, kept)[0]
    assert found[0].tolist() == chosen_by_hand(scores, prefix, kept)
    assert found[1].tolist() == chosen_by_hand(scores[::-1], prefix, kept)


def test_prefix_works_whatever_the_scores_are():
    scores = torch.full((1, 6), torch.nan)
    assert ops.choose_tokens(scores, (0, 1), 2)[0].tolist() == [[0, 1, 2, 3]]
    assert {1, 4} <= set(ops.choose_tokens(scores, (1, 4), 2)[0][0].tolist())


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("dim", "batch_dim", "rank"), DIMS)
def test_taking_and_putting_are_indexing(dim, batch_dim, rank, batch):
    torch.manual_seed(0)
    shape = [2] * rank
    shape[dim], shape[batch_dim] = 7, batch
    x = torch.randn(shape)
    index = torch.stack([torch.randperm(7)[:4].sort().values for _ in range(batch)])
    taken = gather_scatter.take_tokens(x, index, dim, batch_dim)
    for image in range(batch):
        wanted = x.select(batch_dim, image).index_select(dim - (batch_dim < dim), index[image])
        assert torch.equal(taken.select(batch_dim, image), wanted)
    put = gather_scatter.put_tokens(x, index, taken + 1, dim, batch_dim)
    assert torch.equal(gather_scatter.take_tokens(put, index, dim, batch_dim), taken + 1)
    assert torch.equal(
        put - x != 0, gather_scatter.put_tokens(torch.zeros_like(x), index, torch.ones_like(taken), dim, batch_dim) > 0
    )


def test_a_table_without_a_batch_serves_every_image():
    table, index = torch.arange(10.0).view(1, 5, 2), torch.tensor([[0, 2], [1, 4]])
    assert torch.equal(gather_scatter.take_tokens(table, index), table[0][index])


def test_gradients_of_idle_tokens_pass_and_those_of_working_tokens_go_through_the_block():
    x = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    index = torch.tensor([[0, 3], [1, 2]])
    assert torch.autograd.gradcheck(
        lambda t: gather_scatter.put_tokens(t, index, gather_scatter.take_tokens(t, index).sin()), x
    )


def test_mean_leaves_the_prefix_out():
    x = torch.randn(2, 6, 3)
    assert torch.equal(ops.mean_tokens(x, (0, 1), 1), x[:, 2:].mean(1, keepdim=True))
    assert torch.allclose(ops.mean_tokens(x, (1, 5), 1), x[:, [0, 2, 3, 4]].mean(1, keepdim=True))


def test_rows_of_interleaved_heads_are_a_pattern():
    weight = torch.arange(12.0)
    assert ops.take_rows(weight, 2, 3, 4, 2).tolist() == [2, 3, 6, 7, 10, 11]
    assert ops.take_rows(weight, 4, 1, 9, 3).tolist() == [4, 5, 6]


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("count", [1, 2])
def test_query_of_one_token_is_its_norm_and_a_linear_layer(dim, count):
    torch.manual_seed(0)
    norm, linear = torch.nn.LayerNorm(8, eps=1e-6), torch.nn.Linear(8, 5)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    addends = [torch.randn(3, n, 8).transpose(0, 1 - dim) for n in (6, 4)[:count]]
    found = ops.norm_linear(addends, 2, dim, norm.weight, norm.bias, norm.eps, linear.weight, linear.bias)
    assert torch.allclose(found, linear(norm(sum(part.select(dim, 2) for part in addends))), atol=1e-6)


@pytest.fixture
def kernels(monkeypatch):
    """Kernels that are said to run here, and fail with what is put into `error`."""
    failing = SimpleNamespace(error=None, calls=0)

    def fail(*_):
        failing.calls += 1
        raise failing.error

    monkeypatch.setattr(ops, "_without_kernels", ())
    monkeypatch.setattr(ops, "runs_kernels", lambda x: x.device.index not in ops._without_kernels)
    monkeypatch.setattr(ops, "triton_ops", SimpleNamespace(MOST_TOKENS=10))
    monkeypatch.setattr(ops, "choose_tokens_in_one", fail)
    return failing


def test_plain_operations_do_the_work_where_kernels_cannot_be_built(kernels):
    kernels.error = RuntimeError("Failed to find C compiler. Please specify via CC environment variable.")
    scores = torch.randn(3, 6)
    with pytest.warns(UserWarning, match="plain operations do their work, slower: Failed to find C compiler") as seen:
        found = [ops.choose_tokens(scores, (0,), 2) for _ in range(2)]
    assert len(seen) == kernels.calls == 1
    ranks = scores[:, 1:].argsort(dim=1, descending=True, stable=True)[:, :2] + 1
    assert all(torch.equal(index[:, 1:], ranks.sort(dim=1).values) for index, _ in found)


@pytest.mark.parametrize("error", [RuntimeError("an illegal memory access"), ValueError("a fault of the kernel")])
def test_fault_of_a_kernel_is_not_hidden(kernels, error):
    kernels.error = error
    with pytest.raises(type(error), match=str(error)):
        ops.choose_tokens(torch.randn(3, 6), (0,), 2)
