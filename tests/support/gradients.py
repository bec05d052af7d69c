"""Gradients by the names of the parameters."""

import torch
from torch import Tensor, nn


def of_squares(module: nn.Module, output: Tensor) -> dict[str, Tensor | None]:
    """Those of the mean square of an output, None where there is none."""
    names, parameters = zip(*module.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(output.square().mean(), parameters, allow_unused=True), strict=True))


def of_value(module: nn.Module, value: Tensor, *, retain_graph: bool = True) -> dict[str, Tensor]:
    """Those of a scalar, zeros where there is none; the graph stays for more, which compiled code may not bear."""
    named = dict(module.named_parameters(remove_duplicate=False))
    options = {"retain_graph": retain_graph, "allow_unused": True, "materialize_grads": True}
    return dict(zip(named, torch.autograd.grad(value, list(named.values()), **options), strict=True))
