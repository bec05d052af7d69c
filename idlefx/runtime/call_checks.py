"""What a call of a converted model must be like, because the trace has built it in.

1. Every size of an input is that of the example, but for a batch that is free.
2. A tensor of whole numbers or truth values has the example's number type; floating point ones may be of any width,
   so that a model can be moved to another one, or run under autocast.
3. A setting, whatever is no tensor, has the value it was traced with; one that was not given has its default. So has
   an array, whose numbers the trace has built in.

A call of something else is refused. `torch.compile` and `torch.export` trace these checks; they become guards.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.graph import _PyTreeCodeGen
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from idlefx.errors import InputError
from idlefx.graph.queries import placeholders
from idlefx.graph.sizes import formula
from idlefx.runtime.expected import ExpectedArray, ExpectedSetting, ExpectedTensor, same, told

_MISSING = object()


@dataclass(frozen=True)
class CallChecks:
    """How the user's model is called, and what of it the trace has built in.

    Attributes:
        signature: That of the user's forward.
        positional: Its arguments that may be given by position, in order.
        rest: Its `*args`, by name; empty where it has none.
        defaults: What an argument is if it is not given.
        expected: By argument, what the example held, in the order in which the graph takes them: an expectation, or
            a container of such.
        arrays: Arrays by argument, which the graph does not take.
    """

    signature: inspect.Signature
    positional: tuple[str, ...]
    rest: str
    defaults: Mapping[str, Any]
    expected: Mapping[str, Any]
    arrays: Mapping[str, ExpectedArray]

    def in_order(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
        """The inputs in the order of the graph.

        Raises:
            InputError: The trace has built in something else.
            TypeError: The model's forward takes no such arguments.
        """
        named = dict(zip(self.positional, args, strict=False))
        for place, value in enumerate(args[len(self.positional) :]):
            named[f"{self.rest}_{place}"] = value  # as torch.export calls them
        too_many = len(args) > len(self.positional) and not self.rest
        if too_many or any(name in named for name in kwargs):
            self.signature.bind(*args, **kwargs)  # which says what is wrong, as Python does
        named.update(kwargs)
        inputs = []
        # Before Dynamo sees a call, `idlefx.compile` has held its arrays to the example, and takes them away.
        arrays = {} if torch.compiler.is_compiling() and not named.keys() & self.arrays.keys() else self.arrays
        for name, expected in {**self.expected, **arrays}.items():
            value = named.pop(name, self.defaults.get(name, _MISSING))
            optional = value is None and name in self.defaults and not isinstance(expected, ExpectedSetting)
            if value is _MISSING or optional:
                self.signature.bind(*args, **kwargs)
                raise InputError(f"input: `{name}` was given when the model was traced; give it, or convert without it")
            _check(value, expected, name)
            if name in self.expected:
                inputs.append(value)
        for name, value in named.items():
            if name not in self.defaults or not same(value, self.defaults[name]):
                self.signature.bind(*args, **kwargs)
                raise InputError(
                    f"input: `{name}` was not given when the model was traced and cannot be {told(value)}; convert "
                    "the model with example_inputs that hold it"
                )
        return inputs

    def flat(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
        """The tensors and settings of the inputs in the order of the placeholders, whatever the caller's dicts have.

        Raises:
            InputError: The trace has built in something else.
            TypeError: The model's forward takes no such arguments.
        """
        inputs = zip(self.in_order(args, kwargs), self.expected.values(), strict=True)
        return [leaf for value, expected in inputs for leaf in _leaves(value, expected)]


def checks_of(forward: Callable[..., Any], graph: fx.Graph, arrays: Mapping[str, Any]) -> CallChecks:
    """What calls of a traced model must be like.

    Args:
        forward: The user's, bound to the model.
        graph: What was traced of it.
        arrays: What of its inputs the trace has built in, by argument.
    """
    codegen = graph._codegen
    assert isinstance(codegen, _PyTreeCodeGen)
    names, in_spec, _ = codegen.pytree_info
    args, kwargs = tree_unflatten([_expected(node.meta["val"]) for node in placeholders(graph)], in_spec)
    signature = inspect.signature(forward)
    # Annotations may be anything; a copy of the model, or a file, need not hold them.
    plain = [each.replace(annotation=inspect.Parameter.empty) for each in signature.parameters.values()]
    by_position = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return CallChecks(
        inspect.Signature(plain),
        tuple(each.name for each in plain if each.kind in by_position),
        next((each.name for each in plain if each.kind is inspect.Parameter.VAR_POSITIONAL), ""),
        {each.name: each.default for each in plain if each.default is not inspect.Parameter.empty},
        dict(zip(names, [*args, *kwargs.values()], strict=True)),
        {name: ExpectedArray(array) for name, array in arrays.items()},
    )


def checked(forward: Callable[..., Any], checks: CallChecks) -> Callable[..., Any]:
    """The forward of a graph, behind the checks, with the signature of the user's."""

    @functools.wraps(forward)
    def checked_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return forward(self, *checks.in_order(args, kwargs))

    itself = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    checked_forward.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [itself, *checks.signature.parameters.values()]
    )
    return checked_forward


def _expected(value: Any) -> ExpectedTensor | ExpectedSetting:
    if not isinstance(value, torch.Tensor):
        return ExpectedSetting(value)
    sizes = [formula(size, "batch") for size in value.shape]
    return ExpectedTensor(tuple(size if isinstance(size, int) else None for size in sizes), value.dtype)


def _check(value: Any, expected: Any, where: str) -> None:
    """Hold an input, which may be a container, against what is expected of it."""
    if isinstance(expected, (ExpectedTensor, ExpectedSetting, ExpectedArray)):
        expected.check(value, where)
    elif isinstance(expected, Mapping) and isinstance(value, Mapping) and expected.keys() == value.keys():
        for key, part in expected.items():
            _check(value[key], part, f"{where}.{key}")
    elif isinstance(expected, (list, tuple)) and type(value) is type(expected) and len(value) == len(expected):
        for place, part in enumerate(expected):
            _check(value[place], part, f"{where}.{place}")
    else:
        leaves, spec = tree_flatten(value)
        if type(value) is not type(expected) or spec != tree_flatten(expected)[1]:
            raise InputError(
                f"input: `{where}` must hold what it held when the model was traced, {_outline(expected)}; got "
                f"{_outline(value)}"
            )
        for place, (leaf, part) in enumerate(zip(leaves, tree_leaves(expected), strict=True)):
            part.check(leaf, f"{where}.{place}")


def _leaves(value: Any, expected: Any) -> list[Any]:
    """The leaves of a container that was held against what is expected, in the order of that."""
    if isinstance(expected, Mapping):
        return [leaf for key, part in expected.items() for leaf in _leaves(value[key], part)]
    if isinstance(expected, (list, tuple)):
        return [leaf for each, part in zip(value, expected, strict=True) for leaf in _leaves(each, part)]
    return tree_leaves(value)


def _outline(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"{type(value).__name__} of {', '.join(map(str, value))}"
    return f"{type(value).__name__} of {len(value)}" if isinstance(value, (list, tuple)) else type(value).__name__
