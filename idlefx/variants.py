"""Converted models made of another: they share its parameters, and return or keep something else."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import fx

from idlefx.errors import InputError
from idlefx.pipeline import REST_WITH_LOSS, STREAM, copied, form_of, rewrite, run_passes, spell
from idlefx.planning.schedule import make_plan
from idlefx.records import Plan
from idlefx.runtime.conversion import Form
from idlefx.runtime.layers import call_layers
from idlefx.runtime.module import IdleModule, conversion_of, converted


def with_cut_loss(idle: IdleModule) -> IdleModule:
    """A converted model that returns its token cut loss too, for training; it shares the parameters.

    The loss looks at queries and keys of all tokens, which an idling block no longer has. So it is not added to the
    graph of `idle`: the graph that was captured, which `idle` remembers, is rewritten anew by the same plan.

    Args:
        idle: A converted model, compiled or not; it stays untouched. Move it to its device first.

    Returns:
        A module like `idle`, whose forward returns `(output, cut_loss)`; the loss is a scalar, averaged over the
        idling blocks. What trains it trains `idle`.

    Raises:
        InputError: The model's gradients are not those of the original, or its idle tokens follow.

    Source:
        IdleViT, arXiv:2310.05654; `idlefx.runtime.cut_loss.token_cut` states the formula.
    """
    idle = converted(idle)
    conversion = conversion_of(idle)
    conversion.check_gradients()
    if conversion.plan.idle != "rest":
        raise InputError(
            "train: the token cut loss is for tokens that rest, and those of this model follow; train without it, or "
            "convert with idle='rest'"
        )
    if any((step.unit or step.kept_by_segment) and step.idles for step in conversion.plan):
        raise InputError(
            "train: the token cut loss is of attention over all tokens, and that of this model is over windows or "
            "segments; train without it"
        )
    return _rewritten(idle, _with_cut_loss)


def with_stream(idle: IdleModule) -> IdleModule:
    """A converted model that returns the residual stream after its last block too; it shares the parameters.

    Args:
        idle: A converted model, compiled or not; it stays untouched. Move it to its device first.

    Returns:
        A module like `idle`, whose forward returns `(output, stream)`, the stream (B, N, C), or (B, H, W, C) on a grid.

    Raises:
        InputError: The tokens of the last block cannot be followed, so it is not known where they stand.
    """
    idle = converted(idle)
    last = conversion_of(idle).blocks[-1]
    if not last.tokens:
        raise InputError(
            f"train: the stream after the last block ({last.path or 'no path'}) cannot be had, as it is not known "
            f"where its tokens stand: {last.refusal}; train without it"
        )
    return _rewritten(idle, _with_stream)


def with_keep(idle: IdleModule, keep: float | Sequence[float]) -> IdleModule:
    """A converted model with other keep ratios; it shares the parameters.

    Args:
        idle: A converted model, compiled or not; it stays untouched. Move it to its device first.
        keep: As for `convert`; what else was asked for stays.

    Raises:
        PlanError: The ratios do not fit the plan.
    """
    idle = converted(idle)
    options = replace(conversion_of(idle).options, keep=keep)

    def form_with_keep(idle: IdleModule, form: Form) -> Form:
        return _form_again(idle, copied(idle, form.source), make_plan(form.plan.blocks, options))

    return _rewritten(idle, form_with_keep, options=options)


def _rewritten(idle: IdleModule, rewrite_form: Callable[[IdleModule, Form], Form], **changes: Any) -> IdleModule:
    """A module like `idle` that shares its state and does something else in each mode."""
    conversion = conversion_of(idle)
    evaluation = training = rewrite_form(idle, conversion.evaluation)
    if conversion.training is not conversion.evaluation:
        training = rewrite_form(idle, conversion.training)
    conversion = replace(conversion, evaluation=evaluation, training=training, loss=None, **changes)
    return IdleModule(conversion, idle, idle).train(idle.training)


def _with_cut_loss(idle: IdleModule, form: Form) -> Form:
    rewritten = run_passes(REST_WITH_LOSS, spell(idle, form.source), form.plan)
    call_layers(rewritten.graph, conversion_of(idle).called)
    return replace(form, graph=rewritten.graph)


def _with_stream(idle: IdleModule, form: Form) -> Form:
    """The form with another source, so that keep ratios may change and a cut loss be added later."""
    return _form_again(idle, run_passes(STREAM, spell(idle, form.source), form.plan), form.plan)


def _form_again(idle: IdleModule, source: fx.GraphModule, plan: Plan) -> Form:
    form = form_of(source, plan, rewrite(spell(source), plan, source))
    call_layers(form.graph, conversion_of(idle).called)
    return form
