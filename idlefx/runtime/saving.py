"""A converted model in a form that pickle takes: for `torch.save`, for other processes, and whatever else pickles.

Graphs become plain records, and parameters, buffers and layers go by name, so that the file needs nothing of the user's
own code, but idlefx, what registers operators and token scores, what layers were replaced by, and the library of the
model's configuration if it has one.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn

from idlefx.graph.state import owner_of
from idlefx.graph.storage import StoredGraph, restore, store
from idlefx.records import Plan
from idlefx.runtime.conversion import Conversion, Form
from idlefx.runtime.layers import layer_around


@dataclass(frozen=True)
class SavedForm:
    """What a model does in one mode; as `Form`."""

    source: StoredGraph
    plan: Plan
    graph: StoredGraph


@dataclass(frozen=True)
class SavedModule:
    """All of a converted model.

    Attributes:
        conversion: What it remembers, without what it does in each mode.
        evaluation: What it does in eval mode.
        training: What it does in train mode; the same object where the mode makes no difference.
        parts: Its parameters and buffers by name, and in place of those of its layers what stands there, by path.
        kept: The names of the tensors that a checkpoint holds too.
        modes: Of each of its modules, whether it is in train mode.
        attributes: What else its owner has written on it.
    """

    conversion: Conversion
    evaluation: SavedForm
    training: SavedForm
    parts: Mapping[str, torch.Tensor | nn.Module]
    kept: frozenset[str]
    modes: Mapping[str, bool]
    attributes: Mapping[str, Any]

    def remembered(self) -> Conversion:
        """What the model remembers, graphs and all."""
        evaluation = _loaded(self.evaluation)
        training = evaluation if self.training is self.evaluation else _loaded(self.training)
        return replace(self.conversion, evaluation=evaluation, training=training)

    def root(self) -> nn.Module:
        """A module of its parameters, buffers and layers."""
        root = nn.Module()
        for name, part in self.parts.items():
            owner, leaf = owner_of(root, name)
            if isinstance(part, nn.Module):
                owner.add_module(leaf, part)
            elif isinstance(part, nn.Parameter):
                owner.register_parameter(leaf, part)
            else:
                owner.register_buffer(leaf, part, persistent=name in self.kept)
        return root


def saved(idle: fx.GraphModule, conversion: Conversion) -> SavedModule:
    """All of a converted model, in a form that pickle takes.

    Args:
        idle: The model.
        conversion: What it remembers.

    Raises:
        InputError: Its graph calls something that has no name.
    """
    evaluation = _stored(conversion.evaluation)
    training = evaluation if conversion.training is conversion.evaluation else _stored(conversion.training)
    nothing: Any = None  # the graphs go beside it
    parts = dict[str, torch.Tensor | nn.Module]()
    tensors = (*idle.named_parameters(remove_duplicate=False), *idle.named_buffers(remove_duplicate=False))
    for name, tensor in tensors:
        layer = layer_around(name, conversion.called)
        parts[layer or name] = idle.get_submodule(layer) if layer else tensor
    for layer in conversion.called:  # also what has no tensors
        parts.setdefault(layer, idle.get_submodule(layer))
    return SavedModule(
        replace(conversion, evaluation=nothing, training=nothing),
        evaluation,
        training,
        parts,
        frozenset(idle.state_dict(keep_vars=True)),
        {name: module.training for name, module in idle.named_modules()},
        own_attributes(idle),
    )


def own_attributes(idle: nn.Module) -> dict[str, Any]:
    """What the owner of a converted model has written on it."""
    return {name: value for name, value in vars(idle).items() if name[0] != "_" and name not in ("training", "meta")}


def _stored(form: Form) -> SavedForm:
    return SavedForm(store(form.source), form.plan, store(form.graph))


def _loaded(form: SavedForm) -> Form:
    return Form(restore(form.source), form.plan, restore(form.graph))
