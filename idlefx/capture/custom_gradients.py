"""Gradients of the user's own, which a trace loses: it keeps what a forward computes, and torch derives that anew.

They are found in the autograd graph of a call: `torch.autograd.Function`, hooks on tensors, backward hooks on modules.
"""

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from idlefx.graph.queries import innermost_line

_HOOKS = (torch.Tensor.register_hook, torch.Tensor.register_post_accumulate_grad_hook)
_KINDS = {  # what torch itself does by autograd functions
    "BackwardHookFunction": "a backward hook on a module",
    "CheckpointFunction": "checkpointing with use_reentrant=True",
}


class HookWatch(TorchFunctionMode):
    """Writes down where a forward puts hooks on gradients of tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.stacks: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _HOOKS:
            self.stacks.append("".join(traceback.format_stack()[:-1]))
        return func(*args, **(kwargs or {}))


def custom_gradient(call: Callable[[], Any]) -> str:
    """What in a call has gradients of its own, in words and with its line; empty if nothing has.

    Args:
        call: Runs the model, with gradients; it is run a second time where something is found.
    """
    with HookWatch() as watch, saved_tensors_hooks(_forget, _remember):
        found = _own_functions(call())
    if watch.stacks:
        return f"a hook on a tensor (at {_line(watch.stacks[0])})"
    if not found:
        return ""
    with torch.autograd.set_detect_anomaly(True, check_nan=False):  # it writes the stack of each operation down
        function = _own_functions(call())[0]
    name = type(function)._forward_cls.__name__
    kind = _KINDS.get(name, f"the autograd function {name}")
    return f"{kind} (at {_line(''.join(function.metadata['traceback_']))})"


@contextmanager
def without_backward_hooks(model: nn.Module) -> Iterator[None]:
    """Take the backward hooks off all modules meanwhile, which no trace has a use for and a strict one fails at."""
    kept = [(module, module._backward_hooks, module._backward_pre_hooks) for module in model.modules()]
    for module, hooks, pre_hooks in kept:
        module._backward_hooks, module._backward_pre_hooks = type(hooks)(), type(pre_hooks)()
    try:
        yield
    finally:
        for module, hooks, pre_hooks in kept:
            module._backward_hooks, module._backward_pre_hooks = hooks, pre_hooks


def _forget(saved: torch.Tensor) -> None:
    """Keep nothing for a backward that nobody runs: at a thousand pixels it is tens of gigabytes."""


def _remember(forgotten: None) -> torch.Tensor:
    raise RuntimeError("what this backward needs was not kept")


def _own_functions(outputs: Any) -> list[Any]:
    """The autograd functions written in Python that outputs were computed through."""
    found, seen = list[Any](), set[Any]()
    stack: list[Any] = [t.grad_fn for t in tree_leaves(outputs) if isinstance(t, torch.Tensor)]
    while stack:
        step = stack.pop()
        if step is None or step in seen:
            continue
        seen.add(step)
        if isinstance(step, BackwardCFunction):
            found.append(step)
        stack += [before for before, _ in step.next_functions]
    return found


def _line(stack: str) -> str:
    """The line in the model's code; the frames that led to the call are not its."""
    return innermost_line(stack.rpartition("functional_call")[2])
