"""Score and choose tokens: the new tensor code that ends up in a graph, besides `transfer`."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import reduce
from importlib import import_module
from operator import add, or_
from subprocess import CalledProcessError
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, linear

from idlefx.errors import first_line

triton_ops: Any = None  # the operators with Triton kernels, once they are loaded
_fusing = False
_without_kernels: tuple[int | None, ...] = ()  # devices, by index, for which Triton could not build them
BUILD_ERRORS = (ImportError, OSError, RuntimeError, CalledProcessError)


def load_kernels() -> None:
    """Load the operators with Triton kernels, where Triton is installed.

    On a machine with a GPU this happens by itself. Elsewhere nothing runs them, and they take longer to load than
    torch, as Inductor comes with them.
    """
    global triton_ops, _fusing
    with suppress(ImportError):  # torch for CPUs comes without Triton
        triton_ops = import_module("idlefx.runtime.triton_ops")
        _fusing = True


if torch.cuda.is_available():
    load_kernels()


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
    if runs_kernels(scores) and scores.shape[1] <= triton_ops.MOST_TOKENS:
        try:
            return choose_tokens_in_one(scores, prefix, kept, among)
        except BUILD_ERRORS as error:
            do_without(scores.device, error)
    if among is not None:
        scores = rank_among(scores, among)
    # Everything is a sort, a scan or pointwise over whole rows, so that a compiler makes one kernel of it.
    order, count = descending(scores), scores.shape[1]
    fixed = are_prefix(order, prefix)
    works = fixed | ((1 - fixed.to(order.dtype)).cumsum(1) <= kept)
    order = torch.where(works, order, order + count).sort(dim=1).values
    return order.narrow(1, 0, len(prefix) + kept), (order % count).argsort(dim=1)


def choose_tokens_in_one(
    scores: Tensor, prefix: tuple[int, ...], kept: int, among: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The same as `choose_tokens`, in one kernel of a GPU."""
    role = None if among is None and leads(prefix) else _roles(scores, prefix, among)
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
    if infers and norm_weight is not None and runs_kernels(weight):
        needed = [t for t in (*addends, norm_weight, norm_bias, weight, bias) if t is not None]
        if all(t.dtype == weight.dtype and t.stride(-1) == 1 for t in needed):
            given = (addends, position, dim, norm_weight, norm_bias, epsilon, weight, bias)
            try:
                out: Tensor = torch.ops.idlefx.norm_linear(*given)
                return out
            except BUILD_ERRORS as error:
                do_without(weight.device, error)
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


def sum_over_heads(query: Tensor, keys: Tensor) -> Tensor:
    """Raw logits (B, N) of one query (B, H, 1, D) on keys (B, H, N, D), summed over heads."""
    return (query @ keys.transpose(-1, -2)).sum(dim=1).squeeze(1)


def mean_over_heads(sums: list[Tensor], heads: int) -> Tensor:
    """The mean over heads of scores (B, N), of which there is the sum over the heads of each attention."""
    return reduce(add, sums) / heads


def runs_kernels(x: Tensor) -> bool:
    """Whether the kernels of Triton can serve a tensor."""
    fits = _fusing and x.is_cuda and x.dtype in (torch.float32, torch.bfloat16, torch.float16)
    able = fits and torch.cuda.get_device_properties(x.device).major >= 8  # older ones have no bfloat16
    return able and x.device.index not in _without_kernels


def do_without(device: torch.device, error: Exception) -> None:
    """Use no kernels on this device from now on, as Triton cannot build them; a fault of a kernel itself is raised."""
    global _without_kernels
    if isinstance(error, RuntimeError) and "compiler" not in str(error):
        raise error
    _without_kernels = (*_without_kernels, device.index)
    words = f"ops: Triton cannot build kernels for {device}, so plain operations do their work, slower"
    warnings.warn(f"{words}: {first_line(error)}", stacklevel=3)


def leads(prefix: tuple[int, ...]) -> bool:
    """Whether prefix tokens stand in front of all others."""
    return prefix == tuple(range(len(prefix)))


def _roles(scores: Tensor, prefix: tuple[int, ...], among: Tensor | None) -> Tensor:
    """For each token whether it never works (0), may work (1) or always works (2), (B, N)."""
    free = torch.zeros_like(scores, dtype=torch.int8)
    free = free + 1 if among is None else free.scatter(1, among, 1)
    return torch.where(are_prefix(torch.arange(scores.shape[1], device=scores.device), prefix), 2, free)


def are_prefix(positions: Tensor, prefix: tuple[int, ...]) -> Tensor:
    """Which positions are those of prefix tokens."""
    if leads(prefix):
        return positions < len(prefix)
    return reduce(or_, (positions == p for p in prefix))


def descending(scores: Tensor) -> Tensor:
    """Positions (B, N) in the order of falling scores, of equal ones the lower position first."""
    if torch.onnx.is_in_onnx_export():  # ONNX has no stable sort, but its TopK gives ties to the lower position
        return scores.topk(scores.shape[1], dim=1).indices
    return scores.argsort(dim=1, descending=True, stable=True)


def rank_among(scores: Tensor, among: Tensor) -> Tensor:
    """Scores that order as before, those of tokens to choose from above all others, whatever they were."""
    rank = descending(scores).argsort(dim=1)
    allowed = torch.zeros_like(rank).scatter(1, among, scores.shape[1])
    return allowed - rank


def size_of(x: Tensor, dim: int) -> int:
    """A size, as Python asks for it: `torch.ops.aten.sym_size` is unknown to `torch.vmap`."""
    return x.shape[dim]


def fixed_tokens(x: Tensor, positions: tuple[int, ...], batch_dim: int | None = 0) -> Tensor:
    """The same positions for every image of a batch (B, len(positions)); for one image where it has no dimension."""
    return torch.tensor(positions, device=x.device).expand(1 if batch_dim is None else x.shape[batch_dim], -1)


def take_rows(weight: Tensor, start: int, groups: int, stride: int, width: int) -> Tensor:
    """Rows `start + g * stride + w` of a weight or bias, such as one head's part after the other's."""
    if groups == 1:
        return weight.narrow(0, start, width)
    pattern = torch.arange(groups, device=weight.device).unsqueeze(1) * stride
    return weight[(start + pattern + torch.arange(width, device=weight.device)).reshape(-1)]


def mean_tokens(x: Tensor, prefix: tuple[int, ...], dim: int) -> Tensor:
    """The mean over the image tokens along `dim`, which stays as a dimension of one."""
    count = len(prefix)
    if leads(prefix):
        return x.narrow(dim, count, x.shape[dim] - count).mean(dim, keepdim=True)
    image = torch.tensor([p for p in range(x.shape[dim]) if p not in prefix], device=x.device)
    return x.index_select(dim, image).mean(dim, keepdim=True)
