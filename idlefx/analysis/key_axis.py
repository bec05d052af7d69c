"""Where in the logits of an attention its keys stand, so that a term for each key can be added."""

from dataclasses import dataclass

import torch
from torch import fx

from idlefx.analysis import layouts as lay
from idlefx.analysis.attention import Core
from idlefx.analysis.layouts import Layout
from idlefx.analysis.partition import Windows
from idlefx.analysis.refusal import refuse
from idlefx.analysis.walk import Walk, dimension
from idlefx.graph.queries import argument

aten = torch.ops.aten


@dataclass(frozen=True)
class KeyAxis:
    """Where the keys and the batch stand in logits.

    Attributes:
        logits: The node that takes the logits: the attention, or its softmax where it is spelled out.
        rank: How many dimensions the logits have.
        dim: That of the keys.
        batch_dim: That of the batch; None without one.
        copies: How many entries of it belong to one image, where heads are merged into the batch.
        segment: First and last token, exclusive, where the keys are a segment of the sequence; empty elsewhere.
        layout: Where attention is over windows, what the dimensions hold of images, windows and keys, and of features
            beside these; empty elsewhere.
    """

    logits: fx.Node
    rank: int
    dim: int
    batch_dim: int | None
    copies: int
    layout: Layout = ()
    segment: tuple[int, ...] = ()


def key_axis(walk: Walk, core: Core) -> KeyAxis:
    """Find the keys in the logits of an attention.

    Raises:
        RefusedOperation: A key is not one token of the sequence, or the attention takes no term for each key.
    """
    node = core.softmax or core.out
    if core.softmax is not None:
        layout = walk[node.args[0]]
        dim = dimension(node, node.args[1], len(layout))
    else:
        layout = (*walk[core.query][:-1], walk[core.key][-2])
        dim = len(layout) - 1
        if argument(node, 5, "is_causal", False):
            refuse(node, "is causal, and takes no other mask, so no key can stand for several tokens")
    keys, windows = layout[dim], walk.windows
    if windows is None:
        whole = lay.is_tokens(keys) and (keys[0].runs == ((0, keys[0].size),) or bool(walk.segments))
    else:
        whole = lay.partition_of(keys) == windows.partition and lay.sides_of(keys) == windows.slots
    if not whole:
        refuse(node, "attends to a part of the tokens or in another order, so no key can stand for several tokens")
    batch_dim = next((d for d, each in enumerate(layout) if each and each[0].role == "batch"), None)
    segment = keys[0].runs[0] if walk.segments else ()
    if batch_dim is None and not walk.has_batch:
        return KeyAxis(node, len(layout), dim, None, 1, segment=segment)
    if batch_dim is None or (windows is None and lay.has(layout[batch_dim], "tokens")):
        refuse(node, "has no axis for the images in its logits, so no key can stand for several tokens")
    told = () if windows is None else _beside_keys(node, layout, dim, windows)
    return KeyAxis(node, len(layout), dim, batch_dim, lay.size(layout[batch_dim][1:]), told, segment)


def _beside_keys(node: fx.Node, layout: Layout, keys: int, windows: Windows) -> Layout:
    """A layout of logits without the queries, and without what has dimensions of its own, such as heads."""
    dims = []
    for d, dim in enumerate(layout):
        sides = set(lay.sides_of(dim))
        queries = d != keys and not sides.isdisjoint(windows.slots)
        if queries and len(sides) < len(dim):
            refuse(node, "has queries and something else in one dimension, so no key can stand for several tokens")
        dims.append(dim if not queries and lay.has(dim, "tokens", "batch") else ())
    return tuple(dims)
