"""What a model says of itself to optimisers, loaders and people, kept for its converted form to say too.

1. Plain data that is an attribute of the model or of its class, such as timm's `pretrained_cfg`, `num_classes` or
   `embed_dim`, and a record: whatever has `to_dict`, such as Hugging Face's `config`, or holds plain data alone, such
   as the `feature_info` of timm's feature extractors.
2. Methods without arguments that return plain data: which parameters must not decay, whether the model generates text.
3. `group_matcher(coarse)`: which parameters are of which layer, for learning rates that decay from layer to layer.
4. `get_classifier()`, the module that holds the parameters of the head.
5. `device` and `dtype`, where the model has them: those of the parameters, wherever they have been moved to.

Names of parameters are the model's own, so what is said of them still holds. The model's other methods are known by
name, to be refused in words.
"""

import sys
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from typing import Any

import torch
from torch import fx, nn

from idlefx.errors import MethodError

WITHOUT_ARGUMENTS = ("no_weight_decay", "no_weight_decay_keywords", "can_generate")
GROUPS = "group_matcher"
HEAD = "get_classifier"
OF_PARAMETERS = ("device", "dtype")

_PLAIN = (bool, int, float, str, torch.dtype, torch.device, type(None))


@dataclass(frozen=True)
class Answers:
    """What a model said of itself when it was converted.

    Attributes:
        attributes: Plain data and records, by name.
        returned: By the name of a method without arguments, what it returned.
        groups: What `group_matcher` returned, by whether coarse groups were wanted; empty where there is none.
        head: The name of the module that `get_classifier` returned; empty where there is none.
        of_parameters: Which of `OF_PARAMETERS` the model had.
        kind: The name of the model's class.
        methods: The names of its methods.
    """

    attributes: Mapping[str, Any]
    returned: Mapping[str, Any]
    groups: Mapping[bool, Any]
    head: str
    of_parameters: frozenset[str]
    kind: str
    methods: frozenset[str]

    def get(self, name: str, idle: nn.Module) -> Any:
        """The attribute of that name, or the method; what a method returns may be changed by who asked.

        Args:
            name: What is asked for.
            idle: The converted model.

        Raises:
            MethodError: It is a method of the model that cannot be kept.
            AttributeError: The model had none.
        """
        if name in self.attributes:
            return self.attributes[name]
        if name in self.returned:
            return partial(deepcopy, self.returned[name])
        if name == GROUPS and self.groups:
            return self._groups
        if name == HEAD and any(self.head == path for path, _ in idle.named_modules() if path):
            return partial(idle.get_submodule, self.head)
        if name in self.of_parameters:
            tensors = (tensor for tensor in (*idle.parameters(), *idle.buffers()) if tensor.is_floating_point())
            return getattr(next(tensors), name)
        if name in self.methods:
            raise MethodError(
                f"model: `{name}` of {self.kind} is not kept, as a converted model is the graph of its forward alone. "
                "What changes the model goes before converting; to compute with it, convert a module whose forward "
                f'calls it, or take torch.compile(model.{name}, backend="idlefx", options=…); for the rest, load the '
                "state_dict of the converted model into the model"
            )
        raise AttributeError(f"'{type(idle).__name__}' object has no attribute '{name}'")

    def _groups(self, coarse: bool = False) -> Any:
        return deepcopy(self.groups[bool(coarse)])


def answers_of(model: nn.Module) -> Answers:
    """Ask a model."""
    kinds = [kind for kind in reversed(type(model).__mro__) if not issubclass(nn.Module, kind)]
    attributes = {
        name: deepcopy(value)
        for holder in (*kinds, model)
        for name, value in vars(holder).items()
        if not name.startswith("_") and name != "training" and (_is_plain(value) or _is_record(value))
    }
    if hasattr(type(model), "loss_function"):
        attributes["accepts_loss_kwargs"] = False  # asked for by Hugging Face's Trainer: the trace takes no others
    returned = {name: deepcopy(getattr(model, name)()) for name in WITHOUT_ARGUMENTS if _has_method(model, name)}
    groups = {}
    if _has_method(model, GROUPS):
        groups = {coarse: deepcopy(getattr(model, GROUPS)(coarse=coarse)) for coarse in (False, True)}
    return Answers(
        attributes,
        returned,
        groups,
        _head(model),
        frozenset(name for name in OF_PARAMETERS if hasattr(model, name)),
        type(model).__name__,
        frozenset(name for name in dir(type(model)) if name[0] != "_" and not hasattr(fx.GraphModule, name)),
    )


def _head(model: nn.Module) -> str:
    head = getattr(model, HEAD)() if _has_method(model, HEAD) else None
    return next((name for name, module in model.named_modules() if module is head), "")


def _has_method(model: nn.Module, name: str) -> bool:
    return callable(getattr(model, name, None))


def _is_record(value: Any) -> bool:
    kind = type(value)
    library = sys.modules.get(kind.__module__) if kind.__module__ != "__main__" else None
    named = getattr(library, kind.__qualname__, None) is kind  # else a file of the converted model could not be read
    if not named or isinstance(value, (type, nn.Module)) or hasattr(kind, "__get__"):  # no methods of the class
        return False
    members = getattr(value, "__dict__", None)
    only_plain = bool(members) and _is_plain(members) and not callable(value)
    return only_plain or callable(getattr(value, "to_dict", None))


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(map(_is_plain, value.keys())) and all(map(_is_plain, value.values()))
    if isinstance(value, (list, tuple, set, frozenset)):
        return all(map(_is_plain, value))
    if is_dataclass(value) and not isinstance(value, type):
        return all(_is_plain(getattr(value, field.name)) for field in fields(value))
    return isinstance(value, _PLAIN)
