"""The parameters and buffers of a module: the same names, and the same objects, as those of the model it came from."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

_EXTRA = "_extra_state"  # how torch names what `get_extra_state` returns
_EXTRA_METHODS = ("get_extra_state", "set_extra_state")
_STATE_HOOKS = (
    "_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks",
)  # fmt: skip


def adopt(module: nn.Module, model: nn.Module) -> None:
    """Make the state of `module` that of `model`: the same names, and the same objects behind them."""
    wanted = model.state_dict(keep_vars=True)
    present = {name for name, _ in [*module.named_parameters(remove_duplicate=False), *module.named_buffers()]}
    for name, tensor in wanted.items():
        extra = name.rpartition(".")[2] == _EXTRA
        if name not in present and isinstance(tensor, torch.Tensor) and not extra:
            owner, leaf = owner_of(module, name)
            if isinstance(tensor, nn.Parameter):
                owner.register_parameter(leaf, tensor)
            else:
                owner.register_buffer(leaf, tensor)
    _order(module, wanted)
    for name, _ in list(module.named_buffers()):
        if name not in wanted:  # a constant of the trace, or a buffer that the model does not save either
            owner, leaf = owner_of(module, name)
            owner._non_persistent_buffers_set.add(leaf)


def _order(module: nn.Module, names: Iterable[str]) -> None:
    """Let parameters, buffers and parts stand in this order, by which optimisers number what they remember."""
    for name in names:
        owner = module
        *path, leaf = name.split(".")
        for part in path:
            if part not in owner._modules:
                break
            owner._modules[part] = owner._modules.pop(part)
            owner = owner.get_submodule(part)
        else:
            kinds: tuple[dict[str, Any], ...] = (owner._parameters, owner._buffers)
            for tensors in kinds:
                if leaf in tensors:
                    tensors[leaf] = tensors.pop(leaf)


@contextmanager
def buffers_kept(module: nn.Module) -> Iterator[None]:
    """Let the buffers of a module be what they were, whatever its forward writes meanwhile."""
    before = [(buffer, buffer.clone()) for buffer in module.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, content in before:
                if not buffer.equal(content):  # what is not written stays good for a backward pass that is to come
                    buffer.copy_(content)


def keeps_more(module: nn.Module) -> list[str]:
    """The names of the parts whose state is more than tensors: extra state, and hooks of the user's own."""
    return [name for name, part in module.named_modules() if _has_extra_state(part) or _has_state_hooks(part)]


def has_gradient_hooks(parameter: nn.Parameter) -> bool:
    """Whether something is to be done with its gradient, when it is computed or once it is there."""
    return bool(parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None))


def _has_extra_state(part: nn.Module) -> bool:
    return any(getattr(type(part), name) is not getattr(nn.Module, name) for name in _EXTRA_METHODS)


def _has_state_hooks(part: nn.Module) -> bool:
    """Whether there are hooks, but for those with which torch reads its own older checkpoints."""
    hooks = [hook for name in _STATE_HOOKS for hook in getattr(part, name, {}).values()]
    origins = [getattr(getattr(hook, "hook", hook), "__module__", None) for hook in hooks]
    return not all(str(origin).startswith("torch.") for origin in origins)


def attributes(module: nn.Module, graph: fx.Graph) -> dict[str, torch.Tensor]:
    """The tensors of `module` that a graph reads, by name; what the trace recorded of one that is no longer there."""
    tensors = dict[str, torch.Tensor]()
    for node in graph.find_nodes(op="get_attr"):
        part: Any = module
        for name in node.target.split("."):
            part = getattr(part, name, None)
        tensors[node.target] = node.meta["val"] if part is None else part
    return tensors


def owner_of(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The submodule that a dotted name lives in, made where it is missing, and the last part of the name."""
    *path, leaf = name.split(".")
    for part in path:
        if module._modules.get(part) is None:
            module.add_module(part, nn.Module())
        module = module.get_submodule(part)
    return module, leaf


def place(module: nn.Module, name: str, part: torch.Tensor | nn.Module) -> None:
    """Let a module have a parameter, buffer or part of that name, if it has none."""
    owner, leaf = owner_of(module, name)
    if hasattr(owner, leaf):
        return
    if isinstance(part, nn.Module):
        owner.add_module(leaf, part)
    elif isinstance(part, nn.Parameter):
        owner.register_parameter(leaf, part)
    else:
        owner.register_buffer(leaf, part)


def keep_order(module: nn.Module, model: nn.Module) -> None:
    """List parameters, buffers and parts of `module` in the order of `model`, which optimisers and averages rely on."""
    for kind in ("_parameters", "_buffers", "_modules"):
        entries, wanted = getattr(module, kind), getattr(model, kind)
        for name in [*(name for name in wanted if name in entries), *(name for name in entries if name not in wanted)]:
            entries[name] = entries.pop(name)
    for name, part in module._modules.items():
        there = model._modules.get(name)
        if part is not None and there is not None and part is not there:
            keep_order(part, there)


def computed(model: nn.Module) -> dict[int, torch.Tensor]:
    """A memo for `deepcopy`, with which it copies a model with pruning masks or weight norm too.

    They keep a weight as a plain attribute, computed anew in each call; torch copies no tensor that was computed with
    gradients.
    """
    attributes = [value for module in model.modules() for value in vars(module).values()]
    return {id(t): t.detach().clone() for t in attributes if isinstance(t, torch.Tensor) and not t.is_leaf}


def wrapper_kind(tensors: Iterable[object]) -> str:
    """The type of the first tensor that holds its values in others, as quantised ones do; empty if none does."""
    kinds = (type(tensor) for tensor in tensors if is_traceable_wrapper_subclass(tensor))
    return next((f"{kind.__module__}.{kind.__qualname__}" for kind in kinds), "")


def list_numbered(module: nn.Module) -> None:
    """Let the containers whose parts are numbered be lists again, which can be indexed and counted.

    A graph module holds the parameters of `blocks.0.norm1` in bare modules, whatever the model had there.
    """
    for parent in reversed(list(module.modules())):  # from the inside out, as lists hold lists
        for name, child in list(parent.named_children()):
            parts = dict(child.named_children())
            numbers = [str(place) for place in range(len(parts))]
            holds_parts_only = type(child) is nn.Module and not child._parameters and not child._buffers
            if numbers and holds_parts_only and parts.keys() == set(numbers):
                setattr(parent, name, nn.ModuleList(parts[number] for number in numbers).train(child.training))
