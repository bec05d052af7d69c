"""Nested inputs and outputs, described in plain data that another process can read.

A structure is a tensor, `{"tensor": 0}`, a value that is part of the program, `{"value": None}`, or a container of
structures: `{"list": [...]}`, `{"tuple": [...]}` or `{"fields": {...}}`, which stands for whatever names its parts.
"""

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch

from idlefx.errors import InputError

Structure = dict[str, Any]


class Fields(dict[str, Any]):
    """Named parts, as items and as attributes: what becomes of a dict, a data class or a Hugging Face output."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"there is no {name}; there are {', '.join(self)}") from None


class _Slot(int):
    """The place of a tensor among all tensors, standing for it."""


def numbered(leaves: Iterable[Any], kind: type) -> list[Any]:
    """The leaves, those of that kind replaced by their places among one another, for `structure_of`."""
    count = iter(range(sys.maxsize))
    return [_Slot(next(count)) if isinstance(leaf, kind) else leaf for leaf in leaves]


def structure_of(value: Any, where: str) -> Structure:
    """The structure of a value, whose leaves are `numbered`.

    Raises:
        InputError: It holds something that is neither a tensor, nor plain data, nor a container of them.
    """
    if isinstance(value, _Slot):
        return {"tensor": int(value)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return {"value": value}
    named = _named(value)
    if named is not None:
        return {"fields": {str(key): structure_of(part, f"{where}.{key}") for key, part in named.items()}}
    if isinstance(value, (list, tuple)):
        parts = [structure_of(part, f"{where}.{place}") for place, part in enumerate(value)]
        return {"list" if isinstance(value, list) else "tuple": parts}
    raise InputError(
        f"package: `{where}` is a {type(value).__name__}; only tensors, numbers, strings and lists, tuples, dicts and "
        "data classes of them can be packaged: wrap the model so that it takes and returns these"
    )


def _named(value: Any) -> Mapping[Any, Any] | None:
    if isinstance(value, Mapping):
        return value
    if is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    return value._asdict() if hasattr(value, "_asdict") else None


def fill(structure: Structure, tensors: Sequence[Any]) -> Any:
    """The value of that structure with these tensors."""
    (kind, content), *_ = structure.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "value":
        return content
    if kind == "fields":
        return Fields({name: fill(part, tensors) for name, part in content.items()})
    return {"list": list, "tuple": tuple}[kind](fill(part, tensors) for part in content)


def tensor_names(structure: Structure, name: str) -> Iterator[tuple[int, str]]:
    """The place and the dotted name of each tensor."""
    (kind, content), *_ = structure.items()
    if kind == "tensor":
        yield content, name
    elif kind != "value":
        parts = content.items() if kind == "fields" else enumerate(content)
        for key, part in parts:
            yield from tensor_names(part, f"{name}.{key}" if name else str(key))


def take(structure: Structure, value: Any, where: str, into: dict[int, torch.Tensor]) -> None:
    """Collect the tensors of a value that is to have that structure.

    Raises:
        InputError: It has another one.
    """
    (kind, content), *_ = structure.items()
    if kind == "tensor":
        if not isinstance(value, torch.Tensor):
            raise InputError(f"input: `{where}` must be a tensor, got {type(value).__name__}")
        into[content] = value
    elif kind == "value":
        if type(value) is not type(content) or value != content:
            raise InputError(f"input: `{where}` was {content!r} when the model was packaged and cannot be {value!r}")
    else:
        parts = content if kind == "fields" else dict(enumerate(content))
        named = _named(value)
        given = dict(enumerate(value)) if named is None and isinstance(value, (list, tuple)) else named
        if given is None or given.keys() != parts.keys():
            held = type(value).__name__ if given is None else list(given)
            raise InputError(f"input: `{where}` must hold {list(parts)}, got {held}")
        for key, part in parts.items():
            take(part, given[key], f"{where}.{key}", into)
