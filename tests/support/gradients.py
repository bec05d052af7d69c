"""Gradients by the names of the parameters, and held to what a small step does."""

import pytest
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


def check_slopes(model: nn.Module, x: Tensor) -> None:
    """Hold the gradients of the parameters of a model in double precision to the slope of its summed squares."""
    parameters = list(model.parameters())
    steps = [1e-6 * torch.randn_like(p) for p in parameters]
    model(x).square().sum().backward()
    expected = sum(float((p.grad * step).sum()) for p, step in zip(parameters, steps, strict=True))
    sums = []
    with torch.no_grad():
        for sign in (1, -2):
            for p, step in zip(parameters, steps, strict=True):
                p += sign * step
            sums.append(float(model(x).square().sum()))
    assert (sums[0] - sums[1]) / 2 == pytest.approx(expected, rel=1e-5)
