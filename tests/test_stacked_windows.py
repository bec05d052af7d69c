"""Windows that are stacked in the batch: where attention joins them, the tokens of an image idle as one sequence."""

import operator
from functools import partial
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import idlefx
from idlefx.analysis.blocks import find_blocks
from idlefx.capture.export import capture
from idlefx.graph.build import add_call
from idlefx.options import PlanOptions
from idlefx.pipeline import rewrite, spell
from idlefx.planning.schedule import make_plan
from idlefx.records import Step
from idlefx.reporting import token_map
from idlefx.runtime.selections import selections
from idlefx.variants import with_stream
from idlefx.zoo.comparisons import compare
from tests.models.stacked import SLOTS, TOKENS, WIDTH, WINDOWS, Block, Stacked, build, pictures
from tests.support.messages import says

aten = torch.ops.aten
HOWS = ("behind", "front", "dims", "sized")
PREFIXES = {0: (), 2: (0, 1, 8, 9, 16, 17, 24, 25)}


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("how", HOWS)
def test_idles_as_the_reference_does_with_masks(how, prefix):
    model = build("inside", how, how, prefix=prefix)
    table = idlefx.inspect(model, pictures(2))
    of_window = (SLOTS + prefix, (), tuple(range(prefix)))
    of_image = (TOKENS + WINDOWS * prefix, (WINDOWS, SLOTS + prefix), PREFIXES[prefix])
    assert [(b.tokens, b.grid, b.prefix) for b in table] == [of_window, of_image, of_image]
    assert all(b.can_idle and not b.rest_only and b.width == WIDTH and b.class_token is None for b in table), table
    assert [b.affine for b in table] == [True] + [how in ("behind", "front")] * 2
    idle = idlefx.convert(model, [0, 1, 2], [0.7, 0.6, 0.3], example_inputs=pictures(2))
    assert [(step.kept, step.tokens) for step in idle.plan] == [(4, SLOTS), (14, TOKENS), (7, TOKENS)]
    found = compare(model, idle, table, pictures(3, seed=1))
    assert found.error < 1e-6 and found.excess < 1e-5, found


@torch.no_grad()
def test_idles_as_the_block_alone_does_on_the_tokens_that_work():
    model, x = build("behind", tells=True), pictures(3, seed=1)
    idle = idlefx.convert(model, [0], 0.4, example_inputs=pictures(2))
    (block,), entered = model.blocks, model.windows(x).view(3, TOKENS, WIDTH)
    q, k, _ = block.qkv(block.norm(entered)).chunk(3, dim=-1)
    kept = (k @ q.mean(1).unsqueeze(2)).squeeze(2).topk(9).indices.sort().values
    assert torch.equal(selections(idle, x)[0], kept)
    where = kept.unsqueeze(2).expand(-1, -1, WIDTH)
    expected = entered.scatter(1, where, block.alone(entered.gather(1, where)))
    left = idle(x).view(3, TOKENS, WIDTH)
    torch.testing.assert_close(left, expected)
    rests = torch.ones(3, TOKENS, dtype=torch.bool).scatter(1, kept, False)
    assert torch.equal(left[rests], entered[rests])


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("how", HOWS)
def test_rewritten_to_keep_all_tokens_is_the_original_bit_by_bit(how, prefix, monkeypatch):
    model, x = build("inside", how, how, prefix=prefix), pictures(3, seed=1)
    monkeypatch.setattr(Step, "idles", True)  # or a block that keeps all would be left as it is
    idle = idlefx.convert(model, [0], 1.0, example_inputs=pictures(2))
    assert len(selections(idle, x)) == 3
    assert torch.equal(idle(x), model(x))


def test_an_image_does_not_depend_on_its_neighbours():
    idle = idlefx.convert(build("inside", "front"), [0], 0.5, example_inputs=pictures(2))
    x = pictures(4, seed=2)
    torch.testing.assert_close(idle(x)[1:2], idle(x[1:2]))


def test_gradients_are_those_of_masks():
    model, x = build("behind").double(), pictures(2, seed=3).double()
    idle = idlefx.convert(model, [0], 0.5, example_inputs=x)
    works = torch.zeros(2, TOKENS, dtype=torch.bool).scatter(1, selections(idle, x)[0], True)
    (block,) = model.blocks
    dense, attend = block.forward, F.scaled_dot_product_attention

    def masked(y):
        with patch.object(F, "scaled_dot_product_attention", lambda *qkv: attend(*qkv, works[:, None, None])):
            return torch.where(works.view(-1, SLOTS, 1), dense(y), y)

    with patch.object(block, "forward", masked):
        model(x).square().sum().backward()
    idle(x).square().sum().backward()
    found = dict(idle.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name].grad, parameter.grad)


@pytest.mark.parametrize("selector", ["norm", "mean"])
def test_scores_are_of_all_tokens_of_an_image(selector):
    model, x = build("dims"), pictures(3)
    idle = idlefx.convert(model, [0], 0.5, selector=selector, example_inputs=pictures(2))
    assert selections(idle, x)[0].shape == (3, TOKENS // 2)


def test_tokens_that_idle_may_never_return():
    idle = idlefx.convert(build("front", "behind"), [0, 1], 0.6, reselect=False, example_inputs=pictures(2))
    chosen = selections(idle, pictures(3))
    assert all(set(less) < set(more) for more, less in zip(*(each.tolist() for each in chosen.values()), strict=True))
    with pytest.raises(idlefx.PlanError, match=r"must have the tokens of block 0, but it has 24"):
        idlefx.convert(build("inside", "behind"), [0], 0.5, reselect=False, example_inputs=pictures(2))


def test_tables_tell_tokens_of_windows_and_of_images():
    rows = str(idlefx.inspect(build("inside", "behind"), pictures(2))).splitlines()[2:]
    assert [says(row, wanted) for row, wanted in zip(rows, ("6 in each of 4 ", r"\b24 "), strict=True)] == [True, True]
    idle = idlefx.convert(build("inside", "behind"), [0], 0.5, example_inputs=pictures(2))
    assert "3 of 6" in str(idle.plan) and "12 of 24" in str(idle.plan)
    told = idlefx.report(idle)
    assert [(block.kept, block.tokens) for block in told.blocks] == [(3, SLOTS), (12, TOKENS)]
    assert all(block.idle_gmacs - block.choosing_gmacs <= block.dense_gmacs / 2 for block in told.blocks)


def test_prefix_tokens_are_named_as_in_one_window():
    model = build("inside", "behind", prefix=1)
    assert [b.prefix for b in idlefx.inspect(model, pictures(2), prefix=0)] == [(), ()]
    assert [b.prefix for b in idlefx.inspect(model, pictures(2), prefix=(2,))] == [(2,), (2, 9, 16, 23)]
    with pytest.raises(idlefx.InputError, match="prefix=7 does not fit 7 tokens"):
        idlefx.inspect(model, pictures(2), prefix=7)


def test_the_stream_and_the_cut_loss_are_returned():
    model, x = build("inside", "behind", tells=True), pictures(3)
    idle = idlefx.convert(model, [0], 0.5, example_inputs=pictures(2))
    (output, stream), loss = idlefx.with_cut_loss(with_stream(idle))(x)
    assert torch.equal(stream.flatten(0, 1), output) and stream.shape == (3, WINDOWS, SLOTS, WIDTH)
    torch.testing.assert_close(output, idle(x))
    assert loss > 0


@pytest.mark.parametrize("block", [0, 1])
def test_no_picture_is_drawn_of_windows(block):
    idle = idlefx.convert(build("inside", "behind"), [block], 0.5, schedule="blocks", example_inputs=pictures(2))
    with pytest.raises(idlefx.InputError, match=rf"draw: the tokens of block {block} \(blocks.{block}\) form no grid"):
        token_map._workers(idle, pictures(1))


def test_a_batch_that_the_model_fixes_is_told_from_windows():
    model = build("behind")
    windows = model.windows
    model.windows = lambda images: windows(images.view(2, 3, 16, 24))
    with pytest.warns(UserWarning, match="batch"):
        idle = idlefx.convert(model, [0], 0.5, example_inputs=pictures(2))
    assert idle.plan[0].kept == TOKENS // 2
    free = idlefx.convert(build("behind"), [0], 0.5, example_inputs=pictures(2))
    torch.testing.assert_close(idle(pictures(2)), free(pictures(2)))


@pytest.mark.slow
@torch.no_grad()
def test_a_compiled_model_is_one_graph_for_all_batches():
    idle = idlefx.convert(build("inside", "front"), [0], 0.5, example_inputs=pictures(2))
    fast = idlefx.compile(idle)
    for batch in (2, 3, 5):
        torch.testing.assert_close(fast(pictures(batch)), idle(pictures(batch)), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_numbers_of_images_that_are_taken_of_the_windows_stay_what_they_are():
    captured = capture(build("sized"), pictures(2)).eval_graph
    spelled = spell(captured)  # here sizes are those of the images, whatever the model took them of
    nodes = list(spelled.graph.nodes)
    entry = next(node for node in nodes if node.name == find_blocks(spelled)[0].entry)
    with spelled.graph.inserting_after(entry):
        entries = add_call(spelled.graph, aten.sym_size.int, entry, 0, name="entries", like=entry)
    with spelled.graph.inserting_after(entries):
        images = add_call(spelled.graph, operator.floordiv, entries, WINDOWS, name="images", like=entry)
    later = nodes[nodes.index(entry) + 1 :]
    for size in spelled.graph.find_nodes(op="call_function", target=aten.sym_size.int):
        if size is not entries:
            size.replace_all_uses_with(images, later.__contains__)
    assert {user.target for user in images.users} >= {aten.reshape.default, aten.expand.default, aten.new_ones.default}
    plan = make_plan(find_blocks(spelled), PlanOptions([0], 0.5))
    idle = idlefx.convert(build("sized"), [0], 0.5, example_inputs=pictures(2))
    assert torch.equal(rewrite(spelled, plan, captured)(pictures(3)), idle(pictures(3)))


class Placed(Block):
    """A block that adds a position embedding, the same for each window."""

    def __init__(self) -> None:
        super().__init__("behind")
        self.places = nn.Parameter(torch.randn(1, SLOTS, WIDTH))

    def forward(self, x):
        return super().forward(x) + self.norm2(x + self.places)


class Outermost(Block):
    """A block that takes entry w * B + b of the batch for window w of image b."""

    def __init__(self) -> None:
        super().__init__("inside")

    def branch(self, x):
        y = self.norm(x).unflatten(0, (WINDOWS, -1)).transpose(0, 1).flatten(1, 2)
        y = self.out(self.attend(self.qkv(y))).unflatten(1, (WINDOWS, SLOTS))
        return y.transpose(0, 1).flatten(0, 1)


@pytest.mark.parametrize(
    ("block", "words"),
    [
        (partial(Block, "pairs"), "aten.reshape.default puts tokens of several images into one window"),
        (Placed, "reads `.*` by position along an axis that tokens share"),
        (Outermost, "aten.unflatten.int puts tokens of several images into one window"),
    ],
)
def test_what_makes_no_sequence_of_an_image_is_refused(block, words):
    (refused,) = idlefx.inspect(Stacked(block()).eval(), pictures(2))
    assert says(refused.refusal, words, r"stacked.*\.py:\d+: "), refused
