"""Let idle tokens follow: group tokens that are alike, average the groups, and hand back what became of them.

A group is one token that works and the idle ones that follow it. In a stage of N tokens, W work and I = N - W idle.
"""

import math
from typing import Any

import torch
from torch import Tensor

from idlefx.runtime import ops
from idlefx.runtime.gather_scatter import IN_EAGER, rows, take_tokens, with_gradient
from idlefx.runtime.nearest import Anchors, are_anchors, likeness_to_anchors, nearest_workers

ATTENDED = 0.1  # how much redundancy a token loses that the class token attends to as much as to the mean one


def group_tokens(
    x: Tensor, logits: Tensor | None, prefix: tuple[int, ...], kept: int, anchors: Anchors
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Choose the tokens that work, and for each other one the worker that it follows.

    Those image tokens idle that are most redundant: most like an anchor by cosine, and little attended to by the class
    token. Each follows the image worker with the largest cosine to it. A tie goes to the lower position. No gradient
    flows through the choice.

    Args:
        x: What the likeness is of (B, N, C).
        logits: Logits of the class token (B, N), scaled as in its attention and up to a constant; None without one.
        prefix: Positions of the P prefix tokens, which work and are followed by nobody.
        kept: K, how many image tokens work; W = P + K.
        anchors: From `nearest.anchors`; they always work.

    Returns:
        Positions of the workers, ascending (B, W); for each token the place of its worker among these (B, N);
        positions of the workers and then of the idle tokens, ascending (B, N); and for each idle one the place of its
        worker (B, I).
    """
    precision = torch.promote_types(x.dtype, torch.float32)
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        unit = torch.nn.functional.normalize(x.to(precision), dim=-1)
        count, positions = x.shape[1], torch.arange(x.shape[1], device=x.device)
        working = ops.are_prefix(positions, prefix) | are_anchors(positions, prefix, anchors)
        redundancy = likeness_to_anchors(unit, prefix, anchors)
        if logits is not None:
            attention = logits.to(precision).masked_fill(working, -math.inf).softmax(-1)
            redundancy = redundancy - ATTENDED * attention * (count - len(prefix) - anchors[0])
        order = ops.descending(redundancy.masked_fill(working, -math.inf))
        idle = count - len(prefix) - kept
        order = torch.where(positions < idle, order + count, order).sort(dim=1).values % count
        leaders, place = nearest_workers(unit, order, count - idle, prefix)
    return order.narrow(1, 0, count - idle), place, order, leaders


def average_groups(
    x: Tensor,
    workers: Tensor,
    order: Tensor,
    leaders: Tensor,
    dim: int = 1,
    batch_dim: int = 0,
    stand_for: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The mean of each group of tokens, and how many there are of them.

    Args:
        x: All tokens along `dim`, such as (B, N, C).
        workers: Positions (B, W).
        order: Positions of the workers and then of the idle tokens (B, N).
        leaders: For each idle one the place of its worker (B, I).
        dim: The token dimension.
        batch_dim: The batch dimension.
        stand_for: How many tokens each token stands for, being the mean of a group itself (B, N); one each if None.

    Returns:
        `x` with W entries along `dim`, summed in single precision or better; and the sizes of the groups (B, W).
    """
    full = list(x.shape)
    full[batch_dim] = workers.shape[0]
    tokens = x.expand(full).movedim((batch_dim, dim), (0, 1))
    if not torch.is_grad_enabled() and ops.runs_kernels(tokens):
        try:
            means, sizes = torch.ops.idlefx.average_groups(tokens, order, leaders, stand_for)
            return means.movedim((0, 1), (batch_dim, dim)), sizes
        except ops.BUILD_ERRORS as error:
            ops.do_without(tokens.device, error)
    if stand_for is None:
        sizes = 1 + follows(workers, leaders, torch.float32).sum(-1)
    else:
        each = stand_for.unsqueeze(-1)
        sizes = _sums(each, workers, order, leaders).squeeze(-1)
        tokens = tokens * each
    means = _sums(tokens, workers, order, leaders) / sizes.unsqueeze(-1)
    return means.to(x.dtype).movedim((0, 1), (batch_dim, dim)), sizes


def size_term(
    sizes: Tensor,
    like: Tensor,
    rank: int,
    dim: int,
    batch_dim: int | None,
    copies: int = 1,
    part: tuple[int, int] | None = None,
) -> Tensor:
    """What is added to the logits of a key that stands for several: the logarithm of how many.

    Args:
        sizes: How many tokens each key stands for (B, W).
        like: Queries, whose type it has.
        rank: Of the logits.
        dim: Their dimension of the keys.
        batch_dim: Their dimension of the batch; None without one.
        copies: How many entries of that dimension belong to one image, where heads are merged into the batch.
        part: Which of the workers the keys are, from the first to behind the last; all if None.
    """
    if part is not None:
        sizes = sizes[:, part[0] : part[1]]
    shape = [1] * rank
    shape[dim] = sizes.shape[1]
    if batch_dim is not None:
        shape[batch_dim] = -1
    term = sizes.to(torch.promote_types(like.dtype, torch.float32)).log().to(like.dtype)
    return (term if copies == 1 else term.repeat_interleave(copies, 0)).reshape(shape)


def add_to_mask(mask: Tensor, term: Tensor) -> Tensor:
    """A mask of attention, boolean or added to the logits, with a term that is added."""
    return torch.where(mask, term, -math.inf) if mask.dtype is torch.bool else mask + term


def restore_tokens(
    x: Tensor,
    before: Tensor,
    after: Tensor,
    workers: Tensor,
    place: Tensor,
    order: Tensor,
    leaders: Tensor,
    dim: int = 1,
    batch_dim: int = 0,
) -> Tensor:
    """Let every token take over what the blocks added to the mean of its group.

    What sets a token apart from that mean is added to what became of it: so a token alone is that, bit by bit.

    Args:
        x: All tokens as they went in, such as (B, N, C).
        before: The means of the groups, as they went in, such as (B, W, C).
        after: The same as they came out.
        workers: Positions (B, W).
        place: For each token the place of its worker (B, N).
        order: Positions of the workers and then of the idle tokens (B, N).
        leaders: For each idle one the place of its worker (B, I).
        dim: The token dimension of the first three.
        batch_dim: Their batch dimension.
    """
    precision = torch.promote_types(x.dtype, torch.float32)
    tokens, means, results = (t.movedim((batch_dim, dim), (0, 1)).to(precision) for t in (x, before, after))
    restored: Tensor = with_gradient(_Restore, tokens, means, results, workers, place, order, leaders)
    return restored.to(x.dtype).movedim((0, 1), (batch_dim, dim))


def follows(workers: Tensor, leaders: Tensor, kind: torch.dtype) -> Tensor:
    """A one where an idle token follows a worker (B, W, I)."""
    slots = torch.arange(workers.shape[1], device=workers.device)
    return (slots.unsqueeze(1) == leaders.unsqueeze(1)).to(kind)


def _sums(x: Tensor, workers: Tensor, order: Tensor, leaders: Tensor) -> Tensor:
    """The sum of each group (B, W, C), without atomic additions, so that it is always the same."""
    precision = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        idlers = order.narrow(1, workers.shape[1], leaders.shape[1])
        if x.device.type == "cpu" and not torch.is_grad_enabled() and not torch.compiler.is_exporting():
            followers = _sums_in_bags(x.to(precision), idlers, leaders, workers.shape[1])
        else:
            followers = follows(workers, leaders, precision) @ take_tokens(x, idlers).to(precision)
        return take_tokens(x, workers) + followers


def _sums_in_bags(x: Tensor, idlers: Tensor, leaders: Tensor, groups: int) -> Tensor:
    """The sum of the idle tokens of each group (B, W, C): one bag of an embedding each, which costs no product."""
    batch, tokens, width = x.shape
    by_leader, places = leaders.sort(dim=1)
    members = idlers.gather(1, places) + _rows_before(x, tokens)
    slots = torch.arange(groups, device=x.device).expand(batch, groups).contiguous()
    begins = torch.searchsorted(by_leader, slots) + _rows_before(x, leaders.shape[1])
    rows_of_all = x.reshape(batch * tokens, width)
    sums = torch.nn.functional.embedding_bag(members.flatten(), rows_of_all, begins.flatten(), mode="sum")
    return sums.view(batch, groups, width)


def _rows_before(x: Tensor, each: int) -> Tensor:
    """How many rows stand before those of each image, where images are laid end to end (B, 1)."""
    return torch.arange(x.shape[0], device=x.device).unsqueeze(1) * each


class _Restore(torch.autograd.Function):
    """Adds up by token what stands for its group; the gradient of that is the sum over the group."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, before: Tensor, after: Tensor, workers: Tensor, place: Tensor, order: Tensor, leaders: Tensor
    ) -> Tensor:
        return rows(after, place, 1) + (x - rows(before, place, 1))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, _, _, *groups = inputs
        ctx.save_for_backward(*groups)
        ctx.save_for_forward(*groups)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None, None]:
        workers, _, order, leaders = ctx.saved_tensors
        sums = _sums(grad, workers, order, leaders).to(grad.dtype)
        return grad, -sums, sums, None, None, None, None


class _RestoreInEager(_Restore):
    """With derivatives in forward mode, which torch.compile does not take."""

    @staticmethod
    def jvp(ctx: Any, x: Tensor, before: Tensor, after: Tensor, *_: Any) -> Tensor:
        return _Restore.forward(x, before, after, *ctx.saved_tensors)


IN_EAGER[_Restore] = _RestoreInEager
