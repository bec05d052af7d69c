"""The containers inside a converted model: they hold parameters and layers under the names of the original, no more.

The model is one graph, which calls layers (`layers`) and reads other parameters by their names, and calls none of these
modules. What would pass in silence therefore speaks: a hook on one of them warns, a call refuses, and so does whatever
takes the place of one without what the graph reads there.
"""

import functools
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from torch import fx, nn

from idlefx.errors import InputError
from idlefx.runtime.swaps import RECOMPUTES

F = TypeVar("F", bound=Callable[..., Any])

_PATH, _READ = "_path", "_read"  # of a module: its name, and by part what graphs read of it


class Owner(nn.Module):
    """A module whose parts a graph reads by name."""

    def __setattr__(self, name: str, value: Any) -> None:
        read = self.__dict__.get(_READ, {}).get(name)
        if read is not None:
            _check_replacement(".".join(filter(None, (path_of(self), name))), read, value)
        super().__setattr__(name, value)


def _warns(register: F) -> F:
    """A method that registers a hook, and says that it will never run."""

    @functools.wraps(register)
    def registered(self: Any, hook: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(hook, RECOMPUTES):
            return register(self, hook, *args, **kwargs)
        warnings.warn(
            f"a hook on `{path_of(self)}` of a converted model will never run: the model is one graph, which calls no "
            'modules but linear, norm and convolution layers; torch.compile(model, backend="idlefx") keeps modules and '
            "hooks, or convert a model that returns what the hook is to see",
            stacklevel=2,
        )
        return register(self, hook, *args, **kwargs)

    return registered  # type: ignore[return-value]


class Part(Owner):
    """Holds the parameters of a part of the model."""

    register_forward_pre_hook = _warns(nn.Module.register_forward_pre_hook)
    register_forward_hook = _warns(nn.Module.register_forward_hook)
    register_full_backward_pre_hook = _warns(nn.Module.register_full_backward_pre_hook)
    register_full_backward_hook = _warns(nn.Module.register_full_backward_hook)
    register_backward_hook = _warns(nn.Module.register_backward_hook)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse; the forward stays that of a bare module.

        Raises:
            InputError: Always.
        """
        raise InputError(
            f"model: `{path_of(self)}` of a converted model holds parameters alone and cannot be called; convert a "
            'model that returns what it returns, or take torch.compile(model, backend="idlefx"), which keeps modules'
        )


class PartList(Owner, nn.ModuleList):
    """Parts that are numbered."""


def make_parts(module: Owner, graphs: Iterable[fx.Graph]) -> None:
    """Let the bare modules and lists inside a graph module be parts of it, which know what is read of them.

    Args:
        module: A graph module.
        graphs: All that it may run.
    """
    for name, child in module.named_modules():
        kind = {nn.Module: Part, nn.ModuleList: PartList}.get(type(child))
        if kind is not None:
            child.__class__ = kind
        if isinstance(child, Owner):
            child.__dict__.update({_PATH: name, _READ: {}})
    nodes = [node for graph in graphs for node in graph.nodes if node.op in ("get_attr", "call_module")]
    for target in sorted({str(node.target) for node in nodes}):
        owner: nn.Module = module
        first, _, rest = target.partition(".")
        while rest and isinstance(owner, Owner):
            owner.__dict__[_READ].setdefault(first, []).append(rest)
            owner = owner.get_submodule(first)
            first, _, rest = rest.partition(".")
        if isinstance(owner, Owner) and isinstance(getattr(owner, first, None), nn.Module):
            owner.__dict__[_READ].setdefault(first, [])  # a layer


def path_of(part: nn.Module) -> str:
    """The name of a part in its model."""
    return str(part.__dict__[_PATH])


def _check_replacement(path: str, read: Sequence[str], after: Any) -> None:
    """Refuse to put something in the place of a part that has not what the graph reads there, or does more with it.

    Where a layer stands nothing is read, and any module may come, as the graph calls it.

    Raises:
        InputError: It lacks a parameter or a buffer, or has a forward of its own, which would not be called.
    """
    reason = ""
    for name in read:
        try:
            functools.reduce(getattr, name.split("."), after)
        except AttributeError:
            reason = reason or f"in which the graph does not find `{path}.{name}`"
    if not read and not isinstance(after, nn.Module):
        reason = "which the graph cannot call"
    own = isinstance(after, nn.Module) and not isinstance(after, Owner) and type(after).__module__[:9] != "torch.nn."
    if read and own:
        reason = reason or "whose forward would not be called, as the graph reads parameters alone"
    if reason:
        raise InputError(
            f"model: `{path}` of a converted model cannot be replaced by {type(after).__name__}, {reason}; replace it "
            "in the model before converting, or convert the part of the model that comes before it"
        )
