"""Notes on nodes: what one pass tells the next one, the report and the picture of a node that it made.

A note stands in `node.meta["idlefx"]`. Names of nodes are for people; no code reads them.
"""

from dataclasses import dataclass
from typing import Literal

from torch import fx

KEY = "idlefx"

Role = Literal[
    "score", "class token", "query", "choice", "index", "place", "followers", "sizes", "gather", "work", "scatter",
    "cut loss",
]  # fmt: skip


@dataclass(frozen=True)
class Made:
    """A node that was made for an idling block.

    Attributes:
        block: Index of the block.
        role: What the node is there for. "score" and "class token" belong to the scores of all tokens and to what is
            computed of the class token alone, "query" is the linear layer of the class token's query; "choice" chooses,
            "index" and "place" are its two results. Where tokens follow, "followers" is a third one, and "sizes" are
            those of the groups. "gather", "work" and "scatter" are the block on the tokens that work; "cut loss" is
            the block's token cut loss.
        stands_for: Name of the dense node that it computes for other tokens; empty where it stands for none.
    """

    block: int
    role: Role
    stands_for: str = ""


@dataclass(frozen=True)
class Spelled:
    """An attention that the model spells in another way than `scaled_dot_product_attention`; tables name it."""

    attention: str


Note = Made | Spelled


def note_of(node: fx.Node) -> Note | None:
    """The note on a node, if there is one."""
    note: Note | None = node.meta.get(KEY)
    return note


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
