"""Tokens on a grid (B, H, W, C) or (B, C, H, W) idle as those of a sequence do."""

from copy import deepcopy
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import idlefx
from idlefx.records import Step
from idlefx.runtime import grids
from idlefx.runtime.selections import selections
from idlefx.zoo.comparisons import compare
from tests.models.grids import COLUMNS, KINDS, ROWS, WIDTH, ChannelsFirst, ChannelsLast, build, pictures
from tests.support.messages import says

pytestmark = pytest.mark.filterwarnings("ignore:in train mode the model has other blocks")

BASIC = ("relative", "first")


@pytest.mark.parametrize("kind", [k if k in BASIC else pytest.param(k, marks=pytest.mark.slow) for k in KINDS])
def test_idles_as_the_reference_does_with_masks(kind):
    model = build(kind, 2)
    table = idlefx.inspect(model, pictures(2))
    for place, block in enumerate(table):
        assert (block.path, block.tokens, block.grid, block.prefix) == (f"blocks.{place}", 24, (ROWS, COLUMNS), ())
        assert block.can_idle and block.affine and block.width == WIDTH, block
    idle = idlefx.convert(model, layers=[0, 1], keep=[0.7, 0.2], example_inputs=pictures(2))
    found = compare(model, idle, table, pictures(3, seed=1))
    assert found.error < 1e-6 and found.excess < 1e-5, found


@pytest.mark.parametrize("kind", [k if k in BASIC else pytest.param(k, marks=pytest.mark.slow) for k in KINDS])
def test_rewritten_to_keep_all_tokens_is_the_original_bit_by_bit(kind, monkeypatch):
    model, x = build(kind, 2), pictures(3, seed=1)
    model.neck = nn.Identity()  # a convolution adds up in another order where memory is laid out in another
    monkeypatch.setattr(Step, "idles", True)  # or a block that keeps all would be left as it is
    idle = idlefx.convert(model, layers=[0], keep=1.0, example_inputs=pictures(2))
    assert len(selections(idle, x)) == 2
    assert torch.equal(idle(x), model(x))


@torch.no_grad()
def test_idle_tokens_leave_a_block_bit_identical():
    model, x = build(ChannelsLast), pictures(3, seed=2)
    model.neck = nn.Identity()
    idle = idlefx.convert(model, layers=[0], keep=0.25, example_inputs=pictures(2))
    before = (model.patches(x) + model.positions).flatten(2)
    assert (idle(x).flatten(2) != before).any(1).sum(1).tolist() == [6, 6, 6]


def test_gradients_are_those_of_masks():
    model, x = build("relative").double(), pictures(2, seed=3).double()
    idle = idlefx.convert(model, layers=[0], keep=0.5, example_inputs=x)
    works = torch.zeros(2, ROWS * COLUMNS, dtype=torch.bool).scatter(1, selections(idle, x)[0], True)
    hidden = torch.zeros(2, 1, 1, ROWS * COLUMNS).double().masked_fill(~works[:, None, None], -torch.inf)
    (block,) = model.blocks
    dense, attend = block.forward, F.scaled_dot_product_attention

    def masked(y):
        with patch.object(F, "scaled_dot_product_attention", lambda *qkv, attn_mask: attend(*qkv, attn_mask + hidden)):
            return torch.where(works.view(2, ROWS, COLUMNS, 1), dense(y), y)

    with patch.object(block, "forward", masked):
        model(x).square().sum().backward()
    idle(x).square().sum().backward()
    found = dict(idle.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name].grad, parameter.grad)


@pytest.mark.parametrize("merged", [False, True])
def test_tokens_put_on_a_grid_are_taken_from_it_again(merged):
    index = torch.tensor([[0, 5, 7], [1, 2, 11]])
    batch, rows, columns, features = ("batch", 0), ("side", 0), ("side", 1), ("features", 5)
    few = torch.randn(2, 3, 5)
    if merged:  # columns apart, images and rows in one dimension
        dims, x = ((columns,), (batch, rows), (features,)), few.transpose(0, 1)
    else:
        dims, x = ((batch,), (features,), (rows,), (columns,)), few.transpose(1, 2).unsqueeze(2)
    whole = grids.put_on_grid(x, index, dims, (3, 4))
    assert list(whole.shape) == ([4, 6, 5] if merged else [2, 5, 3, 4])
    assert torch.equal(whole[3, 5] if merged else whole[1, :, 2, 3], few[1, 2])
    assert torch.equal(grids.take_from_grid(whole, index, dims, (3, 4)), x)


def test_tables_of_rows_columns_and_places_are_read_at_the_tokens():
    index = torch.tensor([[0, 5, 7], [1, 2, 11]])
    table = torch.arange(12.0).view(1, 3, 4)
    assert grids.read_on_grid(table, index, 1, 0, (3, 4)).tolist() == index.unsqueeze(1).tolist()
    rows, columns = torch.arange(3.0).view(1, 3, 1), torch.arange(4.0).view(1, 1, 4)
    assert grids.read_on_grid(rows, index, 1, 0, (3, 4)).tolist() == (index // 4).unsqueeze(1).tolist()
    assert grids.read_on_grid(columns, index, 1, 0, (3, 4)).tolist() == (index % 4).unsqueeze(1).tolist()


def test_prefix_tokens_of_a_grid_are_refused():
    with pytest.raises(idlefx.IdleFxError, match="prefix=1, but the tokens stand on a grid of 4 × 6"):
        idlefx.convert(build(ChannelsLast), layers=[0], keep=0.5, prefix=1, example_inputs=pictures(2))


def test_a_convolution_over_neighbours_is_refused():
    (block,) = idlefx.inspect(build(lambda: ChannelsFirst(kernel=3)), pictures(2))
    assert says(block.refusal, "convolves over neighbouring tokens", r"grids\.py:\d+: return x \+ self\.mlp"), block


@pytest.mark.slow
@torch.no_grad()
def test_a_compiled_model_is_one_graph_for_all_batches():
    idle = idlefx.convert(build("relative", 2), layers=[0], keep=0.5, example_inputs=pictures(2))
    fast = idlefx.compile(idle, backend="eager")
    for batch in (2, 3, 5):
        assert torch.equal(fast(pictures(batch)), idle(pictures(batch)))


@pytest.mark.slow
def test_the_token_cut_loss_is_added():
    model = build(ChannelsLast, 2)
    idle = idlefx.convert(deepcopy(model), layers=[0, 1], keep=0.5, example_inputs=pictures(2))
    output, loss = idlefx.with_cut_loss(idle)(pictures(2))
    torch.testing.assert_close(output, idle(pictures(2)))
    assert loss > 0


@torch.no_grad()
@pytest.mark.parametrize("kind", ["first", "last"])
def test_maps_that_were_contiguous_are_so_again(kind):
    model, x = build(kind, 1, tells=True), pictures(2)
    idle = idlefx.convert(model, layers=[0], keep=0.6, example_inputs=x)
    dense = model(x)
    assert dense[0].is_contiguous() and dense[1].is_contiguous() == (kind == "first")
    for before, after in zip(dense, idle(x), strict=True):
        assert after.is_contiguous() or not before.is_contiguous()
