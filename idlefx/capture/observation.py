"""Run a model to see what it does: in train and in eval mode, with gradients, and why it fails where it does."""

import traceback
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.fx.node import map_aggregate
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from idlefx.capture.custom_gradients import custom_gradient
from idlefx.capture.modes import Modes, checkpoints_seen
from idlefx.errors import CaptureError, IdleFxError, InputError, first_line
from idlefx.utils.source_lines import innermost

Args = tuple[tuple[Any, ...], dict[str, Any]]
_PLAIN_NUMBERS = (
    "; sizes that a tensor tells, such as lengths of packed images, must be plain numbers: compute them before the "
    "call and give them as numpy arrays, which fixes the sizes of the images"
)


def observe(modes: Modes, inputs: Args) -> tuple[bool, str]:
    """Whether train and eval mode run different operations, and what has gradients of its own, by running both.

    What gets lost is warned of.
    """
    with checkpoints_seen() as lines:
        calls = {training: _watched_call(modes.switch(training), inputs) for training in (False, True)}
    if lines:
        warnings.warn(
            f"the model checkpoints activations (at {lines[0]}), and the converted one does not: training it holds all "
            "of them, which takes more memory; fewer images in a step make up for it",
            stacklevel=4,
        )
    streams = {training: stream for training, (stream, _) in calls.items()}
    if modes.mixed:
        whole, _ = _watched_call(modes.switch(modes.training).train(modes.training), inputs)
        if streams[modes.training] != whole:
            one, other = ("train", "eval") if modes.training else ("eval", "train")
            warnings.warn(
                f"{modes.apart()} in {other} mode, the model in {one} mode: the converted model keeps it so whenever "
                f"it is in {one} mode; call model.{one}() first if all parts should follow",
                stacklevel=4,
            )
    custom = next((own for _, own in calls.values() if own), "")
    return streams[False] != streams[True], custom


def _watched_call(model: nn.Module, inputs: Args) -> tuple[list[str], str]:
    """The operations of a call with their settings, and what has gradients of its own.

    Frozen parameters get gradients too, as they may be thawed later; a model that does not stand that is run as it is,
    and one that stands no gradients at all without them.
    """
    frozen = {n: p for n, p in model.named_parameters() if p.is_floating_point() and not p.requires_grad}
    thawed = {n: p.detach().requires_grad_() for n, p in frozen.items()}
    for parameters, gradients in ((thawed, True), ({}, True), ({}, False)):
        recorder = _Recorder()

        def call(parameters: dict[str, Any] = parameters, recorder: _Recorder = recorder) -> Any:
            # Cloned: batch norms in train mode write their statistics, and a model may write into its inputs.
            args, kwargs = tree_map_only(torch.Tensor, torch.clone, inputs)
            state = {**parameters, **{name: b.clone() for name, b in model.named_buffers()}}
            recorder.stream.clear()
            with recorder:
                return functional_call(model, state, args, kwargs)

        devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
        with torch.set_grad_enabled(gradients), torch.random.fork_rng(devices):
            try:
                own = custom_gradient(call)
            except Exception as error:
                if gradients:
                    continue
                raise explain(model, inputs, error) from error
        return recorder.stream, own
    raise AssertionError("the last of the calls returns or raises")


def reassigns_buffers(model: nn.Module, inputs: Args) -> bool:
    """Whether a call puts another tensor in the place of a buffer, as in `self.mean = 0.9 * self.mean + 0.1 * new`."""
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    after = dict[str, torch.Tensor]()
    handle = model.register_forward_hook(lambda *_: after.update(model.named_buffers()))
    try:
        with torch.no_grad(), torch.random.fork_rng([]):
            args, kwargs = tree_map_only(torch.Tensor, torch.clone, inputs)
            functional_call(model, dict(before), args, kwargs)  # which puts the new ones into what it is given
    finally:
        handle.remove()
    return any(after[name] is not buffer for name, buffer in before.items())


class _Recorder(TorchDispatchMode):
    """Writes down every operation with its settings, but not its data."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.stream: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        settings = map_aggregate((args, kwargs or {}), lambda a: tuple(a.shape) if isinstance(a, torch.Tensor) else a)
        self.stream.append(f"{func} {settings}")
        return func(*args, **(kwargs or {}))


def explain(model: nn.Module, inputs: Args, error: Exception) -> IdleFxError:
    """Tell a model that does not run on its example from one that runs but cannot be traced."""
    args, kwargs = inputs
    shapes = ", ".join(str(tuple(t.shape)) for t in tree_leaves(inputs) if isinstance(t, torch.Tensor))
    try:
        with torch.no_grad():
            model(*args, **kwargs)
    except Exception as eager:
        refusal: IdleFxError = InputError(
            f"capture: the model itself fails on example inputs of shape {shapes}: {first_line(eager)} "
            f"(at {_own_line(eager)}); pass example_inputs that it accepts"
        )
        refusal.__cause__ = eager
        return refusal
    told = "data-dependent" in first_line(error)
    refusal = CaptureError(
        f"capture: torch.export cannot trace the model: {first_line(error)} (at {_own_line(error)}); "
        "a forward without control flow on tensor values (use torch.where), `.item()` and side effects usually helps"
        + (_PLAIN_NUMBERS if told else "")
    )
    refusal.__cause__ = error
    return refusal


def _own_line(error: Exception) -> str:
    here = str(Path(__file__).parent)
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(here)]
    own = innermost([frame.filename for frame in frames])
    return "unknown line" if own is None else f"{frames[own].filename}:{frames[own].lineno}"
