"""The backend `idlefx` of `torch.compile`: the passes of `convert` on the graphs that Dynamo finds.

The user's module stays the user's: nothing of it is copied or changed, and what it does outside its graph it still
does. Torch finds the backend through its entry point; `register` is for checkouts that were not installed.
"""

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NoReturn

import torch
from torch import fx

from idlefx.analysis.attention import find_cores
from idlefx.analysis.blocks import find_blocks
from idlefx.capture.dynamo_graph import (
    autocast_line,
    fast_path_line,
    free_sizes,
    gradient_line,
    has_one_image,
    lift,
    lower,
    wrapped_state,
)
from idlefx.capture.graph_breaks import Part, forget, part_of
from idlefx.deploy.inductor import compile_graph
from idlefx.errors import CaptureError, IdleFxError, InputError, PlanError
from idlefx.options import PlanOptions
from idlefx.pipeline import rewrite, spell
from idlefx.planning.schedule import make_plan
from idlefx.records import BlockTable, Plan


def compile_idle(
    given: fx.GraphModule,
    inputs: list[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
    **others: Any,
) -> Callable[..., Any]:
    """Compile a graph of a model whose tokens are to idle; a graph without attention is compiled as it is.

    Args:
        given: The graph that Dynamo found.
        inputs: What it is called with.
        options: Those of a plan, as `convert` takes them: what `PlanOptions.to_dict` gives.
        mode: Inductor's; not taken beside options.
        **others: What else torch.compile was given for a backend; nothing of it is known here.

    Raises:
        IdleFxError: Any refusal; torch wraps it in a `BackendCompilerFailed` of the same words.
    """
    try:
        if mode is not None:
            raise InputError(f"backend: mode={mode!r} is of backend='inductor'; give options, and no mode")
        return compile_graph(_with_idling(given, inputs, _read(options)), inputs)
    except IdleFxError as refusal:
        if not torch._dynamo.config.suppress_errors:
            raise
        # Suppressed, it would let the model, or half of it, run dense: not what was asked for.
        return partial(_refuse, refusal)


compile_idle.reset = forget  # type: ignore[attr-defined]


def register() -> None:
    """Make the backend known to torch, where no installed package does."""
    import torch._dynamo

    torch._dynamo.register_backend(compile_idle, name="idlefx")


def _refuse(refusal: IdleFxError, *_: Any) -> NoReturn:
    raise type(refusal)(*refusal.args)


def _read(options: Mapping[str, Any] | None) -> PlanOptions:
    if not isinstance(options, Mapping):
        example = 'options={"layers": [3, 6, 9], "keep": 0.7}'
        raise InputError(f"backend: torch.compile(model, backend='idlefx') needs {example}; got {options!r}")
    return PlanOptions.from_dict(options)


def _with_idling(given: fx.GraphModule, inputs: list[Any], options: PlanOptions) -> fx.GraphModule:
    part = part_of(given, inputs)
    if line := fast_path_line(given):
        raise CaptureError(
            f"capture: torch's fast path hides the attention of this layer (at {line}); switch it off with "
            "torch.backends.mha.set_fastpath_enabled(False), and compile anew"
        )
    original = lower(given)
    spelled = spell(original)
    if not find_cores(spelled.graph):
        return given
    if kind := wrapped_state(given):
        raise CaptureError(
            f"capture: weights of the model are {kind}, which the backend cannot look into; use idlefx.convert on the "
            "model before it is quantised, then quantise the converted model and compile that"
        )
    if line := autocast_line(given):
        raise CaptureError(
            f"capture: the model switches autocast inside its forward (at {line}); switch it around the call instead"
        )
    if sizes := free_sizes(given):
        for size in sizes:
            int(size)  # One size of the image for each compilation, as tokens are counted.
        original = lower(given)
        spelled = spell(original)
    blocks = find_blocks(spelled, options.prefix)
    try:
        plan = make_plan(blocks, options) if part is None else _plan_for(part, blocks, options)
    except PlanError as refusal:
        if has_one_image(given) and not all(block.can_idle for block in blocks):
            raise PlanError(
                f"{refusal}\ntorch.compile made this graph for a batch of one, whose axis is hard to tell from others; "
                "a batch of two or more may do"
            ) from refusal
        raise
    rewritten = rewrite(spelled, plan, original)
    if rewritten is original:
        return given
    if line := gradient_line(given):
        raise CaptureError(
            f"capture: gradients of the model's own would be lost (at {line}); write them with plain operations and "
            "`.detach()`, or compile the part of the model that is without them"
        )
    return lift(rewritten, given)


def _plan_for(part: Part, blocks: BlockTable, options: PlanOptions) -> Plan:
    named = [block.path for block in blocks if block.path]
    count = f"{len(blocks)} block" + "s" * (len(blocks) > 1)
    part.claim(count + (f" ({named[0]} to {named[-1]})" if named else ""))
    try:
        plan = make_plan(blocks, options)
    except PlanError as refusal:
        raise PlanError(f"{refusal}\n{part.excuse()}") from refusal
    warnings.warn(part.excuse(), stacklevel=2)
    return plan
