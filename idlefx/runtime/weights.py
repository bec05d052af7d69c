"""Tell whether weights are still those that a model was converted with."""

import torch
from torch import nn


def sample(module: nn.Module) -> tuple[float, ...]:
    """One number of every parameter: training changes some of them, moving to a device none."""
    parameters = [p.detach() for _, p in sorted(module.named_parameters()) if p.numel() and p.is_floating_point()]
    parameters = [p for p in parameters if type(p) is torch.Tensor]  # those of other kinds are quantised
    middle = [p.reshape(-1)[p.numel() // 2].float() for p in parameters]
    return tuple(torch.stack([number.cpu() for number in middle]).tolist()) if middle else ()


def unchanged(module: nn.Module, before: tuple[float, ...]) -> bool:
    """Whether the sampled weights are what they were, up to a rounding to half precision.

    Args:
        module: The model.
        before: What `sample` told of it.
    """
    now = sample(module)
    half = any(p.dtype in (torch.float16, torch.bfloat16) for p in module.parameters())
    if not half:
        return now == before
    return len(now) == len(before) and all(abs(a - b) <= abs(b) / 128 for a, b in zip(now, before, strict=True))
