"""Inductor: compiled forms of a converted model."""

from typing import Any

import torch

from idlefx.module import IdleModule
from idlefx.parity import check_parity


def compile(idle: IdleModule, *, verify: bool = True, dynamic: bool | None = True, **options: Any) -> Any:
    """Compile a converted model with Inductor: as one graph, once for all batch sizes but one.

    Args:
        idle: A converted model, in the mode in which it will be used; it shares its parameters with the result.
        verify: Whether to hold the compiled model against the eager one once, now, which compiles it. Only in eval
            mode: training draws random numbers.
        dynamic: Whether the batch is free; torch compiles a batch of one image anew. False compiles every batch
            size anew, which is a little faster where there are few.
        **options: As `torch.compile` takes them, such as `mode="max-autotune"`.

    Returns:
        A module that is called like `idle`.

    Raises:
        PassError: The compiled model does not compute what the eager one does.
    """
    compiled = torch.compile(idle, fullgraph=True, dynamic=dynamic, **options)
    if verify and not idle.training:
        check_parity(idle, compiled, "compiled")
    return compiled
