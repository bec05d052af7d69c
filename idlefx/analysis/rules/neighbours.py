"""Rules for what reads neighbours on a grid: of one patch it is a layer like any other, of more it mixes tokens."""

import torch
from torch import fx

from idlefx.analysis import layouts as lay
from idlefx.analysis.layouts import Layout
from idlefx.analysis.refusal import refuse
from idlefx.analysis.rules.registry import rule
from idlefx.analysis.walk import Walk, need_features, sizes_of
from idlefx.graph.queries import argument, tensor_argument

aten = torch.ops.aten


@rule(aten.conv1d.default)
def convolution(walk: Walk, node: fx.Node) -> Layout:
    """One token at a time if the kernel covers one; else it mixes neighbours."""
    layout, weight = walk[node.args[0]], tensor_argument(node, 1)
    if sizes_of(weight)[2] != 1 or sizes_of(node)[2] != lay.size(layout[2]):
        refuse(node, "convolves over neighbouring tokens")
    need_features(node, layout, [1], "contracts")
    return (layout[0], lay.features(sizes_of(node)[1]), layout[2])


@rule(aten.conv2d.default, aten.conv2d.padding)
def convolution_2d(walk: Walk, node: fx.Node) -> Layout:
    """A linear layer if the kernel covers one patch; else it mixes neighbours."""
    x, weight, stride = tensor_argument(node, 0), tensor_argument(node, 1), argument(node, 3, "stride", 1)
    if x not in walk or weight in walk:
        refuse(node, "takes its weights from the image")
    steps = {stride} if isinstance(stride, int) else set(stride)
    alone = sizes_of(weight)[2:] == [1, 1] and steps == {1} and sizes_of(node)[2:] == sizes_of(x)[2:]
    if not alone or len(walk[x]) != 4:
        refuse(node, "convolves over neighbouring tokens")
    need_features(node, walk[x], [1], "contracts")
    return (walk[x][0], lay.features(sizes_of(node)[1]), *walk[x][2:])


@rule(
    aten.avg_pool1d.default, aten.max_pool1d.default, aten.adaptive_avg_pool1d.default,
    aten.avg_pool2d.default, aten.max_pool2d.default, aten.adaptive_avg_pool2d.default,
    aten.avg_pool3d.default, aten.max_pool3d.default, aten.adaptive_avg_pool3d.default,
)  # fmt: skip
def pool(walk: Walk, node: fx.Node) -> Layout:
    """Pool features, which stand in the last dimensions; what stands there on a grid are tokens."""
    layout = walk[node.args[0]]
    first = len(layout) - int(str(node.target).partition("pool")[2][0])
    if any(lay.has(dim, "tokens") for dim in layout[first:]):
        refuse(node, "pools neighbouring tokens")
    need_features(node, layout, range(first, len(layout)), "pools")
    return (*layout[:first], *map(lay.features, sizes_of(node)[first:]))


@rule(aten.unfold.default, aten.im2col.default)
def unfold(walk: Walk, node: fx.Node) -> Layout:
    """Patches that may overlap hold a token several times."""
    refuse(node, "takes overlapping patches")
