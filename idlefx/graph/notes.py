"""Notes on nodes: what one pass tells the next one, the report and the picture of a node that it made.

A note stands in `node.meta["idlefx"]`. Names of nodes are for people; no code reads them.
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from torch import fx

KEY = "idlefx"
LAYER = "idlefx_layer"  # where it stands on a node that calls a layer which one is

Role = Literal[
    "score", "class token", "query", "choice", "index", "place", "order", "leaders", "sizes", "positions", "gather",
    "work", "scatter", "cut loss", "chosen", "chosen place", "where", "slots",
]  # fmt: skip


@dataclass(frozen=True)
class Made:
    """A node that was made for an idling block.

    Attributes:
        block: Index of the block.
        role: What the node is there for. "score" and "class token" belong to the scores of all tokens and to what is
            computed of the class token alone, "query" is the linear layer of the class token's query; "choice" chooses,
            "index" and "place" are its two results. Where tokens follow, "order" and "leaders" are two more, and
            "sizes" are those of the groups; where groups join, positions and places are those among the tokens that
            worked in the block before, and "positions" are those among all tokens. "gather", "work" and "scatter" are
            the block on the tokens that work; "cut loss" is the block's token cut loss. Where attention is over
            windows, "chosen" are the windows that work, or the slots that work in each, and "chosen place" is for
            these what "place" is for tokens; "where" is the token in each slot, "slots" are those of the tokens.
        stands_for: Name of the dense node that it computes for other tokens; empty where it stands for none.
    """

    block: int
    role: Role
    stands_for: str = ""


@dataclass(frozen=True)
class Spelled:
    """An attention that the model spells in another way than `scaled_dot_product_attention`; tables name it."""

    attention: str


class Layer(NamedTuple):
    """A module of the model that does one operation with its own weight; the final graph calls it.

    Attributes:
        path: Where it stands.
        kind: "Linear", "LayerNorm" or "Conv2d", as `torch.nn` calls it.
        settings: Its sizes and what else it is made with, in the order of `idlefx.runtime.layers`.
        bias: Whether it has a bias.
    """

    path: str
    kind: str
    settings: tuple[Any, ...]
    bias: bool


Note = Made | Spelled


def note_of(node: fx.Node) -> Note | None:
    """The note on a node, if there is one."""
    note: Note | None = node.meta.get(KEY)
    return note


def layer_of(node: fx.Node) -> Layer | None:
    """The layer that a node of a final graph calls, if it calls one."""
    layer: Layer | None = node.meta.get(LAYER)
    return layer


def made_for(graph: fx.Graph, block: int, *roles: Role) -> list[fx.Node]:
    """The nodes made for a block, in graph order; of all roles if none is named."""

    def fits(note: Note | None) -> bool:
        return isinstance(note, Made) and note.block == block and (not roles or note.role in roles)

    return [node for node in graph.nodes if fits(note_of(node))]


def only_made_for(graph: fx.Graph, block: int, role: Role) -> fx.Node:
    """The one node of a role that was made for a block.

    Raises:
        LookupError: There is none, or more than one.
    """
    nodes = made_for(graph, block, role)
    if len(nodes) != 1:
        raise LookupError(f"block {block} has {len(nodes)} nodes for its {role} instead of one")
    return nodes[0]
