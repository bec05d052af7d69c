"""The result of a conversion: a graph module that stays what its model was to its users."""

import warnings
from copy import deepcopy
from typing import Any

import torch
from torch import fx, nn
from torch.fx.graph import PythonCode
from torch.utils._pytree import tree_leaves

from idlefx.errors import InputError
from idlefx.graph.notes import KEY
from idlefx.graph.state import adopt, computed, keep_order, list_numbered, place
from idlefx.records import Plan
from idlefx.runtime import ops
from idlefx.runtime.conversion import Conversion
from idlefx.runtime.forwards import Forwards
from idlefx.runtime.layers import add_constants
from idlefx.runtime.parts import Owner, make_parts
from idlefx.runtime.saving import SavedModule, own_attributes, saved
from idlefx.runtime.swaps import check_containers, containers_of


class IdleModule(Owner, fx.GraphModule):
    """A Vision Transformer in which tokens idle; eager, differentiable, and free in its batch size.

    Signature, output structure, and the names of parameters and buffers are the original's, so checkpoints load
    both ways. Where train mode runs other operations than eval mode, `.train()` and `.eval()` swap the graph.
    Its graph calls linear layers, norms and convolutions, which may be changed; all other modules are containers.

    What the model says of itself, in plain data and to optimisers, it still says: `idle.num_classes`,
    `idle.pretrained_cfg`, `idle.no_weight_decay()`.

    What the model itself calls `plan`, `blocks` or `conversion` keeps its name; `idle.plan.blocks` is the table of
    blocks whatever the model calls its own.

    Attributes:
        conversion: What was asked for, and what became of it.
        plan: Which block keeps how many image tokens.
        blocks: The model's own `blocks`, if it has something of that name; else the table, as `plan.blocks`.
    """

    plan: Plan
    blocks: Any
    conversion: Conversion

    def __init__(self, conversion: Conversion, eval_root: nn.Module, train_root: nn.Module) -> None:
        """Make a module.

        Args:
            conversion: What it does in each mode.
            eval_root: Holds the tensors that the graphs of eval mode read.
            train_root: Holds those of train mode; not looked at where both modes do the same.
        """
        for form in (conversion.evaluation, conversion.training):
            for node in form.graph.find_nodes(op="call_function", target=torch.ops.aten.sym_size.int):
                node.target = ops.size_of
        super().__init__(eval_root, conversion.evaluation.graph, "IdleModule")
        roots = [(conversion.evaluation, eval_root)]
        if conversion.training is not conversion.evaluation:
            roots.append((conversion.training, train_root))
        for path in conversion.called:
            place(self, path, eval_root.get_submodule(path))
        for form, root in roots:
            for graph in (form.graph, form.source):
                add_constants(self, root, graph, conversion.called)
        adopt(self, eval_root)
        keep_order(self, eval_root)
        list_numbered(self)
        make_parts(self, conversion.graphs)
        self.meta[KEY] = conversion
        self._check_calls()
        self._guard_gradients()

    def _guard_gradients(self) -> None:
        if conversion_of(self).custom_gradient:
            self.register_forward_hook(_refuse_backward)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            conversion = self.__dict__.get("meta", {}).get(KEY)
            if conversion is None:
                raise
            if name in ("conversion", "plan", "blocks") and name not in conversion.answers.attributes:
                return conversion if name == "conversion" else getattr(conversion, name)
            return conversion.answers.get(name, self)

    def recompile(self) -> PythonCode:
        """Make the code of the graph anew, after it was edited; it refuses the calls that it did before."""
        code = super().recompile()
        self._check_calls()
        return code

    def _check_calls(self) -> None:
        """Put the checks of inputs before the forward that was made of the graph, once they are known."""
        conversion = self.__dict__.get("meta", {}).get(KEY)
        if conversion is not None:
            kind: Any = type(self)  # every graph module has a class of its own
            if "_forwards" not in vars(kind):
                kind._forwards = Forwards(conversion)
            kind.forward = kind._forwards.of(self.graph, self.code, kind.forward)

    def _slow_forward(self, *args: Any, **kwargs: Any) -> Any:  # what torch calls while TorchScript is tracing
        _speak_of_tracing()
        return super()._slow_forward(*args, **kwargs)  # type: ignore[no-untyped-call]

    def train(self, mode: bool = True) -> "IdleModule":
        """Set train or eval mode, and the graph that belongs to it.

        Raises:
            InputError: Train mode is asked for, and the model's gradients are not those of the original.
        """
        if mode:
            conversion_of(self).check_gradients()
        super().train(mode)
        graph = conversion_of(self).form(mode).graph
        if self.graph is not graph:
            self.graph = graph
        return self

    def __copy__(self) -> "IdleModule":
        copied = IdleModule(conversion_of(self), self, self).train(self.training)
        vars(copied).update(own_attributes(self))
        return copied

    def _replicate_for_data_parallel(self) -> "IdleModule":
        replica = self.__copy__()
        object.__setattr__(replica, "_is_replica", True)
        return replica

    def __reduce__(self) -> tuple[Any, ...]:
        return _load, (saved(self, conversion_of(self)),)

    def __deepcopy__(self, memo: dict[int, Any]) -> "IdleModule":
        memo.update(computed(self))
        copied: IdleModule = super().__deepcopy__(memo)  # type: ignore[assignment]
        tensors = [*self.named_parameters(remove_duplicate=False), *self.named_buffers(remove_duplicate=False)]
        for path in conversion_of(self).called:  # also those that the graph of the present mode does not call
            place(copied, path, deepcopy(self.get_submodule(path), memo))
        for name, tensor in tensors:
            place(copied, name, deepcopy(tensor, memo))
        adopt(copied, self)
        keep_order(copied, self)
        list_numbered(copied)
        make_parts(copied, conversion_of(self).graphs)
        copied._check_calls()
        vars(copied).update(deepcopy(own_attributes(self), memo))
        if _refuse_backward not in copied._forward_hooks.values():
            copied._guard_gradients()
        return copied


def _refuse_backward(idle: nn.Module, _: Any, result: Any) -> None:
    """Let a backward pass say that its gradients would not be those of the model; eval mode can be trained in too."""
    for tensor in tree_leaves(result) if torch.is_grad_enabled() else ():
        if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
            tensor.register_hook(lambda _: conversion_of(idle).check_gradients())


def _speak_of_tracing() -> None:
    if torch.onnx.is_in_onnx_export():
        raise InputError(
            "model: torch.onnx.export(…, dynamo=False) cannot export a converted model; use dynamo=True, or "
            "idlefx.package with a name that ends in .onnx"
        )
    warnings.warn(
        "torch.jit.trace writes the batch size of its example into a converted model, and takes no other; "
        "idlefx.package and torch.export leave it free",
        stacklevel=3,
    )


def conversion_of(model: object) -> Conversion:
    """What a converted model remembers, whatever names of its own it has.

    Raises:
        InputError: It was not converted.
    """
    conversion: Conversion = _unwrapped(model).meta[KEY]
    return conversion


def converted(model: object) -> IdleModule:
    """The converted model itself, also where `torch.compile` has wrapped it.

    Raises:
        InputError: It was not converted, or a container in it was replaced since.
    """
    idle = _unwrapped(model)
    check_containers(idle, containers_of(idle.graph))
    return idle


def _unwrapped(model: object) -> IdleModule:
    inner = model
    while isinstance(inner, nn.Module) and (wrapped := inner._modules.get("_orig_mod")) is not None:
        inner = wrapped
    if not isinstance(inner, IdleModule) or not isinstance(inner.meta.get(KEY), Conversion):
        raise InputError(f"model: a {type(model).__name__} was not converted; give what idlefx.convert returns")
    return inner


def _load(file: SavedModule) -> IdleModule:
    """What `IdleModule.__reduce__` makes pickle call."""
    root = file.root()
    idle = IdleModule(file.remembered(), root, root).train(file.modes[""])
    for name, module in idle.named_modules():
        module.training = file.modes.get(name, idle.training)
    vars(idle).update(file.attributes)
    return idle
