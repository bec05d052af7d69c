"""What counts as attention: one matcher per spelling, each naming q, k, v, mask and scale."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from idlefx.analysis.layouts import Layout
from idlefx.graph.notes import Spelled, note_of
from idlefx.graph.queries import argument, image_data, tensor_argument, value
from idlefx.graph.sizes import shape_of

aten = torch.ops.aten

_PASSING = (aten.to.dtype, aten._to_copy.default, aten.clone.default, aten.contiguous.default, aten.detach.default)
_PRODUCTS = (aten.matmul.default, aten.bmm.default)


@dataclass(frozen=True)
class Spelling:
    """An attention that is not written as `scaled_dot_product_attention`.

    Attributes:
        name: What the spelling is called in tables.
        out: The node that carries its result.
        query: Queries (…, N, D).
        key: Keys, transposed as they stand in the graph (…, D, N).
        value: Values (…, N, D).
        mask: Added to the scaled logits, or None.
        scale: What the logits are multiplied with.
        dropout: Probability that an attention weight is dropped.
    """

    name: str
    out: fx.Node
    query: fx.Node
    key: fx.Node
    value: fx.Node
    mask: fx.Node | None
    scale: float
    dropout: float


def match_softmax(softmax: fx.Node) -> Spelling | None:
    """`softmax(q @ kᵀ * scale + mask) @ v`, each part optional but the products."""
    if softmax.target not in (aten.softmax.int, aten._softmax.default):
        return None
    logits, dim = softmax.args[:2]
    rank = len(softmax.meta["val"].shape)
    if dim not in (-1, rank - 1) or not isinstance(logits, fx.Node):
        return None
    mask, scale = None, 1.0
    while logits.target not in _PRODUCTS:
        if len(logits.users) > 1 or not logits.all_input_nodes:
            return None
        first, other = logits.args[0], logits.args[1] if len(logits.args) > 1 else None
        number = float(other) if isinstance(other, (int, float)) else math.nan
        if logits.target is aten.mul.Tensor and number > 0:
            scale *= number
        elif logits.target is aten.div.Tensor and number > 0:
            scale /= number
        elif logits.target is aten.add.Tensor and scale == 1.0 and mask is None and isinstance(other, fx.Node):
            first, mask = _logits_first(logits)
            if mask is None:
                return None
        elif logits.target not in _PASSING:
            return None
        assert isinstance(first, fx.Node)
        logits = first
    weights, dropout = softmax, 0.0
    while True:
        if len(weights.users) != 1:
            return None
        user = next(iter(weights.users))
        if user.target is aten.dropout.default:
            dropout = float(argument(user, 1)) if argument(user, 2) else 0.0
        elif user.target not in _PASSING:
            break
        weights = user
    if user.target not in _PRODUCTS or user.args[0] is not weights or len(logits.users) > 1:
        return None
    query, key, values = tensor_argument(logits, 0), tensor_argument(logits, 1), tensor_argument(user, 1)
    return Spelling("matmul-softmax-matmul", user, query, key, values, mask, scale, dropout)


def _logits_first(add: fx.Node) -> tuple[Any, Any]:
    """Which operand of `logits + mask` is which: the logits come out of a product."""
    for logits, mask in (add.args[:2], add.args[1::-1]):
        source: Any = logits
        while isinstance(source, fx.Node) and source.target in (*_PASSING, aten.mul.Tensor, aten.div.Tensor):
            source = source.args[0]
        if isinstance(source, fx.Node) and source.target in _PRODUCTS and value(add) is not None:
            return logits, mask
    return None, None


SPELLINGS: tuple[Callable[[fx.Node], Spelling | None], ...] = (match_softmax,)


def match(node: fx.Node) -> Spelling | None:
    """The attention that is anchored at a node, if it can be written as `scaled_dot_product_attention`."""
    return next((matched for spelling in SPELLINGS if (matched := spelling(node)) is not None), None)


@dataclass(frozen=True)
class Core:
    """An attention in a normalised graph.

    Attributes:
        name: How it is spelled.
        out: The node of its result.
        query: Queries (…, N, D).
        key: Keys (…, N, D), or (…, D, N) if `transposed`.
        transposed: How the keys stand.
        scale: What the logits are multiplied with.
        scalings: Nodes that multiply or divide the logits further: by a number, or by one parameter for each head.
        softmax: The node of the softmax, where it is spelled out.
    """

    name: str
    out: fx.Node
    query: fx.Node
    key: fx.Node
    transposed: bool = False
    scale: float = 1.0
    scalings: tuple[fx.Node, ...] = ()
    softmax: fx.Node | None = None

    def key_layout(self, layout: Layout) -> Layout:
        """The layout of the keys as (…, N, D)."""
        return (*layout[:-2], layout[-1], layout[-2]) if self.transposed else layout


def find_cores(graph: fx.Graph) -> list[Core]:
    """Every attention of a normalised graph, in graph order; those that stay spelled out with their map too."""
    data = image_data(graph)
    cores = []
    for node in graph.nodes:
        if node.target is aten.scaled_dot_product_attention.default:
            note = note_of(node)
            name = note.attention if isinstance(note, Spelled) else "sdpa"
            scale = node.kwargs.get("scale")
            query, key = tensor_argument(node, 0), tensor_argument(node, 1)
            scale = shape_of(query)[-1] ** -0.5 if scale is None else scale
            cores.append(Core(name, node, query, key, scale=scale))
        elif node.target in (aten.softmax.int, aten._softmax.default):
            core = _spelled_out(node, data)
            cores += [core] if core is not None and core.out not in [c.out for c in cores] else []
    return cores


def _spelled_out(softmax: fx.Node, data: set[fx.Node]) -> Core | None:
    """An attention whose map is worked on between its products, such as by mixing the heads."""

    def nearest(
        step: Callable[[fx.Node], Iterable[fx.Node]], passes: Callable[[fx.Node], bool] = lambda _: True
    ) -> tuple[set[fx.Node], set[fx.Node]]:
        """The products of image data that a walk from the softmax meets first, and what it passes."""
        met, seen, stack = set(), set(), list(step(softmax))
        while stack:
            node = stack.pop()
            if node.target in _PRODUCTS and all(operand in data for operand in node.args[:2]):
                met.add(node)
            elif node in data and node not in seen and passes(node):
                seen.add(node)
                stack += step(node)
        return met, seen

    def is_map(node: fx.Node) -> bool:
        """Whether a node has an entry for each entry of the map; what a bias is computed of has fewer."""
        return value(node) is not None and math.prod(shape_of(node)) == math.prod(shape_of(softmax))

    before, between = nearest(lambda n: n.all_input_nodes, is_map)
    if not before:  # heads are mixed to another number of heads
        before, between = nearest(lambda n: n.all_input_nodes)
    after, _ = nearest(lambda n: n.users)
    if len(before) != 1 or len(after) != 1:
        return None
    (logits,), (out,) = before, after
    scalings = tuple(node for node in softmax.graph.nodes if node in between and _scales(node, data))
    query, key = tensor_argument(logits, 0), tensor_argument(logits, 1)
    return Core("spelled out", out, query, key, transposed=True, scalings=scalings, softmax=softmax)


def _scales(node: fx.Node, data: set[fx.Node]) -> bool:
    """Whether a node multiplies logits (…, N, N) by something that is the same for all of a head."""
    if node.target not in (aten.mul.Tensor, aten.div.Tensor):
        return False
    factors = [a for a in node.args[:2] if a not in data]
    shapes = [shape_of(a) for a in factors if isinstance(a, fx.Node)]
    return len(factors) == 1 and all(set(shape[-2:]) <= {1} for shape in shapes)
