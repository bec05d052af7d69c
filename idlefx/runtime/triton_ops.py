"""Operators that launch Triton kernels, which `torch.compile` sees through; Triton comes with torch for GPUs only."""

from collections.abc import Sequence

import torch
import triton
from torch import Tensor
from torch.library import triton_op, wrap_triton

from idlefx.runtime.triton_kernels import average_kernel, choose_kernel, nearest_kernel, norm_linear_kernel

MOST_TOKENS = 16384  # one program holds the scores of an image
IMAGES, FEATURES, OUTPUTS = 16, 64, 32  # what a program of `norm_linear` holds at a time
ROWS, OTHERS = 16, 32  # how many tokens a program of the kernels of groups compares or adds up with how many


@triton_op("idlefx::choose_tokens", mutates_args=())
def choose_tokens(scores: Tensor, role: Tensor | None, leading: int, kept: int, working: int) -> tuple[Tensor, Tensor]:
    """See `ops.choose_tokens`.

    Args:
        scores: A score per token (B, N), floating point numbers of at most 32 bits.
        role: Whether a token never works (0), may work (1) or always works (2), (B, N) of int8; if None, the leading
            tokens always work and all others may.
        leading: How many leading tokens always work.
        kept: K, how many of those that may work do.
        working: How many work in all.

    Returns:
        Positions (B, working) and places (B, N).
    """
    images, tokens = scores.shape
    scores, role = scores.contiguous(), None if role is None else role.contiguous()
    index = torch.empty((images, working), dtype=torch.int64, device=scores.device)
    place = torch.empty((images, tokens), dtype=torch.int64, device=scores.device)
    block = triton.next_power_of_2(tokens)
    with torch.cuda.device_of(scores):  # Triton launches on the current device, wherever the tensors are
        wrap_triton(choose_kernel)[(images,)](
            scores, role, index, place, tokens, leading, kept, working, BLOCK=block,
            num_warps=min(8, max(1, block // 512)),
        )  # fmt: skip
    return index, place


@triton_op("idlefx::norm_linear", mutates_args=())
def norm_linear(
    addends: Sequence[Tensor], position: int, dim: int, norm_weight: Tensor, norm_bias: Tensor | None, epsilon: float,
    weight: Tensor, bias: Tensor | None,
) -> Tensor:  # fmt: skip
    """See `ops.norm_linear`; all tensors are of one type, and their features lie in order."""
    x, residual = addends[0], addends[1] if len(addends) > 1 else None
    steps = (0, 0) if residual is None else (residual.stride(dim), residual.stride(1 - dim))
    images, (outputs, width) = x.shape[1 - dim], weight.shape
    out = torch.empty((images, outputs), dtype=x.dtype, device=x.device)
    block = triton.next_power_of_2(width)
    # The whole tensors are handed over: a compiler makes copies of parts.
    with torch.cuda.device_of(x):
        wrap_triton(norm_linear_kernel)[(triton.cdiv(images, IMAGES), triton.cdiv(outputs, OUTPUTS))](
            x, residual, norm_weight, norm_bias, weight, bias, out, images, outputs,
            position * x.stride(dim), position * steps[0], x.stride(1 - dim), steps[1], weight.stride(0), epsilon,
            WIDTH=width, BLOCK=block, IMAGES=IMAGES, FEATURES=FEATURES, OUTPUTS=OUTPUTS,
            num_warps=4 if block <= 512 else 8,
        )  # fmt: skip
    return out


@triton_op("idlefx::likeness_to_anchors", mutates_args=())
def likeness_to_anchors(unit: Tensor, leading: int, bound: int, back: int, modulus: int) -> Tensor:
    """See `nearest.likeness_to_anchors`; the prefix tokens lead, and tokens are of 32 bits."""
    images, tokens, width = unit.shape
    unit = unit.contiguous()
    cosine = torch.empty((images, tokens), dtype=unit.dtype, device=unit.device)
    with torch.cuda.device_of(unit):
        wrap_triton(nearest_kernel)[(images, triton.cdiv(tokens, ROWS))](
            unit, None, cosine, None, None, tokens, tokens, bound, leading, back, modulus,
            WIDTH=width, ROWS=ROWS, OTHERS=OTHERS, FEATURES=FEATURES, num_warps=4,
        )  # fmt: skip
    return cosine


@triton_op("idlefx::nearest_workers", mutates_args=())
def nearest_workers(unit: Tensor, order: Tensor, working: int, leading: int) -> tuple[Tensor, Tensor]:
    """See `nearest.nearest_workers`; the prefix tokens lead, and tokens are of 32 bits."""
    images, tokens, width = unit.shape
    unit, order = unit.contiguous(), order.contiguous()
    leaders = torch.empty((images, tokens - working), dtype=torch.int64, device=unit.device)
    place = torch.empty((images, tokens), dtype=torch.int64, device=unit.device)
    with torch.cuda.device_of(unit):
        wrap_triton(nearest_kernel)[(images, triton.cdiv(tokens - working, ROWS))](
            unit, order, None, leaders, place, tokens, tokens - working, working, leading, 1, 1,
            WIDTH=width, ROWS=ROWS, OTHERS=OTHERS, FEATURES=FEATURES, num_warps=4,
        )  # fmt: skip
    return leaders, place


@triton_op("idlefx::average_groups", mutates_args=())
def average_groups(x: Tensor, order: Tensor, leaders: Tensor, stand_for: Tensor | None) -> tuple[Tensor, Tensor]:
    """See `following.average_groups`; tokens are (B, N, C), in any order in memory.

    Returns:
        Means (B, W, C) and sizes (B, W).
    """
    order, leaders = order.contiguous(), leaders.contiguous()
    stand_for = None if stand_for is None else stand_for.contiguous()
    (images, tokens, width), idle = x.shape, leaders.shape[1]
    working = tokens - idle
    means = torch.empty((images, working, width), dtype=x.dtype, device=x.device)
    sizes = torch.empty((images, working), dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        wrap_triton(average_kernel)[(images, triton.cdiv(working, ROWS), triton.cdiv(width, FEATURES))](
            x, stand_for, order, leaders, means, sizes, *x.stride(), working, idle,
            WIDTH=width, ROWS=ROWS, OTHERS=OTHERS, FEATURES=FEATURES, num_warps=4,
        )  # fmt: skip
    return means, sizes
