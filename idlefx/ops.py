"""Choose, take and put: the only new tensor code that ends up in a graph."""

from functools import reduce
from operator import add, or_
from typing import Any

import torch
from torch import Tensor


def order_tokens(scores: Tensor, prefix: tuple[int, ...], kept: int, among: Tensor | None = None) -> Tensor:
    """All positions: first those of the tokens that work, the prefix and the highest scores, then those that idle.

    Args:
        scores: A score per token (B, N); those of the prefix are not looked at.
        prefix: Positions of the P prefix tokens.
        kept: K, how many image tokens work. A tie goes to the lower position.
        among: Positions (B, n) of the prefix tokens and of at least K image tokens to choose from; all if None.

    Returns:
        Positions (B, N), of which the first P + K work; both parts are ascending, and the second counts from N.
    """
    if among is not None:
        scores = _ranks(scores, among)
    # Everything is a sort, a scan or pointwise over whole rows, so that a compiler makes one kernel of it.
    order, count = _descending(scores), scores.shape[1]
    fixed = _are_prefix(order, prefix)
    works = fixed | ((1 - fixed.to(order.dtype)).cumsum(1) <= kept)
    return torch.where(works, order, order + count).sort(dim=1).values


def choose_tokens(scores: Tensor, prefix: tuple[int, ...], kept: int, among: Tensor | None = None) -> Tensor:
    """Positions (B, P + K) of the tokens that work, ascending; see `order_tokens`."""
    return order_tokens(scores, prefix, kept, among).narrow(1, 0, len(prefix) + kept)


def places_of(order: Tensor) -> Tensor:
    """Where each token stands in what `order_tokens` returned, (B, N)."""
    return (order % order.shape[1]).argsort(dim=1)


def score_tokens(tokens: Tensor, direction: Tensor) -> Tensor:
    """How far each token reaches in a direction, `<direction, token>`.

    A product and a sum, which a compiler fuses with the norm of the tokens, where a matrix product would make it
    write them; and summed in full precision, as scores of half precision are full of ties.

    Args:
        tokens: Normalised tokens (B, N, C).
        direction: A vector for each image (B, C).

    Returns:
        Scores (B, N), in single precision or better.
    """
    precision = torch.promote_types(tokens.dtype, torch.float32)
    return (tokens * direction.unsqueeze(1)).sum(2, dtype=precision)


def mean_over_heads(sums: list[Tensor], heads: int) -> Tensor:
    """The mean over heads of scores (B, N), of which there is the sum over the heads of each attention."""
    return reduce(add, sums) / heads


def _are_prefix(positions: Tensor, prefix: tuple[int, ...]) -> Tensor:
    if prefix == tuple(range(len(prefix))):
        return positions < len(prefix)
    return reduce(or_, (positions == p for p in prefix))


def _descending(scores: Tensor) -> Tensor:
    return scores.argsort(dim=1, descending=True, stable=True)


def _ranks(scores: Tensor, among: Tensor) -> Tensor:
    """Scores that order as before, those of tokens to choose from above all others, whatever they were."""
    rank = _descending(scores).argsort(dim=1)
    allowed = torch.zeros_like(rank).scatter(1, among, scores.shape[1])
    return allowed - rank


def fixed_tokens(x: Tensor, positions: tuple[int, ...], batch_dim: int = 0) -> Tensor:
    """The same positions for every image of a batch, (B, len(positions))."""
    return torch.tensor(positions, device=x.device).expand(x.shape[batch_dim], -1)


def take_tokens(x: Tensor, index: Tensor, dim: int = 1, batch_dim: int = 0) -> Tensor:
    """Take each image's own tokens along one dimension.

    Args:
        x: Tokens along `dim`; along `batch_dim` the images, or one entry that serves all of them.
        index: Positions (B, n), each at most once.
        dim: The token dimension.
        batch_dim: The batch dimension.

    Returns:
        `x` with n entries along `dim` and B along `batch_dim`.
    """
    full = list(x.shape)
    full[batch_dim] = index.shape[0]
    x = x.expand(full)
    if {dim, batch_dim} == {0, 1}:
        return _apply(_Take, x, index, dim)
    shape = list(full)
    shape[dim] = index.shape[1]
    where = index if batch_dim < dim else index.t()
    for d in range(x.ndim):
        if d not in (dim, batch_dim):
            where = where.unsqueeze(d)
    return x.gather(dim, where.expand(shape))


def put_tokens(
    x: Tensor, index: Tensor, tokens: Tensor, dim: int = 1, batch_dim: int = 0, place: Tensor | None = None
) -> Tensor:
    """Write each image's worked tokens back to their places; the others stay bit by bit as they were.

    Every token reads what it becomes, either its own worked form or itself: unlike a write to scattered places, this
    is fused with what made the worked tokens and with the norm of the next block.

    Args:
        x: All tokens, such as (B, N, C).
        index: Positions (B, n), each at most once.
        tokens: The tokens that stand there now, such as (B, n, C).
        dim: The token dimension of `x` and `tokens`.
        batch_dim: Their batch dimension.
        place: For each token where it stands in `index` (B, N), n or more if it does not; found if None.
    """
    if {dim, batch_dim} != {0, 1}:
        x, tokens = (t.movedim((batch_dim, dim), (0, 1)) for t in (x, tokens))
        return put_tokens(x, index, tokens, place=place).movedim((0, 1), (batch_dim, dim))
    if place is None:
        count = index.shape[1]
        place = torch.full((index.shape[0], x.shape[dim]), count, device=index.device)
        place = place.scatter(1, index, torch.arange(count, device=index.device).expand_as(index))
    return _apply(_Put, x, index, tokens.to(x.dtype), place, dim)


def _apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """Without the machinery for gradients where none is wanted: it takes longer than the tokens of one image."""
    return function.apply(*args) if torch.is_grad_enabled() else function.forward(*args)


class _Take(torch.autograd.Function):
    """Takes rows that are all different, so that the gradient is put back and need not be accumulated."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, index: Tensor, dim: int) -> Tensor:
        return _rows(x, index, dim)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, index, ctx.dim = inputs
        ctx.count = x.shape[ctx.dim]
        ctx.save_for_backward(index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (index,) = ctx.saved_tensors
        shape = list(grad.shape)
        shape[ctx.dim] = ctx.count
        return put_tokens(grad.new_zeros(shape), index, grad, ctx.dim, 1 - ctx.dim), None, None


class _Put(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, index: Tensor, tokens: Tensor, place: Tensor, dim: int) -> Tensor:
        count = index.shape[1]
        worked = _rows(tokens, place.clamp(max=count - 1), dim)
        works = (place < count).t() if dim == 0 else place < count
        return torch.where(works.reshape(*works.shape, *(1 for _ in x.shape[2:])), worked, x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, index, _, place, ctx.dim = inputs
        ctx.save_for_backward(index, place)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor, None, None]:
        index, place = ctx.saved_tensors
        worked = take_tokens(grad, index, ctx.dim, 1 - ctx.dim)
        return put_tokens(grad, index, torch.zeros_like(worked), ctx.dim, 1 - ctx.dim, place), None, worked, None, None


def _rows(x: Tensor, index: Tensor, dim: int) -> Tensor:
    """The entries of each image along `dim`, the other of the first two dimensions being the batch."""
    image = torch.arange(index.shape[0], device=index.device).unsqueeze(1)
    where = [image, index] if dim == 1 else [index.t(), image.t()]
    return torch.ops.aten._unsafe_index.Tensor(x, where)  # no check: it costs an assertion on a GPU


def take_rows(weight: Tensor, start: int, groups: int, stride: int, width: int) -> Tensor:
    """Rows `start + g * stride + w` of a weight or bias, such as one head's part after the other's."""
    if groups == 1:
        return weight.narrow(0, start, width)
    pattern = torch.arange(groups, device=weight.device).unsqueeze(1) * stride
    return weight[(start + pattern + torch.arange(width, device=weight.device)).reshape(-1)]


def mean_tokens(x: Tensor, prefix: tuple[int, ...], dim: int) -> Tensor:
    """The mean over the image tokens along `dim`, which stays as a dimension of one."""
    count = len(prefix)
    if prefix == tuple(range(count)):
        return x.narrow(dim, count, x.shape[dim] - count).mean(dim, keepdim=True)
    image = torch.tensor([p for p in range(x.shape[dim]) if p not in prefix], device=x.device)
    return x.index_select(dim, image).mean(dim, keepdim=True)
