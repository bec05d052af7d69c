"""Choose, take and put: the only new tensor code that ends up in a graph."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import reduce
from operator import add, or_
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, linear

from idlefx.errors import first_line

try:
    from idlefx import fused
except Exception:  # no Triton, or a broken one
    fused = None  # type: ignore[assignment]

_fusing = fused is not None


@contextmanager
def plain() -> Iterator[None]:
    """Use no kernels meanwhile, for programs that run where there is neither idlefx nor Triton."""
    global _fusing
    before, _fusing = _fusing, False
    try:
        yield
    finally:
        _fusing = before


def choose_tokens(
    scores: Tensor, prefix: tuple[int, ...], kept: int, among: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Choose the tokens that work: the prefix and the highest scores.

    Args:
        scores: A score per token (B, N); those of the prefix are not looked at.
        prefix: Positions of the P prefix tokens.
        kept: K, how many image tokens work. A tie goes to the lower position.
        among: Positions (B, n) of the prefix tokens and of at least K image tokens to choose from; all if None.

    Returns:
        Positions (B, P + K) of those that work, ascending; and for each token where it stands, first those that work
        and then those that idle (B, N).
    """
    if _runs_kernels(scores) and scores.shape[1] <= fused.MOST_TOKENS:
        try:
            return choose_tokens_in_one(scores, prefix, kept, among)
        except Exception as error:
            _do_without(error)
    if among is not None:
        scores = _ranks(scores, among)
    # Everything is a sort, a scan or pointwise over whole rows, so that a compiler makes one kernel of it.
    order, count = _descending(scores), scores.shape[1]
    fixed = _are_prefix(order, prefix)
    works = fixed | ((1 - fixed.to(order.dtype)).cumsum(1) <= kept)
    order = torch.where(works, order, order + count).sort(dim=1).values
    return order.narrow(1, 0, len(prefix) + kept), (order % count).argsort(dim=1)


def choose_tokens_in_one(
    scores: Tensor, prefix: tuple[int, ...], kept: int, among: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The same as `choose_tokens`, in one kernel of a GPU."""
    role = None if among is None and _leads(prefix) else _roles(scores, prefix, among)
    found: tuple[Tensor, Tensor] = torch.ops.idlefx.choose_tokens(
        scores.detach(), role, len(prefix), kept, len(prefix) + kept
    )
    return found


def norm_linear(
    addends: list[Tensor],
    position: int,
    dim: int,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    epsilon: float,
    weight: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """A linear layer of the layer norm of one token per image.

    Args:
        addends: One or two tensors (B, n, C), or (n, B, C), that the tokens are the sum of.
        position: Where the token stands in all of them.
        dim: Their token dimension, 0 or 1.
        norm_weight: Scale of the norm (C).
        norm_bias: Its shift (C).
        epsilon: What it adds to the variance.
        weight: Of the linear layer (D, C).
        bias: Its bias (D).

    Returns:
        The layer's output (B, D).
    """
    infers = not (torch.is_grad_enabled() or torch.is_autocast_enabled(weight.device.type))
    if infers and norm_weight is not None and _runs_kernels(weight):
        needed = [t for t in (*addends, norm_weight, norm_bias, weight, bias) if t is not None]
        if all(t.dtype == weight.dtype and t.stride(-1) == 1 for t in needed):
            given = (addends, position, dim, norm_weight, norm_bias, epsilon, weight, bias)
            try:
                out: Tensor = torch.ops.idlefx.norm_linear(*given)
                return out
            except Exception as error:
                _do_without(error)
    x = reduce(add, (part.select(dim, position) for part in addends))
    return linear(layer_norm(x, x.shape[-1:], norm_weight, norm_bias, epsilon), weight, bias)


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


def _runs_kernels(x: Tensor) -> bool:
    fits = _fusing and x.is_cuda and x.dtype in (torch.float32, torch.bfloat16, torch.float16)
    return fits and torch.cuda.get_device_properties(x.device).major >= 8  # older ones have no bfloat16


def _do_without(error: Exception) -> None:
    """Use no kernels from now on where Triton cannot build them, as without a C compiler."""
    global _fusing
    if isinstance(error, torch.OutOfMemoryError):
        raise error
    _fusing = False
    reason = first_line(error)
    warnings.warn(f"ops: Triton cannot run here, so plain operations do its work, slower: {reason}", stacklevel=3)


def _leads(prefix: tuple[int, ...]) -> bool:
    return prefix == tuple(range(len(prefix)))


def _roles(scores: Tensor, prefix: tuple[int, ...], among: Tensor | None) -> Tensor:
    """For each token whether it never works (0), may work (1) or always works (2), (B, N)."""
    free = torch.zeros_like(scores, dtype=torch.int8)
    free = free + 1 if among is None else free.scatter(1, among, 1)
    return torch.where(_are_prefix(torch.arange(scores.shape[1], device=scores.device), prefix), 2, free)


def _are_prefix(positions: Tensor, prefix: tuple[int, ...]) -> Tensor:
    if _leads(prefix):
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
    if _leads(prefix):
        return x.narrow(dim, count, x.shape[dim] - count).mean(dim, keepdim=True)
    image = torch.tensor([p for p in range(x.shape[dim]) if p not in prefix], device=x.device)
    return x.index_select(dim, image).mean(dim, keepdim=True)
