"""The backend `idlefx` of `torch.compile`: the passes of `convert` on the graphs that Dynamo finds.

The user's module stays the user's: nothing of it is copied or changed, and what it does outside its graph it still
does. Torch finds the backend through its entry point; `register` is for checkouts that were not installed.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from importlib.metadata import entry_points
from typing import Any, NoReturn

import torch
from torch import fx

from idlefx.analysis.attention import find_cores
from idlefx.analysis.blocks import find_blocks
from idlefx.capture.dynamo_graph import autocast_line, free_sizes, has_one_image, lift, lower
from idlefx.capture.graph_breaks import Part, forget, part_of
from idlefx.deploy.inductor import compile_graph
from idlefx.errors import CaptureError, IdleFxError, InputError, PlanError
from idlefx.pipeline import rewrite, spell
from idlefx.planning.schedule import make_plan
from idlefx.records import BlockTable, Plan


@dataclass(frozen=True)
class Options:
    """What `options` may hold, as `convert` takes it."""

    layers: Sequence[int]
    keep: float | Sequence[float]
    schedule: str = "stages"
    selector: str = "auto"
    reselect: bool = True
    multiple_of: int = 1
    prefix: int | Sequence[int] | None = None


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
        options: `layers`, `keep`, `schedule`, `selector`, `reselect`, `multiple_of` and `prefix`, as `convert` takes
            them.
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
    """Make the backend known to torch where no installed package does."""
    if "idlefx" not in entry_points(group="torch_dynamo_backends").names:
        import torch._dynamo

        torch._dynamo.register_backend(compile_idle, name="idlefx")


def _refuse(refusal: IdleFxError, *_: Any) -> NoReturn:
    raise type(refusal)(*refusal.args)


def _read(options: Mapping[str, Any] | None) -> Options:
    known = [each.name for each in fields(Options)]
    example = 'options={"layers": [3, 6, 9], "keep": 0.7}'
    if not isinstance(options, Mapping):
        raise InputError(f"backend: torch.compile(model, backend='idlefx') needs {example}; got {options!r}")
    unknown = [name for name in options if name not in known]
    if unknown:
        raise InputError(f"backend: unknown options {unknown}; known are {', '.join(known)}")
    missing = [name for name in ("layers", "keep") if name not in options]
    if missing:
        raise InputError(f"backend: options lack {' and '.join(missing)}; give for example {example}")
    read = Options(**options)
    whole = list(read.prefix) if isinstance(read.prefix, (list, tuple, range)) else [read.prefix or 0]
    if any(isinstance(position, bool) or not isinstance(position, int) for position in whole):
        raise InputError(f"backend: prefix={read.prefix!r} is neither a number of leading tokens nor their positions")
    if not isinstance(read.reselect, bool):
        raise InputError(f"backend: reselect={read.reselect!r} is neither True nor False")
    return read


def _with_idling(given: fx.GraphModule, inputs: list[Any], options: Options) -> fx.GraphModule:
    part = part_of(given, inputs)
    original = lower(given)
    spelled = spell(original)
    if not find_cores(spelled.graph):
        return given
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
        plan = _plan(blocks, options) if part is None else _plan_for(part, blocks, options)
    except PlanError as refusal:
        if has_one_image(given) and not all(block.can_idle for block in blocks):
            raise PlanError(
                f"{refusal}\ntorch.compile made this graph for a batch of one, whose axis is hard to tell from others; "
                "a batch of two or more may do"
            ) from refusal
        raise
    rewritten = rewrite(spelled, plan, original)
    return given if rewritten is original else lift(rewritten, given)


def _plan(blocks: BlockTable, options: Options) -> Plan:
    o = options
    return make_plan(blocks, o.layers, o.keep, o.schedule, o.selector, o.reselect, o.multiple_of)


def _plan_for(part: Part, blocks: BlockTable, options: Options) -> Plan:
    named = [block.path for block in blocks if block.path]
    count = f"{len(blocks)} block" + "s" * (len(blocks) > 1)
    part.claim(count + (f" ({named[0]} to {named[-1]})" if named else ""))
    try:
        plan = _plan(blocks, options)
    except PlanError as refusal:
        raise PlanError(f"{refusal}\n{part.excuse()}") from refusal
    warnings.warn(part.excuse(), stacklevel=2)
    return plan
