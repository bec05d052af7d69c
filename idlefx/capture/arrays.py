"""Numbers among the inputs of a model, such as the lengths of packed images and the order of their patches.

Those of numpy arrays are built into a trace. Those of tensors stay inputs; but where the sizes are fixed, only the
example's may fit, so checks of parity use these.
"""

import copy
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from idlefx.capture.observation import Args
from idlefx.errors import InputError


def without_arrays(model: nn.Module, inputs: Args) -> tuple[Args, dict[str, Any]]:
    """The inputs that a graph takes, and copies of the arrays by argument.

    Args:
        model: The model.
        inputs: Positional and keyword inputs.

    Raises:
        InputError: An array has no argument of its own.
    """
    args, kwargs = inputs
    first = next((place for place, value in enumerate(args) if _is_array(value)), len(args))
    # Behind an array that is taken away, an argument has no longer its place, and needs a name.
    behind = list(inspect.signature(model.forward).parameters.values())[first : len(args)]
    if len(behind) == len(args) - first and all(each.kind is each.POSITIONAL_OR_KEYWORD for each in behind):
        kwargs = {**{each.name: value for each, value in zip(behind, args[first:], strict=True)}, **kwargs}
        args = args[:first]
    arrays = {name: copy.deepcopy(value) for name, value in kwargs.items() if _is_array(value)}
    inputs = args, {name: value for name, value in kwargs.items() if name not in arrays}
    if holds_arrays(inputs):
        raise InputError("capture: a numpy array among the example inputs has no argument of its own; give it by name")
    return inputs, arrays


def holds_arrays(inputs: Args) -> bool:
    """Whether there is an array among inputs, so that all sizes are those of the example."""
    return any(map(_is_array, tree_leaves(inputs)))


def whole_numbers(model: nn.Module, inputs: Args) -> dict[str, torch.Tensor]:
    """Tensors of whole numbers, by argument."""
    args, kwargs = inputs
    named = {**dict(zip(inspect.signature(model.forward).parameters, args, strict=False)), **kwargs}
    return {
        name: value
        for name, value in named.items()
        if isinstance(value, torch.Tensor) and value.dtype in (torch.int32, torch.int64)
    }


@contextmanager
def built_in(model: nn.Module, arrays: Mapping[str, Any]) -> Iterator[None]:
    """Let a model be called without its arrays meanwhile, as its forward takes them from here."""
    if not arrays:
        yield
        return
    own, before = model.forward, model.__dict__.get("forward")
    signature = inspect.signature(own)

    def forward(*args: Any, **kwargs: Any) -> Any:
        return own(*args, **kwargs, **copy.deepcopy(arrays))  # which a model may write into

    left = [each for name, each in signature.parameters.items() if name not in arrays]
    forward.__signature__ = signature.replace(parameters=left)  # type: ignore[attr-defined]
    model.forward = forward
    try:
        yield
    finally:
        del model.forward
        if before is not None:
            model.forward = before


def _is_array(value: Any) -> bool:
    kinds = {f"{kind.__module__}.{kind.__name__}" for kind in type(value).__mro__}
    return not kinds.isdisjoint(("numpy.ndarray", "numpy.generic"))
