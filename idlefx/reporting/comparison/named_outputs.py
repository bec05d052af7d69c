"""The tensors that a model returns, each with a name: the way to it through dicts, data classes, tuples and lists."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

ALONE = "output"  # the name of a tensor that is returned by itself


def named_outputs(output: Any) -> dict[str, Tensor]:
    """The tensors of an output by name, in order.

    `{"logits": x, "hidden": (y, z)}` has the names `logits`, `hidden.0` and `hidden.1`, whatever kind of container
    holds them: an artifact returns a dict where the model returned an output of Hugging Face.
    """
    return dict(_walk(output, ""))


def _walk(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name or ALONE, value
        return
    for key, part in _parts(value):
        yield from _walk(part, f"{name}.{key}" if name else str(key))


def _parts(value: Any) -> Iterable[tuple[Any, Any]]:
    if isinstance(value, Mapping):
        return value.items()
    if is_dataclass(value) and not isinstance(value, type):
        return [(field.name, getattr(value, field.name)) for field in fields(value)]
    if hasattr(value, "_asdict"):
        return value._asdict().items()
    if isinstance(value, (list, tuple)):
        return enumerate(value)
    leaves = tree_leaves(value)  # of a container that somebody registered with torch
    return () if len(leaves) == 1 and leaves[0] is value else enumerate(leaves)
