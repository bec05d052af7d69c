"""The parameters and buffers of a module: the same names, and the same objects, as those of the model it came from."""

import torch
from torch import nn


def adopt(module: nn.Module, model: nn.Module) -> None:
    """Make the state of `module` that of `model`: the same names, and the same objects behind them."""
    wanted = model.state_dict(keep_vars=True)
    present = {name for name, _ in [*module.named_parameters(remove_duplicate=False), *module.named_buffers()]}
    for name, tensor in wanted.items():
        if name not in present and isinstance(tensor, torch.Tensor):
            owner, leaf = owner_of(module, name)
            if isinstance(tensor, nn.Parameter):
                owner.register_parameter(leaf, tensor)
            else:
                owner.register_buffer(leaf, tensor)
    for name, _ in list(module.named_buffers()):
        if name not in wanted:  # a constant of the trace, or a buffer that the model does not save either
            owner, leaf = owner_of(module, name)
            owner._non_persistent_buffers_set.add(leaf)


def owner_of(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The submodule that a dotted name lives in, made where it is missing, and the last part of the name."""
    *path, leaf = name.split(".")
    for part in path:
        if module._modules.get(part) is None:
            module.add_module(part, nn.Module())
        module = module.get_submodule(part)
    return module, leaf


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
