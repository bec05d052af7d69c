"""The story: capture a model, find its blocks, make a plan, run the passes."""

import warnings
from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

from torch import fx, nn

from idlefx.blocks import find_blocks
from idlefx.errors import IdleFxError, PassError
from idlefx.frontend import Captured, capture
from idlefx.module import IdleModule
from idlefx.passes import idle_tokens, lower_spellings, normalize_attention, select_tokens
from idlefx.planning import make_plan
from idlefx.records import BlockTable, Plan
from idlefx.tidy import adopt
from idlefx.verify import promise_of, verify

Pass = Callable[[fx.GraphModule, Plan], fx.GraphModule]

SPELL: tuple[Pass, ...] = (lower_spellings, normalize_attention)
REWRITE: tuple[Pass, ...] = (select_tokens, idle_tokens)


def convert(
    model: nn.Module,
    layers: Sequence[int],
    keep: float | Sequence[float],
    *,
    schedule: str = "stages",
    selector: str = "auto",
    prefix: int | Sequence[int] | None = None,
    example_inputs: Any = None,
    copy: bool = True,
) -> IdleModule:
    """Turn a Vision Transformer into one whose chosen blocks let the uninformative tokens idle.

    Args:
        model: Any module whose blocks attend over one sequence of tokens.
        layers: Block indices, from 0 in execution order: where stages begin, or with `schedule="blocks"` exactly
            the blocks that idle. `inspect` shows them.
        keep: Share of the image tokens that works, in (0, 1]; a list gives each entry of `layers` its own.
            With "stages" one ratio compounds: stage s keeps `keep ** (s + 1)` in every block of it.
        schedule: "stages" or "blocks".
        selector: Name of the token score; "auto" takes the logits of the class token, or of the mean query.
        prefix: Number of leading prefix tokens, or their positions; found if None.
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
    captured = capture(model, example_inputs, copy_model=copy)
    spelled = spell(captured.eval_graph)
    plan = make_plan(find_blocks(spelled, prefix), layers, keep, schedule, selector)
    evaluation = rewrite(spelled, plan, captured.eval_graph)
    training = _for_training(captured, plan, evaluation, prefix)
    result = IdleModule(evaluation, training, plan, captured.facts)
    return result.train(captured.training)


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


def spell(module: fx.GraphModule) -> fx.GraphModule:
    """A copy in which everything is spelled in the ways that the analysis knows."""
    copied = fx.GraphModule(module, deepcopy(module.graph))
    adopt(copied, module)
    return _run(SPELL, copied, Plan((), BlockTable(())))


def rewrite(spelled: fx.GraphModule, plan: Plan, original: fx.GraphModule) -> fx.GraphModule:
    """Carry the plan out on the spelled graph; where no token idles, the original stays, bit by bit.

    Raises:
        PassError: A pass broke a promise; the message names it.
    """
    return _run(REWRITE, spelled, plan) if any(step.idles for step in plan) else original


def _run(passes: Sequence[Pass], module: fx.GraphModule, plan: Plan) -> fx.GraphModule:
    promise = promise_of(module)
    for step in passes:
        try:
            module = step(module, plan)
        except IdleFxError:
            raise
        except Exception as error:
            raise PassError(f"in pass {step.__name__}: {type(error).__name__}: {error}") from error
        verify(module, promise, step.__name__)
    module.recompile()
    return module


def _for_training(captured: Captured, plan: Plan, evaluation: fx.GraphModule, prefix: Any) -> fx.GraphModule:
    """The train-mode graph with the same plan; its nodes have names of their own, so its blocks are found anew."""
    if captured.train_graph is captured.eval_graph:
        return evaluation
    spelled = spell(captured.train_graph)
    blocks = find_blocks(spelled, prefix)
    same = [(b.tokens, b.prefix) for b in blocks] == [(b.tokens, b.prefix) for b in plan.blocks]
    if not same or not all(blocks[s.block].can_idle for s in plan):
        warnings.warn(
            "in train mode the model has other blocks than in eval mode; `.train()` keeps what eval mode does",
            stacklevel=3,
        )
        return evaluation
    return rewrite(spelled, Plan(plan.steps, blocks), captured.train_graph)
