"""The story: capture a model, find its blocks, make a plan, run the passes.

It is longer than other files, as it is one story and its public functions are mostly documentation.
"""

import warnings
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

from torch import fx, nn

from idlefx.analysis.blocks import find_blocks
from idlefx.capture.export import Captured, capture
from idlefx.errors import IdleFxError, PassError, PlanError
from idlefx.graph import inference
from idlefx.graph.state import adopt, attributes, wrapper_kind
from idlefx.options import AUTO, Idle, PlanOptions, Schedule, Unit
from idlefx.passes import (
    add_cut_loss,
    follow_workers,
    form_groups,
    idle_tokens,
    lower_spellings,
    normalize_attention,
    return_stream,
    select_tokens,
    shorten_query,
)  # fmt: skip
from idlefx.planning.model_plan import ModelPlan, given_plan, plain
from idlefx.planning.schedule import fits, make_plan
from idlefx.records import BlockTable, Plan
from idlefx.rewriting.memory_order import keep_contiguous
from idlefx.rewriting.verify import promise_of, verify
from idlefx.runtime import weights
from idlefx.runtime.answers import answers_of
from idlefx.runtime.call_checks import checks_of
from idlefx.runtime.conversion import Conversion, Form
from idlefx.runtime.layers import call_layers, find_layers, put_layers
from idlefx.runtime.module import IdleModule

Pass = Callable[[fx.GraphModule, Plan], fx.GraphModule]

SPELL: tuple[Pass, ...] = (lower_spellings, normalize_attention)
REST: tuple[Pass, ...] = (select_tokens, idle_tokens, shorten_query)
FOLLOW: tuple[Pass, ...] = (form_groups, follow_workers, shorten_query)
REST_WITH_LOSS: tuple[Pass, ...] = (select_tokens, add_cut_loss, idle_tokens, shorten_query)
STREAM: tuple[Pass, ...] = (return_stream,)


def convert(
    model: nn.Module,
    layers: Sequence[int] | None = None,
    keep: float | Sequence[float] | None = None,
    *,
    plan: PlanOptions | None = None,
    schedule: Schedule = "stages",
    selector: str = AUTO,
    reselect: bool = True,
    multiple_of: int = 1,
    prefix: int | Sequence[int] | None = None,
    idle: Idle = "rest",
    unit: Unit = "auto",
    example_inputs: Any = None,
    copy: bool = True,
) -> IdleModule:
    """Turn a Vision Transformer into one whose chosen blocks let the uninformative tokens idle.

    Args:
        model: Any module whose blocks attend over one sequence of tokens; out of `torch.compile`, `DataParallel` or
            `DistributedDataParallel` it is taken, so wrap the result anew.
        layers: Block indices, from 0 in execution order: where stages begin, or with `schedule="blocks"` exactly
            the blocks that idle. `inspect` shows them.
        keep: Share of the image tokens that works, in (0, 1]; a list gives each entry of `layers` its own.
            With "stages" one ratio compounds: stage s keeps `keep ** (s + 1)` in every block of it.
        plan: All options of a plan at once, such as `idlefx.plan` finds them, instead of the others.
        schedule: "stages" or "blocks".
        selector: Name of the token score; "auto" takes the logits of the class token, or of the mean query.
        reselect: Whether a token that idles may work again in a later block. False is pruning, for comparison; where
            tokens follow, it keeps those together that are in one group: later stages join whole groups.
        multiple_of: Raise K until P + K, the tokens that work, is a multiple of it: 8 suits the tiles of GPU kernels.
        prefix: Number of leading prefix tokens, or their positions; found if None.
        idle: What idle tokens do meanwhile. "rest": they stay unchanged, as published; this wants fine-tuning.
            "follow": each takes over the update of the worker most like it; this serves without any training.
        unit: What idles where attention is over windows: whole "windows", or "tokens" in each; "auto" takes tokens
            where there are fewer than 16 windows, or where tokens follow.
        example_inputs: A tensor, a tuple of positional or a dict of keyword inputs; guessed for timm, torchvision
            and Hugging Face models.
        copy: Leave `model` untouched; otherwise the result shares its parameters.

    Returns:
        An eager, differentiable graph module with the model's signature, state and batch freedom.

    Raises:
        IdleFxError: Any refusal; the message names the stage, the place and the remedy.

    Source:
        IdleViT, arXiv:2310.05654.
    """
    asked = {
        "layers": layers, "keep": keep, "schedule": schedule, "selector": selector, "reselect": reselect,
        "multiple_of": multiple_of, "prefix": prefix, "idle": idle, "unit": unit,
    }  # fmt: skip
    options = given_plan(plan, asked)
    captured = capture(model, example_inputs, copy_model=copy)
    if captured.custom_gradient and not captured.training:
        warnings.warn(
            f"{captured.custom_gradient} has gradients of its own, which a converted model does not have: "
            "it is for inference only",
            stacklevel=2,
        )
    evaluation = _carry_out(options, captured.eval_graph)
    training = _for_training(captured, evaluation, options)
    modules = find_layers(captured.eval_graph, (evaluation.source, training.source))
    put_layers(modules, captured.eval_graph, captured.train_graph)
    for form in (evaluation, training):
        call_layers(form.graph, modules)
    conversion = Conversion(
        plain(options),
        evaluation,
        training,
        captured.facts,
        captured.batch_free,
        origin(captured.model),
        example_inputs is None,
        checks_of(captured.model.forward, captured.eval_graph.graph, captured.arrays),
        answers_of(captured.model),
        modules,
        captured.custom_gradient,
        weights.sample(captured.model),
        captured.loss,
        captured.numbers,
    )
    if captured.training:
        conversion.check_gradients()
    return IdleModule(conversion, captured.eval_graph, captured.train_graph).train(captured.training)


def inspect(model: nn.Module, example_inputs: Any = None, *, prefix: int | Sequence[int] | None = None) -> BlockTable:
    """The blocks of a model: where they are, what they hold, whether they can idle and if not why.

    Args:
        model: Any module with attention; it stays untouched.
        example_inputs: A tensor, a tuple of positional or a dict of keyword inputs; guessed if None.
        prefix: Number of leading prefix tokens, or their positions; found if None.

    Raises:
        IdleFxError: The model cannot be traced, or has no transformer block.
    """
    return find_blocks(spell(capture(model, example_inputs).eval_graph), prefix)


def spell(module: fx.GraphModule, graph: fx.Graph | None = None) -> fx.GraphModule:
    """A copy in which everything is spelled in the ways that the analysis knows; of another graph if one is given."""
    return run_passes(SPELL, copied(module, graph), Plan((), BlockTable(())))


def copied(module: fx.GraphModule, graph: fx.Graph | None = None) -> fx.GraphModule:
    """A copy that shares all state; of another graph if one is given."""
    if graph is None:
        copy = fx.GraphModule(module, deepcopy(module.graph))
    else:
        copy = fx.GraphModule(attributes(module, graph), deepcopy(graph))
    adopt(copy, module)
    return copy


def rewrite(spelled: fx.GraphModule, plan: Plan, original: fx.GraphModule) -> fx.GraphModule:
    """Carry the plan out on the spelled graph; where no token idles, the original stays, bit by bit.

    Raises:
        PassError: A pass broke a promise; the message names it.
    """
    passes = FOLLOW if plan.idle == "follow" else REST
    return run_passes(passes, spelled, plan) if any(step.idles for step in plan) else original


def _carry_out(options: PlanOptions, captured: fx.GraphModule) -> Form:
    """Find the blocks of a captured graph, and let those idle that the options name."""
    spelled = spell(captured)
    blocks = find_blocks(spelled, options.prefix)
    if isinstance(options, ModelPlan):
        options.check(blocks)
    try:
        plan = make_plan(blocks, options)
    except PlanError as refusal:
        kind = wrapper_kind(captured.parameters())
        if kind and not all(block.can_idle for block in blocks):
            raise PlanError(
                f"{refusal}\nweights of the model are {kind}; convert it before it is quantised, and quantise the "
                "converted model"
            ) from refusal
        raise
    return form_of(captured, plan, rewrite(spelled, plan, captured))


def _for_training(captured: Captured, evaluation: Form, options: PlanOptions) -> Form:
    """The train-mode graph with the same plan; its nodes have names of their own, so its blocks are found anew."""
    if captured.train_graph is captured.eval_graph:
        return evaluation
    spelled, plan = spell(captured.train_graph), evaluation.plan
    blocks = find_blocks(spelled, options.prefix)
    if not fits(plan, blocks):
        sizes = sorted({(b.tokens, other.tokens) for b, other in zip(blocks, plan.blocks, strict=False)})
        told = ", ".join(f"{train} tokens instead of {evaluates}" for train, evaluates in sizes if train != evaluates)
        warnings.warn(
            f"in train mode the model has other blocks than in eval mode{told and ': ' + told}; after `.train()` the "
            "converted model does what it does in eval mode, with no dropout of any kind; switch off what drops whole "
            "tokens (timm: `patch_drop_rate=0`) before converting",
            stacklevel=3,
        )
        return evaluation
    plan = replace(plan, blocks=blocks)
    return form_of(captured.train_graph, plan, rewrite(spelled, plan, captured.train_graph))


def form_of(captured: fx.GraphModule, plan: Plan, rewritten: fx.GraphModule) -> Form:
    """What was captured stays as it is: layers are called in a copy."""
    source = deepcopy(captured.graph)
    return Form(source, plan, deepcopy(captured.graph) if rewritten is captured else rewritten.graph)


def run_passes(passes: Sequence[Pass], module: fx.GraphModule, plan: Plan) -> fx.GraphModule:
    """Run passes one by one; each is held to the promises of the graph, and to the values of the nodes it changed."""
    promise = promise_of(module)
    for node in module.graph.nodes:
        inference.trust(node)  # the trace, or the runner before, has inferred it
    try:
        for step in passes:
            module = _apply(step, module, plan)
            if step in (add_cut_loss, return_stream):  # which promise more than they found
                promise = replace(promise, outputs=(*promise.outputs, *promise_of(module).outputs[-1:]))
            verify(module, promise, step.__name__)
        if passes not in (SPELL, STREAM):  # what comes of those is analysed still, and no token has moved
            keep_contiguous(module.graph, promise.contiguous)
    finally:
        inference.forget(module.graph)
    module.recompile()
    return module


def _apply(step: Pass, module: fx.GraphModule, plan: Plan) -> fx.GraphModule:
    try:
        return step(module, plan)
    except IdleFxError:
        raise
    except Exception as error:
        raise PassError(f"in pass {step.__name__}: {type(error).__name__}: {error}") from error


def origin(model: nn.Module) -> str:
    """What may make a model like this one again: its name in timm, or its class."""
    config = getattr(model, "pretrained_cfg", None)
    architecture = config.get("architecture") if isinstance(config, dict) else getattr(config, "architecture", None)
    if architecture and type(model).__module__.startswith("timm."):
        return str(architecture)
    return f"{type(model).__module__}:{type(model).__qualname__}"
