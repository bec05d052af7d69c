"""What a model says of itself to optimisers, loaders and people, kept for its converted form to say too.

1. Plain data that is an attribute of the model, such as timm's `pretrained_cfg`, `num_classes` or `embed_dim`.
2. `no_weight_decay()` and `no_weight_decay_keywords()`: which parameters must not decay.
3. `group_matcher(coarse)`: which parameters are of which layer, for learning rates that decay from layer to layer.

Names of parameters are the model's own, so what is said of them still holds.
"""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

WITHOUT_ARGUMENTS = ("no_weight_decay", "no_weight_decay_keywords")
GROUPS = "group_matcher"

_PLAIN = (bool, int, float, str, torch.dtype, torch.device, type(None))


@dataclass(frozen=True)
class Answers:
    """What a model said of itself when it was converted.

    Attributes:
        attributes: Plain data, by name.
        returned: By the name of a method without arguments, what it returned.
        groups: What `group_matcher` returned, by whether coarse groups were wanted; empty where there is none.
    """

    attributes: Mapping[str, Any]
    returned: Mapping[str, Any]
    groups: Mapping[bool, Any]

    def __contains__(self, name: str) -> bool:
        return name in self.attributes or name in self.returned or (name == GROUPS and bool(self.groups))

    def get(self, name: str) -> Any:
        """The attribute of that name, or the method; what a method returns may be changed by who asked.

        Raises:
            KeyError: The model had none.
        """
        if name in self.returned:
            return partial(deepcopy, self.returned[name])
        return self._groups if name == GROUPS and self.groups else self.attributes[name]

    def _groups(self, coarse: bool = False) -> Any:
        return deepcopy(self.groups[bool(coarse)])


def answers_of(model: nn.Module) -> Answers:
    """Ask a model."""
    attributes = {
        name: deepcopy(value)
        for name, value in vars(model).items()
        if not name.startswith("_") and name != "training" and _is_plain(value)
    }
    returned = {name: deepcopy(getattr(model, name)()) for name in WITHOUT_ARGUMENTS if _has_method(model, name)}
    groups = {}
    if _has_method(model, GROUPS):
        groups = {coarse: deepcopy(getattr(model, GROUPS)(coarse=coarse)) for coarse in (False, True)}
    return Answers(attributes, returned, groups)


def _has_method(model: nn.Module, name: str) -> bool:
    return callable(getattr(model, name, None))


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(map(_is_plain, value.keys())) and all(map(_is_plain, value.values()))
    if isinstance(value, (list, tuple, set, frozenset)):
        return all(map(_is_plain, value))
    if is_dataclass(value) and not isinstance(value, type):
        return all(_is_plain(getattr(value, field.name)) for field in fields(value))
    return isinstance(value, _PLAIN)
