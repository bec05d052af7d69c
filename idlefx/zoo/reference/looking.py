"""Look at a model while it runs: where the tokens of its blocks stand, and which of them are prefix tokens."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only


@dataclass(frozen=True)
class Tokens:
    """The tokens of a block, and which of them are always kept.

    Attributes:
        prefix: The positions that no image flows into.
        class_token: The position of the class token, if there is one.
        dims: Where the tokens stand in the residual stream: on a grid in two dimensions, rows and columns; nowhere else
            than in front where it has no batch, (N, C).
        unit: Where attention is over windows, what idles: whole "windows", or "tokens" in each.
        inside: Whether the block itself makes windows of the stream before it begins, so that its tokens are numbered
            window by window.
        segments: Where attention is over segments of the sequence, how many tokens each has.
        joined: How many entries of the batch, one after another, are windows of one image that the attention joins.
    """

    prefix: tuple[int, ...]
    class_token: int | None
    dims: tuple[int, ...] = (1,)
    unit: str = ""
    inside: bool = False
    segments: tuple[int, ...] = ()
    joined: int = 1


def look(
    model: nn.Module,
    paths: Sequence[str],
    call: Callable[[], Any],
    grids: Mapping[str, tuple[int, ...]] = MappingProxyType({}),
    joins: Mapping[str, int] = MappingProxyType({}),
) -> dict[str, Tokens]:
    """Find prefix and class token by running the model on different images, and by gradients.

    Windows that a block joins have brought a class token each, of which none is the image's.

    Args:
        model: The dense model.
        paths: Module paths of its blocks, in order.
        call: Runs the model on a batch of different images.
        grids: For blocks whose tokens stand on a grid, the sizes of its sides.
        joins: For blocks that join windows of an image, which are entries of the batch, how many these are.
    """
    inputs: dict[str, Tensor] = {}
    streams: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for path in paths:

            def hook(module: nn.Module, args: Any, kwargs: Any, output: Any, path: str = path) -> None:
                inputs[path] = stream_of((args, kwargs), rank=2 + max(1, len(grids.get(path, ()))))
                streams[path] = stream_of(output, inputs[path].shape)

            stack.callback(model.get_submodule(path).register_forward_hook(hook, with_kwargs=True).remove)
        with torch.enable_grad():
            output = call()
    dims = {path: _token_dims(x, grids.get(path, ())) for path, x in inputs.items()}
    flat = {path: tokens_first(x, dims[path]) for path, x in inputs.items() if x.ndim == 2 + len(dims[path])}
    unmixed = _unmixed(model, inputs, call)
    prefixes: dict[str, tuple[int, ...]] = {}
    for path in flat:
        x = tokens_first(unmixed[path], dims[path])
        prefixes[path] = tuple((x == x[:1]).all(2).all(0).nonzero().flatten().tolist())
    leaves = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
    last = paths[-1]
    reads = [_read(leaf, streams[last], dims[last]) for leaf in leaves if last in flat]
    found = {path: replace(_tokens(prefixes[path], reads), dims=dims[path]) for path in flat}
    shapes = {path: tuple(inputs[path].shape[d] for d in dims[path]) for path in flat}
    found |= {path: _of_windows(found[path], windows, flat[path].shape[1]) for path, windows in joins.items()}
    return {path: replace(t, inside=shapes[path] != grids.get(path, shapes[path])) for path, t in found.items()}


def _of_windows(one: Tokens, windows: int, size: int) -> Tokens:
    """The tokens of so many windows of a size as one sequence; those of one window are told."""
    prefix = tuple(window * size + position for window in range(windows) for position in one.prefix)
    return replace(one, prefix=prefix, class_token=None, joined=windows)


@torch.no_grad()
def _unmixed(model: nn.Module, inputs: Mapping[str, Tensor], call: Callable[[], Any]) -> dict[str, Tensor]:
    """What enters each block if no block before it did anything, so that no image has flowed into a prefix token."""
    entered: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for path, like in inputs.items():

            def hook(
                module: nn.Module, args: Any, kwargs: Any, output: Any, path: str = path, like: Tensor = like
            ) -> Any:
                entered[path] = stream = stream_of((args, kwargs), like.shape)
                return tree_map_only(Tensor, lambda t: stream if t.shape == stream.shape else t, output)

            stack.callback(model.get_submodule(path).register_forward_hook(hook, with_kwargs=True).remove)
        call()
    return entered


def _token_dims(x: Tensor, grid: tuple[int, ...]) -> tuple[int, ...]:
    """Where the tokens stand: on a grid in dimensions of its sizes, next to each other, or of as many places."""
    count = len(grid)
    dims = [tuple(range(d, d + count)) for d in range(1, x.ndim - count + 1)] if grid else []
    same = [sides for sides in dims if tuple(x.shape[d] for d in sides) == grid]
    as_many = [sides for sides in dims if math.prod(x.shape[d] for d in sides) == math.prod(grid)]
    return (*same, *as_many, (1,))[0]


def tokens_first(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """A residual stream as (B, N, C)."""
    if not dims:
        return x[None]
    return x.movedim(dims, tuple(range(1, 1 + len(dims)))).flatten(1, len(dims))


def laid_out(tokens: Tensor, like: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Tokens (B, N, C) in the shape of a residual stream."""
    if not dims:
        return tokens[0]
    return tokens.unflatten(1, [like.shape[d] for d in dims]).movedim(tuple(range(1, 1 + len(dims))), dims)


@torch.enable_grad()
def _read(leaf: Tensor, stream: Tensor, dims: tuple[int, ...]) -> set[int]:
    """Positions of the stream that an output depends on."""
    if not leaf.requires_grad:
        return set()
    noise = torch.randn(leaf.shape, generator=torch.Generator().manual_seed(0))
    gradients = torch.autograd.grad((leaf * noise).sum(), stream, retain_graph=True, allow_unused=True)
    read = [tokens_first(gradient, dims).abs().sum((0, 2)) for gradient in gradients if gradient is not None]
    return {int(position) for sums in read for position in sums.nonzero()}


def _tokens(prefix: tuple[int, ...], reads: list[set[int]]) -> Tokens:
    if len(prefix) == 1:
        return Tokens(prefix, prefix[0])  # read or not
    alone = [min(read) for read in reads if read and read <= set(prefix)]
    some = any(read & set(prefix) for read in reads)
    return Tokens(prefix, min(alone) if alone else prefix[0] if some else None)


def stream_of(values: Any, shape: torch.Size | None = None, rank: int = 3) -> Tensor:
    """The residual stream among the inputs or outputs of a block: of that shape, unless the block pools its tokens."""
    tensors = [t for t in tree_leaves(values) if isinstance(t, Tensor)]
    return next(iter((*(t for t in tensors if t.shape == shape), *(t for t in tensors if t.ndim == rank), *tensors)))
