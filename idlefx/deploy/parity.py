"""Whether another form of a converted model, compiled or packaged, gives what the eager one gives."""

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.fx.graph import _PyTreeCodeGen
from torch.utils._pytree import tree_leaves, tree_map_only, tree_unflatten

from idlefx.errors import InputError, ParityError
from idlefx.graph.queries import placeholders
from idlefx.graph.sizes import number
from idlefx.graph.state import buffers_kept
from idlefx.runtime.module import IdleModule, conversion_of

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 2e-2}
SWAY = 4  # times what one rounding of the inputs changes in the eager model
Inputs = tuple[tuple[Any, ...], dict[str, Any]]


def example_of(idle: fx.GraphModule, batch: int | None = None) -> Inputs:
    """Positional and keyword inputs such as the model was traced with: noise for images, ones for anything else.

    Where the batch is fixed, tensors of whole numbers are those of the example.

    Args:
        idle: A converted model.
        batch: How many images; by default the fewest that are no other size of an input too, as the compiler takes
            equal sizes for the same.

    Raises:
        InputError: Its graph was edited, and no longer holds the shapes of its inputs.
    """
    graph, noise = idle.graph, torch.Generator().manual_seed(0)
    home = next((t.device for t in [*idle.parameters(), *idle.buffers()]), torch.device("cpu"))
    values = [node.meta.get("val") for node in placeholders(graph)]
    numbers = conversion_of(idle).numbers if isinstance(idle, IdleModule) else {}
    if any(value is None for value in values):
        raise InputError("parity: this module no longer knows the shapes of its inputs; convert the model anew")
    others = {number(s, 0) for v in values if isinstance(v, torch.Tensor) for s in v.shape}
    batch = batch or next(size for size in range(2, len(others) + 3) if size not in others)
    made = []
    for holder, value in zip(placeholders(graph), values, strict=True):
        if holder.target in numbers:
            value = numbers[str(holder.target)].to(home)
        elif isinstance(value, torch.Tensor):
            shape = [number(size, batch) for size in value.shape]
            if value.dtype.is_floating_point:
                tensor = torch.randn(shape, generator=noise)
            elif value.dtype == torch.uint8:  # pixels: in an image of one colour all tokens would score alike
                tensor = torch.randint(256, shape, generator=noise)
            else:
                tensor = torch.ones(shape)
            value = tensor.to(home, value.dtype)
        made.append(value)
    assert isinstance(graph._codegen, _PyTreeCodeGen)
    args, kwargs = tree_unflatten(made, graph._codegen.pytree_info.in_spec)
    return tuple(args), dict(kwargs)


def check_parity(idle: fx.GraphModule, other: Callable[..., Any], what: str, inputs: Inputs | None = None) -> float:
    """Hold another form of a model against it, on one batch.

    Where rounding swaps two tokens that score alike, one image differs by more than rounding does; so it is the
    median image that counts. Where activations are quantised, a rounding decides between two of their few values, and
    may sway all that follows by as much as quantising does; so what it does to the eager model is allowed.

    Args:
        idle: The converted model, in eval mode, or a graph made of it.
        other: The form of it that is to be checked.
        what: What that form is called in the error.
        inputs: Positional and keyword inputs, batch first; noise by default.

    Returns:
        The largest relative difference of any output.

    Raises:
        ParityError: It is beyond the tolerance of the number type.
    """
    given = example_of(idle) if inputs is None else inputs
    wanted, found = (_outputs(idle, run, given) for run in (idle, other))
    largest = _largest_difference(wanted, found)
    for dtype, error in largest.items():
        if not error <= TOLERANCE[dtype]:
            again = _largest_difference(wanted, _outputs(idle, idle, given))
            if again[dtype] > TOLERANCE[dtype]:
                warnings.warn(
                    f"the {what} model cannot be checked, as the eager one differs from itself: it draws random "
                    "numbers in this mode",
                    stacklevel=3,
                )
                break
            swayed = _largest_difference(wanted, _outputs(idle, idle, _rounded(given)))
            if error <= SWAY * swayed[dtype]:
                continue
            raise ParityError(
                f"parity: the {what} model differs from the eager one by {error:.2g} on its example, where "
                f"{TOLERANCE[dtype]:g} is usual in {str(dtype).removeprefix('torch.')}; verify=False takes it "
                "as it is, but this is a fault: please report it with the model"
            )
    return max(largest.values(), default=0.0)


def _rounded(inputs: Inputs) -> Inputs:
    """The inputs, all fractions larger by one rounding."""

    def larger(tensor: torch.Tensor) -> torch.Tensor:
        return tensor * (1 + torch.finfo(tensor.dtype).eps) if tensor.is_floating_point() else tensor

    return tree_map_only(torch.Tensor, larger, inputs)


def _outputs(idle: fx.GraphModule, run: Callable[..., Any], inputs: Inputs) -> list[Any]:
    """What a form of the model gives, from the same buffers and inputs for all, which are left as they were."""
    args, kwargs = tree_map_only(torch.Tensor, torch.clone, inputs)
    with torch.no_grad(), buffers_kept(idle):
        return [leaf.clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in tree_leaves(run(*args, **kwargs))]


def _largest_difference(wanted: list[Any], found: list[Any]) -> dict[torch.dtype, float]:
    """The largest relative difference of any output, for each number type."""
    largest: dict[torch.dtype, float] = {}
    for a, b in zip(wanted, found, strict=True):
        if isinstance(a, torch.Tensor) and a.is_floating_point():
            before, error = largest.get(a.dtype, 0.0), _relative(a, b)
            largest[a.dtype] = before if error <= before or math.isnan(before) else error
    return largest


def _relative(wanted: torch.Tensor, found: torch.Tensor) -> float:
    a, b = (t.double().reshape(len(t), -1) if t.ndim else t.double().reshape(1, 1) for t in (wanted, found))
    return float(((a - b).norm(dim=1) / a.norm(dim=1).clamp_min(1e-12)).median())
