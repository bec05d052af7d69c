"""One training step, as the bench times it."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from idlefx.bench.timer import Run
from idlefx.capture.inputs import call

CUT_WEIGHT = 20.0  # as published


def training_step(
    model: nn.Module, run: Callable[..., Any], inputs: Any, amp: torch.dtype | None = None, cut: bool = False
) -> tuple[Run, list[Tensor]]:
    """A step that trains a model: forward, loss, backward, AdamW. The optimizer is not compiled.

    The task loss is the cross-entropy over the last dimension of the first output, against random classes.

    Args:
        model: Whose parameters are trained; put it in train mode first.
        run: The model, or its compiled form.
        inputs: A tensor, a tuple of positional or a dict of keyword inputs.
        amp: Number type of autocast for the forward pass; without it, that of the weights.
        cut: Whether the model returns `(output, cut_loss)`, which then is part of the loss.

    Returns:
        The step, and a list that holds what stays in memory between steps, once one was made.
    """
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights)
    device = weights[0].device
    resident: list[Tensor] = []

    def step() -> None:
        with torch.autocast(device.type, amp, enabled=amp is not None):
            output = call(run, inputs)
            output, penalty = output if cut else (output, 0.0)
            loss = _task_loss(output) + CUT_WEIGHT * penalty
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if not resident:
            states = list(optimizer.state.values())
            held = tree_leaves([*model.parameters(), *model.buffers(), inputs, states])
            resident.extend(t for t in held if isinstance(t, Tensor))

    return step, resident


def _task_loss(output: Any) -> Tensor:
    logits = next(t for t in tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point())
    rows = logits.flatten(0, -2)
    classes = torch.arange(rows.shape[0], device=rows.device) * 7919 % rows.shape[1]
    return F.cross_entropy(rows, classes)
