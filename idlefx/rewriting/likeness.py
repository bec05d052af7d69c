"""Group tokens: by what the attention sees of them, and what the class token makes of them."""

from typing import Any

import torch
from torch import fx

from idlefx.analysis import layouts as lay
from idlefx.analysis.layouts import Dim, Factor, Layout
from idlefx.analysis.movement import MOVES
from idlefx.analysis.standing import places, token_count, token_sides
from idlefx.graph.queries import carries_tensors
from idlefx.graph.sizes import shape_of
from idlefx.records import Step
from idlefx.rewriting.selector_head import Head
from idlefx.runtime import following, nearest, ops
from idlefx.runtime.segments import alike_of, group_in_segments

aten = torch.ops.aten

_ROLES = ("batch", "tokens", "")
_STATISTICS = {
    aten.layer_norm.default, aten.rms_norm.default, aten.mean.dim, aten.var.correction, aten.var.dim,
    aten.std.correction, aten.std.dim, aten.sum.dim_IntList, aten.linalg_vector_norm.default, aten.norm.ScalarOpt_dim,
}  # fmt: skip
_ARITHMETIC = {
    aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.pow.Tensor_Scalar, aten.square.default,
    aten.sqrt.default, aten.rsqrt.default, aten.reciprocal.default, aten.clamp_min.default, aten.clamp.default,
    aten.expand_as.default, aten.to.dtype, aten._to_copy.default, aten.contiguous.default,
}  # fmt: skip

_ONE_IMAGE = (Factor(1, "batch"),)


def add_groups(head: Head, step: Step, before: Step | None = None) -> None:
    """Form groups at a block.

    Args:
        head: That of the block.
        step: What it does.
        before: The step whose groups join; None where they are formed of all tokens.
    """
    form: Any = following.group_tokens
    told: tuple[Any, ...]
    if step.kept_by_segment:
        lengths = head.block.segments if before is None else before.kept_by_segment
        form, told = group_in_segments, (normalised_input(head), alike_of(lengths, step.kept_by_segment))
    else:
        tokens, kept = (step.tokens if before is None else before.kept) // head.parts, step.kept // head.parts
        evidence = (normalised_input(head), class_logits(head))
        told = (*evidence, head.prefix, kept, nearest.anchors(tokens, kept))
    head.tell(head.add(form, *told, name="groups", role="choice"), "order", "leaders")


def normalised_input(head: Head) -> fx.Node:
    """The stream as the norm that the block begins with gives it, else the stream itself, in its parts (B, N, C).

    A norm is one operation, or spelled out: arithmetic with the stream, with statistics of it over features, and with
    one number for each feature. The dimensions of the stream may be moved for it.
    """
    entry, walk = head.opened.entry, head.walk
    stream = _ordered(walk[entry])
    inside, moved, normalised = {entry}, set[fx.Node](), set[fx.Node]()
    for node in head.opened.nodes:
        operands = [operand for operand in node.all_input_nodes if operand in walk]
        others = [o for o in node.all_input_nodes if o not in walk and carries_tensors(o)]
        if node.target in MOVES and _ordered(walk[node]) == stream:
            moved.add(node)
        known = (node in moved or node.target in _STATISTICS | _ARITHMETIC) and inside.issuperset(operands)
        if known and all(_is_per_feature(other, walk[node]) for other in others):
            inside.add(node)
            if node.target in _STATISTICS or not normalised.isdisjoint(operands):
                normalised.add(node)
    for node in head.opened.nodes:
        ends = any(user in moved or user not in inside for user in node.users)
        if node in normalised and ends and _ordered(walk[node]) == stream:
            return head.in_parts(_tokens_first(head, head.all_tokens(node), walk[node]))
    return head.tokens_first(head.all_tokens(entry))


def _is_per_feature(operand: fx.Node, layout: Layout) -> bool:
    """Whether something from outside has one number for each feature, of what it is broadcast to."""
    sizes = shape_of(operand)
    dims = layout[len(layout) - len(sizes) :]
    return all(size == 1 or not lay.has(dim, "tokens", "batch") for size, dim in zip(sizes, dims, strict=True))


def _tokens_first(head: Head, stream: fx.Node, layout: Layout) -> fx.Node:
    """Something laid out in any order as (B, N, C)."""
    if not any(lay.has(dim, "batch") for dim in layout):
        return _tokens_first(head, head.add(aten.unsqueeze.default, stream, 0, name="batch"), (_ONE_IMAGE, *layout))
    order = _order(layout)
    if order != list(range(len(order))):
        stream = head.add(aten.permute.default, stream, order, name="x")
    if lay.shares_batch(layout) and not head.few:
        return head.add(aten.reshape.default, stream, [-1, head.block.tokens, head.block.width], name="joined")
    return stream if len(order) == 3 else head.add(aten.flatten.using_ints, stream, 1, -2, name="flat")


def _order(layout: Layout) -> list[int]:
    """The dimensions of the batch, of the tokens and of features; one of size one may be a row of tokens."""
    return sorted(range(len(layout)), key=lambda d: _ROLES.index(layout[d][0].role if layout[d] else "tokens"))


def _ordered(layout: Layout) -> Dim | None:
    """What the dimensions hold, batch, tokens and features; None unless all tokens stand in the order of the stream."""
    factors = tuple(factor for d in _order(layout) for factor in layout[d])
    roles = [_ROLES.index(factor.role) for factor in factors]
    if roles != sorted(roles):
        return None
    sides = token_sides((factors,))
    if sides is None or not torch.equal(places(sides).flatten(), torch.arange(token_count(sides))):
        return None
    batch, features = (tuple(factor for factor in factors if factor.role == role) for role in ("batch", ""))
    return (*batch, *lay.tokens(token_count(sides)), *features)


def class_logits(head: Head) -> fx.Node | None:
    """Logits of the class token on all tokens (B, N), the mean over heads, scaled as in their attention.

    They are right up to a constant. None where there is no class token.
    """
    if head.block.class_token is None:
        return None
    sums = []
    for core in head.opened.cores:
        if head.block.affine and not core.scalings:
            query, key = head.projections(core)
            total, factor = head.sum_over_heads(core, "class"), core.scale * query.factor * key.factor
        else:
            one, keys = head.scaled(core, head.class_query(core)), head.heads_of(core, head.all_tokens, keys=True)
            total, factor = head.add(ops.sum_over_heads, one, keys, name="sums"), core.scale
        sums.append(head.add(aten.mul.Tensor, total, factor, name="scaled"))
    return head.add(ops.mean_over_heads, sums, head.head_count, name="logits")
