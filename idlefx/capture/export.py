"""Capture: a module and example inputs become an ATen graph whose batch is free."""

import contextlib
import copy
import inspect as pyinspect
import logging
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves, tree_map_only

from idlefx.capture.arrays import built_in, holds_arrays, whole_numbers, without_arrays
from idlefx.capture.cleanup import tidy
from idlefx.capture.custom_gradients import without_backward_hooks
from idlefx.capture.inputs import guess_inputs, known_facts
from idlefx.capture.loss_function import loss_function
from idlefx.capture.modes import Modes
from idlefx.capture.observation import Args, explain, observe, reassigns_buffers
from idlefx.capture.stack_traces import every_line_of_the_model
from idlefx.capture.wrappers import unwrapped
from idlefx.errors import IdleFxError, InputError
from idlefx.graph.sizes import follows_batch
from idlefx.graph.state import computed, has_gradient_hooks, keeps_more
from idlefx.records import ModelFacts
from idlefx.runtime.labels import Loss


@dataclass(frozen=True)
class Captured:
    """A traced model.

    Attributes:
        model: The user's module, out of what it was wrapped in.
        eval_graph: What the model does in eval mode.
        train_graph: What it does in train mode; the same object where the mode makes no difference.
        training: The mode the model was in.
        facts: What is known of its images and classes; the image size is that of the example.
        batch_free: Whether the batch size is free.
        custom_gradient: What has gradients of its own, which the graphs do not have; empty if nothing has.
        loss: What computes the loss of calls with labels, if the trace has none and the model such a function.
        arrays: Numpy arrays of the example by argument, which the trace has built in.
        numbers: Tensors of whole numbers in the example by argument, where its batch is the only one.
    """

    model: nn.Module
    eval_graph: fx.GraphModule
    train_graph: fx.GraphModule
    training: bool
    facts: ModelFacts
    batch_free: bool
    custom_gradient: str = ""
    loss: Loss | None = None
    arrays: Mapping[str, Any] = field(default_factory=dict)
    numbers: Mapping[str, torch.Tensor] = field(default_factory=dict)


def capture(model: nn.Module, example_inputs: Any = None, *, copy_model: bool = True) -> Captured:
    """Trace a model in eval mode, and in train mode too where that differs.

    Args:
        model: Any module, also inside `torch.compile` or a data parallel wrapper; it stays in the mode it is in.
        example_inputs: A tensor, a tuple of positional or a dict of keyword inputs; guessed if missing.
        copy_model: Trace a deep copy, so that nothing is shared with the model.

    Raises:
        InputError: Weights or example inputs that cannot be run.
        CaptureError: torch.export cannot trace the model.
    """
    model = unwrapped(model)
    _check_weights(model)
    with _everything_visible():
        return _capture(model, example_inputs, copy_model)


@contextlib.contextmanager
def _everything_visible() -> Iterator[None]:
    """Whatever mode the caller is in: gradients as in training, and no fused operation in place of attention.

    The fast path of torch's encoder layers and attention modules is one operation for a whole layer.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _capture(model: nn.Module, example_inputs: Any, copy_model: bool) -> Captured:
    inputs, facts = _normal_inputs(model, example_inputs)
    if parts := keeps_more(model):
        names = ", ".join(f"`{name}`" if name else "the model itself" for name in parts)
        warnings.warn(
            f"{names}: extra state and hooks of state_dict are not taken over; the converted model's state_dict holds "
            "parameters and buffers alone, so load and save those of the model itself where they matter",
            stacklevel=4,
        )
    if copy_model and (hooked := [name for name, p in model.named_parameters() if has_gradient_hooks(p)]):
        names = ", ".join(f"`{name}`" for name in hooked[:3]) + (f" and {len(hooked) - 3} more" if hooked[3:] else "")
        warnings.warn(
            f"{names}: hooks on gradients of parameters are not taken over; register them on those of the converted "
            "model, or convert with copy=False, which keeps the parameters themselves",
            stacklevel=4,
        )
    inputs = tree_map_only(torch.Tensor, torch.clone, inputs)  # what inference_mode made cannot be computed with here
    inputs, arrays = without_arrays(model, inputs)
    target = copy.deepcopy(model, computed(model)) if copy_model else model
    modes = Modes(target)
    with built_in(target, arrays):
        try:
            eval_graph, batch_free = _trace(modes.switch(False), inputs, fixed=bool(arrays))
            train_graph, loss = eval_graph, loss_function(target, inputs)
            mode_matters, custom = observe(modes, inputs)
            if mode_matters:
                train_graph, train_free = _trace(modes.switch(True), inputs, fixed=bool(arrays))
                batch_free = batch_free and train_free
        finally:
            modes.restore()
    if arrays:
        names = ", ".join(f"`{name}`" for name in arrays)
        warnings.warn(
            f"{names}: the numbers of arrays are built in, and with them all sizes of the example; the result takes no "
            "others",
            stacklevel=4,
        )
    elif not batch_free:
        warnings.warn("the model's own code fixes the batch size; the result takes the example's only", stacklevel=4)
    numbers = {} if batch_free else whole_numbers(model, inputs)
    return Captured(model, eval_graph, train_graph, modes.training, facts, batch_free, custom, loss, arrays, numbers)


def _check_weights(model: nn.Module) -> None:
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if is_lazy(tensor):
            raise InputError(f"capture: `{name}` is lazy and has no shape yet; run the model once, then convert it")
        if tensor.is_meta:
            raise InputError(f"capture: `{name}` is on the meta device and has no values; load its weights first")


def _normal_inputs(model: nn.Module, example: Any) -> tuple[Args, ModelFacts]:
    if example is None:
        example = guess_inputs(model)[0]
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(example, torch.Tensor):
        args = (example,)
    elif isinstance(example, Mapping):
        kwargs = dict(example)
    elif isinstance(example, (tuple, list)):
        args = tuple(example)
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor) and t.ndim]
    if not tensors:
        raise InputError(
            "capture: example_inputs holds no tensor with a batch; give a tensor, a tuple of positional or a dict "
            f"of keyword inputs (got {type(example).__name__})"
        )
    home = next((t.device for t in [*model.parameters(), *model.buffers()]), tensors[0].device)
    for tensor in tensors:
        if tensor.device != home:
            raise InputError(
                f"capture: an example input is on {tensor.device}, the model on {home}; move one to the other"
            )
    image = max(tensors, key=lambda t: t.numel())
    if image.shape[0] == 1 and not holds_arrays((args, kwargs)):  # torch.export treats a size of one as a constant
        doubled = lambda t: torch.cat([t, t]) if t.ndim and t.shape[0] == 1 else t  # noqa: E731
        args, kwargs = tree_map_only(torch.Tensor, doubled, (args, kwargs))
    size = tuple(image.shape[1:])
    return (args, kwargs), known_facts(model, size)


def _trace(model: nn.Module, inputs: Args, *, fixed: bool) -> tuple[fx.GraphModule, bool]:
    """The graph and whether its batch is free; strict tracing keeps `len(x)` free where the other does not.

    But it loses, without a word, that a buffer is replaced.

    Args:
        model: The model, in a mode.
        inputs: The example.
        fixed: Whether something that is built in fixes the batch: a trace need not notice.
    """
    failures: list[Exception] = []
    for strict, batch_free in ((False, True), (True, True), (False, False))[2 if fixed else 0 :]:
        # A failed attempt leaves the tensors it was given marked as dynamic: each gets its own.
        args, kwargs = tree_map_only(torch.Tensor, torch.clone, inputs)
        shapes = _free_batch(model, inputs) if batch_free else None
        try:
            if strict and reassigns_buffers(model, inputs):
                continue
            with quiet(), every_line_of_the_model(), without_backward_hooks(model):
                program = torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=strict)
                if not (batch_free and _has_fixed_lengths(program.graph)):
                    return tidy(program.module(check_guards=False), model), batch_free
        except IdleFxError:
            raise
        except Exception as error:  # torch.export raises many kinds; the first is the one to report
            failures.append(error)
    raise explain(model, inputs, failures[0])


def _has_fixed_lengths(graph: fx.Graph) -> bool:
    """Whether something is split into pieces of fixed lengths that the trace takes to be of any length.

    So it is with images that are packed into one sequence, and no other sequence can be split like that.
    """
    for node in graph.nodes:
        if node.target is torch.ops.aten.split_with_sizes.default:
            size = node.args[0].meta["val"].shape[node.args[2] if len(node.args) > 2 else 0]
            if follows_batch(size) and not any(isinstance(length, fx.Node) for length in node.args[1]):
                return True
    return False


def _free_batch(model: nn.Module, inputs: Args) -> dict[str, Any]:
    args, kwargs = inputs
    tensors = [t for t in tree_leaves(inputs) if isinstance(t, torch.Tensor) and t.ndim]
    batch = max(tensors, key=lambda t: t.numel()).shape[0]

    def free(leaf: Any) -> Any:
        has_batch = isinstance(leaf, torch.Tensor) and leaf.ndim and leaf.shape[0] == batch
        return {0: torch.export.Dim.DYNAMIC} if has_batch else None

    bound = pyinspect.signature(model.forward).bind(*args, **kwargs)
    return {name: torch.utils._pytree.tree_map(free, value) for name, value in bound.arguments.items()}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence torch's own logs: what went wrong is said once, in our words."""
    previous = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)
