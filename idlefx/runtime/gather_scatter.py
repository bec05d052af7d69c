"""Take tokens out of the residual stream and put them back."""

from typing import Any

import torch
from torch import Tensor


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
        return with_gradient(_Take, x, index, dim)
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
    return with_gradient(_Put, x, index, tokens.to(x.dtype), place, dim)


def with_gradient(function: type[torch.autograd.Function], *args: Any) -> Any:
    """Apply a function with a backward of its own, and in eager mode with derivatives in forward mode.

    It goes without the machinery for gradients where none is wanted: that takes longer than the tokens of one image.
    """
    if not torch.is_grad_enabled():
        return function.forward(*args)
    return function.apply(*args) if torch.compiler.is_compiling() else IN_EAGER[function].apply(*args)


class _Take(torch.autograd.Function):
    """Takes rows that are all different, so that the gradient is put back and need not be accumulated."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, index: Tensor, dim: int) -> Tensor:
        return rows(x, index, dim)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, index, ctx.dim = inputs
        ctx.count = x.shape[ctx.dim]
        ctx.save_for_backward(index)
        ctx.save_for_forward(index)

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
        if _copies_rows(x):
            out = x.flatten(0, 1).index_copy(0, _rows_of(x, index, dim).flatten(), tokens.flatten(0, 1))
            return out.view_as(x)
        count = index.shape[1]
        worked = rows(tokens, place.clamp(max=count - 1), dim)
        works = (place < count).t() if dim == 0 else place < count
        return torch.where(works.reshape(*works.shape, *(1 for _ in x.shape[2:])), worked, x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, index, _, place, ctx.dim = inputs
        ctx.save_for_backward(index, place)
        ctx.save_for_forward(index, place)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor, None, None]:
        index, place = ctx.saved_tensors
        worked = take_tokens(grad, index, ctx.dim, 1 - ctx.dim)
        return put_tokens(grad, index, torch.zeros_like(worked), ctx.dim, 1 - ctx.dim, place), None, worked, None, None


class _TakeInEager(_Take):
    """With derivatives in forward mode, which torch.compile does not take."""

    @staticmethod
    def jvp(ctx: Any, x: Tensor, *_: Any) -> Tensor:
        (index,) = ctx.saved_tensors
        return take_tokens(x, index, ctx.dim, 1 - ctx.dim)


class _PutInEager(_Put):
    @staticmethod
    def jvp(ctx: Any, x: Tensor, index: Any, tokens: Tensor, *_: Any) -> Tensor:
        index, place = ctx.saved_tensors
        return put_tokens(x, index, tokens, ctx.dim, 1 - ctx.dim, place)


def rows(x: Tensor, index: Tensor, dim: int) -> Tensor:
    """The entries of each image along `dim`, the other of the first two dimensions being the batch."""
    if _copies_rows(x):
        numbers = _rows_of(x, index, dim)
        return x.flatten(0, 1).index_select(0, numbers.flatten()).unflatten(0, numbers.shape)
    image = torch.arange(index.shape[0], device=index.device).unsqueeze(1)
    where = [image, index] if dim == 1 else [index.t(), image.t()]
    return torch.ops.aten._unsafe_index.Tensor(x, where)  # no check: it costs an assertion on a GPU


def _copies_rows(x: Tensor) -> bool:
    """Whether whole rows are copied: in eager mode on a CPU several times as fast; a compiler fuses the other form."""
    traced = torch.compiler.is_compiling() or torch._C._is_tracing() or type(x) is not Tensor
    return x.device.type == "cpu" and x.is_contiguous() and not traced


def _rows_of(x: Tensor, index: Tensor, dim: int) -> Tensor:
    """The rows at which tokens stand, where the first two dimensions are one; in the order of these."""
    images = index.shape[0]
    if dim == 0:
        return index.t() * images + torch.arange(images)
    return index if images == 1 else index + (torch.arange(images) * x.shape[1]).unsqueeze(1)


IN_EAGER: dict[type[torch.autograd.Function], type[torch.autograd.Function]] = {
    _Take: _TakeInEager,
    _Put: _PutInEager,
}
