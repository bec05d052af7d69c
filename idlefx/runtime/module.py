"""The result of a conversion: a graph module that stays what its model was to its users."""

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.fx import _pytree as fx_pytree
from torch.fx.graph import _PyTreeCodeGen
from torch.utils._pytree import tree_leaves

from idlefx.errors import InputError
from idlefx.graph.queries import by_name
from idlefx.graph.state import adopt, owner_of
from idlefx.records import BlockTable, Plan


@dataclass(frozen=True)
class Form:
    """What a model does in one mode.

    Attributes:
        root: Holds the tensors that the graphs read.
        source: The graph as it was captured.
        plan: The plan, whose blocks are nodes of that graph.
        graph: The graph as it was rewritten.
    """

    root: nn.Module
    source: fx.Graph
    plan: Plan
    graph: fx.Graph


class IdleModule(fx.GraphModule):
    """A Vision Transformer in which tokens idle; eager, differentiable, and free in its batch size.

    Signature, output structure, and the names of parameters and buffers are the original's, so checkpoints load
    both ways. Where train mode runs other operations than eval mode, `.train()` and `.eval()` swap the graph.

    Attributes:
        plan: Which block keeps how many image tokens.
        blocks: The table of the model's blocks.
    """

    plan: Plan
    blocks: BlockTable

    def __init__(self, evaluation: Form, training: Form, facts: dict[str, Any]) -> None:
        super().__init__(evaluation.root, evaluation.graph, "IdleModule")
        forms, plan = {False: evaluation, True: training}, evaluation.plan
        graphs = {graph: form.root for form in forms.values() for graph in (form.graph, form.source)}
        for graph, root in graphs.items():
            _add_constants(self, root, graph)
        adopt(self, evaluation.root)
        self.meta["idlefx"] = {
            **facts,
            "plan": plan,
            "graphs": {mode: form.graph for mode, form in forms.items()},
            "sources": {mode: (form.source, form.plan) for mode, form in forms.items()},
        }
        for name, records in (("plan", plan), ("blocks", plan.blocks)):
            own = self._modules.get(name)
            if own is not None:  # most models call their blocks so: one attribute serves both
                own.__class__ = _Listing
                own.records = records  # type: ignore[assignment]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            facts = self.__dict__.get("meta", {}).get("idlefx")
            if facts is None or name not in ("plan", "blocks"):
                raise
            return facts["plan"] if name == "plan" else facts["plan"].blocks

    def train(self, mode: bool = True) -> "IdleModule":
        """Set train or eval mode, and the graph that belongs to it."""
        super().train(mode)
        graph = self.meta["idlefx"]["graphs"][mode]
        if self.graph is not graph:
            self.graph = graph
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "IdleModule":
        copied: IdleModule = super().__deepcopy__(memo)  # type: ignore[assignment]
        tensors = [*self.named_parameters(remove_duplicate=False), *self.named_buffers(remove_duplicate=False)]
        for name, tensor in tensors:  # those that the graph of the present mode does not read
            _place(copied, name, deepcopy(tensor, memo))
        adopt(copied, self)
        return copied


def check_converted(model: object) -> None:
    """Tell a converted model from any other.

    Raises:
        InputError: It was not converted.
    """
    if not isinstance(model, IdleModule):
        raise InputError(f"model: a {type(model).__name__} was not converted; give what idlefx.convert returns")


class _Listing(nn.Module):
    """The model's own submodule, which also lists the records that its name promises on an `IdleModule`."""

    records: Plan | BlockTable

    def __getitem__(self, index: Any) -> Any:
        return self.records[index]

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.records)

    def __str__(self) -> str:
        return str(self.records)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "records":
                raise
            return getattr(self.records, name)


def _add_constants(module: nn.Module, root: nn.Module, graph: fx.Graph) -> None:
    """Give `module` the constants of `root` that only this graph reads, under names that are free."""
    for node in graph.find_nodes(op="get_attr"):
        path, _, leaf = str(node.target).rpartition(".")
        tensor = getattr(root.get_submodule(path), leaf)
        owner, _ = owner_of(module, str(node.target))
        if getattr(owner, leaf, tensor) is not tensor:
            node.target += "_in_training"
        _place(module, str(node.target), tensor)


def _place(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Let a module have a parameter or buffer of that name, if it has none."""
    owner, leaf = owner_of(module, name)
    if hasattr(owner, leaf):
        return
    if isinstance(tensor, nn.Parameter):
        owner.register_parameter(leaf, tensor)
    else:
        owner.register_buffer(leaf, tensor)


def selections(idle: IdleModule, *args: Any, **kwargs: Any) -> dict[int, torch.Tensor]:
    """Which tokens work in each idling block.

    Args:
        idle: A converted model.
        *args: Its inputs.
        **kwargs: Its inputs by keyword.

    Returns:
        By block index, the positions (B, P + K) of prefix and kept image tokens, ascending.
    """
    wanted = {s.block: by_name(idle.graph)[f"idle_{s.block}_index"] for s in idle.plan if s.idles}
    recorder = _Recorder(idle, set(wanted.values()))
    flat = _flat_inputs(idle.graph, args, kwargs)
    with torch.no_grad():
        recorder.run(*flat, enable_io_processing=False)
    return {block: recorder.seen[node] for block, node in wanted.items()}


def _flat_inputs(graph: fx.Graph, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """Inputs in the order of the placeholders; keywords in the order of the trace, not of the caller."""
    spec = graph._codegen.pytree_info.in_spec if isinstance(graph._codegen, _PyTreeCodeGen) else None
    return fx_pytree.tree_flatten_spec((args, kwargs), spec) if spec is not None else tree_leaves((args, kwargs))


class _Recorder(fx.Interpreter):
    def __init__(self, module: nn.Module, wanted: set[fx.Node]) -> None:
        super().__init__(module)
        self.wanted, self.seen = wanted, dict[fx.Node, torch.Tensor]()

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n in self.wanted:
            self.seen[n] = result
        return result
