"""A converted model as a program that stands by itself: tensors in, tensors out, on a device and in a number type."""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.graph import CodeGen, _PyTreeCodeGen
from torch.fx.node import map_aggregate
from torch.utils._pytree import tree_leaves, tree_unflatten

from idlefx.deploy.io_schema import Structure, numbered, structure_of, tensor_names
from idlefx.deploy.parity import Inputs, example_of
from idlefx.errors import ArtifactError, InputError, first_line
from idlefx.graph.queries import output_of, placeholders, value
from idlefx.graph.sizes import formula
from idlefx.graph.state import buffers_kept
from idlefx.runtime.module import IdleModule, conversion_of, converted
from idlefx.utils.devices import present

BatchRange = tuple[int, int]


@dataclass(frozen=True)
class Program:
    """A model without the Python around it.

    Attributes:
        idle: The moved copy in eval mode, which is called like the original.
        module: The same on tensors alone: it takes and returns them in the order of their names.
        batch: Fewest and most images.
        tensors: Example inputs of `module`.
        results: What `module` makes of them.
        arguments: The structure of the inputs, by argument name.
        result: The structure of the output.
    """

    idle: IdleModule
    module: fx.GraphModule
    batch: BatchRange
    tensors: tuple[torch.Tensor, ...]
    results: tuple[torch.Tensor, ...]
    arguments: Structure
    result: Structure

    @property
    def input_names(self) -> list[str]:
        """Dotted names of the tensors that come in."""
        return [name for _, name in sorted(tensor_names(self.arguments, ""))]

    @property
    def output_names(self) -> list[str]:
        """Dotted names of the tensors that go out."""
        return [name or "output" for _, name in sorted(tensor_names(self.result, ""))]

    @property
    def input_shapes(self) -> list[list[int | str]]:
        """Shapes of the tensors that come in; a size that varies is a formula of the "batch"."""
        return [self._shape(node) for node in placeholders(self.module.graph)]

    @property
    def free(self) -> list[bool]:
        """Of each tensor that comes in, whether its first dimension is a batch that varies."""
        return [shape[:1] == ["batch"] for shape in self.input_shapes]

    @property
    def output_shapes(self) -> list[list[int | str]]:
        """Shapes of the tensors that go out."""
        return [self._shape(node) for node in tree_leaves(output_of(self.module.graph).args)]

    def _shape(self, node: fx.Node) -> list[int | str]:
        fewest, most = self.batch
        return [formula(size, "batch" if fewest < most else fewest) for size in node.meta["val"].shape]

    def export(self) -> torch.export.ExportedProgram:
        """The program, whose batch is free in its range."""
        fewest, most = self.batch
        images = torch.export.Dim("batch", min=fewest, max=most) if fewest < most else None
        shapes = tuple({0: images} if free else None for free in self.free)
        with torch.no_grad():
            return torch.export.export(self.module, self.tensors, dynamic_shapes=shapes)


def make_program(
    idle: IdleModule,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    batch: Sequence[int] = (1, 1024),
) -> Program:
    """Make a model portable; the model itself is not touched.

    Args:
        idle: A converted model.
        device: Where the program is to run; where the model is, by default.
        dtype: Its number type; the model's by default.
        batch: Fewest and most images; where the model fixes its batch, that is taken.

    Raises:
        InputError: The batch is no range, or inputs or outputs are not plain.
        ArtifactError: The model, traced elsewhere, does not run on that device or in that type.
    """
    idle = converted(idle)
    conversion = conversion_of(idle)
    moved = _moved(idle, device, dtype)
    fewest, most = batch = _range(batch) if conversion.batch_free else _only(moved)
    example = example_of(moved, max(fewest, min(2, most)))
    module, arguments, result = _flat(moved, example)
    tensors = tuple(leaf for leaf in tree_leaves(example) if isinstance(leaf, torch.Tensor))
    return Program(moved, module, batch, tensors, _run(module, tensors), arguments, result)


def _range(batch: Sequence[int]) -> BatchRange:
    match batch:
        case (int(fewest), int(most)) if 1 <= fewest <= most:
            return fewest, most
    raise InputError(f"package: batch must be the fewest and the most images, such as (1, 1024), got {batch!r}")


def _only(idle: IdleModule) -> BatchRange:
    images = max((t for t in tree_leaves(example_of(idle)) if isinstance(t, torch.Tensor)), key=torch.numel)
    return len(images), len(images)


def _moved(idle: IdleModule, device: str | torch.device | None, dtype: torch.dtype | None) -> IdleModule:
    """A copy elsewhere; the devices and the number type that its trace has written into the graph move too."""
    tensors = [*idle.parameters(), *idle.buffers()]
    home = present(device if device is not None else next((t.device for t in tensors), "cpu"))
    moved = deepcopy(idle).eval()
    holders = placeholders(moved.graph)
    inputs = [tensor for node in holders if (tensor := value(node)) is not None]
    before = next(tensor.dtype for tensor in [*inputs, *tensors] if tensor.is_floating_point())
    after = before if dtype is None else dtype
    if not (isinstance(after, torch.dtype) and after.is_floating_point):
        raise InputError(f"package: dtype must be a floating point type such as torch.bfloat16, got {after!r}")

    def literal(argument: Any) -> Any:
        if isinstance(argument, torch.device):
            return home
        return after if argument is before else argument

    for node in moved.graph.nodes:
        node.args, node.kwargs = map_aggregate(node.args, literal), map_aggregate(node.kwargs, literal)
    for node in holders:
        if (tensor := value(node)) is not None:
            node.meta["val"] = tensor.to(home, after if tensor.is_floating_point() else tensor.dtype)
    moved.to(home, after)
    moved.recompile()
    return moved


def _flat(idle: IdleModule, example: Inputs) -> tuple[fx.GraphModule, Structure, Structure]:
    """The model on tensors alone, and how its arguments and its result are made of them."""
    graph, leaves = deepcopy(idle.graph), tree_leaves(example)
    codegen, out = graph._codegen, output_of(graph)
    assert isinstance(codegen, _PyTreeCodeGen)
    names, in_spec, out_spec = codegen.pytree_info
    assert out_spec is not None
    results: list[Any] = tree_leaves(out.args)
    if sizes := [leaf for leaf in results if isinstance(leaf, fx.Node) and value(leaf) is None]:
        raise InputError(
            f"package: the output holds `{sizes[0]}`, a number that follows the batch; wrap the model so that it "
            "returns tensors and constants only"
        )
    args, kwargs = tree_unflatten(numbered(leaves, torch.Tensor), in_spec)
    result = tree_unflatten(numbered(results, fx.Node), out_spec)

    for holder, leaf in zip(placeholders(graph), leaves, strict=True):
        if not isinstance(leaf, torch.Tensor):  # a setting, whose value the trace has built in
            graph.erase_node(holder)
    out.args = (tuple(leaf for leaf in results if isinstance(leaf, fx.Node)),)
    graph.set_codegen(CodeGen())
    arguments = dict(zip(names, [*args, *kwargs.values()], strict=True))
    return fx.GraphModule(idle, graph, "Program"), structure_of(arguments, ""), structure_of(result, "output")


def _run(module: fx.GraphModule, tensors: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    try:
        with torch.no_grad(), buffers_kept(module):
            results: tuple[torch.Tensor, ...] = module(*(tensor.clone() for tensor in tensors))
            return tuple(result.clone() for result in results)
    except Exception as error:
        kind = str(tensors[0].dtype).removeprefix("torch.")
        raise ArtifactError(
            f"package: the model does not run on {tensors[0].device.type} in {kind}: {first_line(error)}; it was "
            "traced in another place or type: move the model itself there first, then convert and package it"
        ) from error
