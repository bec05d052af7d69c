"""Count multiply-adds on a graph: one multiply-add counts as one."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import fx

from idlefx.errors import BlockError
from idlefx.graph.equations import read_equation
from idlefx.graph.notes import layer_of
from idlefx.graph.queries import source_line
from idlefx.graph.sizes import ONE_IMAGE, shape_of
from idlefx.runtime import following, ops

aten = torch.ops.aten


def _linear(node: fx.Node) -> int:
    return _size(node) * _shape(node.args[1])[-1]


def _product(node: fx.Node) -> int:
    return _size(node) * _shape(node.args[0])[-1]


def _query(node: fx.Node) -> int:
    return _size(node) * _shape(node.args[6])[-1]


def _added_product(node: fx.Node) -> int:
    return _size(node) * _shape(node.args[1])[-1]


def _attention(node: fx.Node) -> int:
    query, key, value = (_shape(a) for a in node.args[:3])
    return math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _convolution(node: fx.Node) -> int:
    return _size(node) * math.prod(_shape(node.args[1])[1:])


def _transposed_convolution(node: fx.Node) -> int:
    image, weight = (_shape(operand) for operand in node.args[:2])
    return math.prod(image) * math.prod(weight[1:])


def _einsum(node: fx.Node) -> int:
    """Operands are contracted from the left, each step over all letters of two."""
    operands: Any = node.args[1]
    equation = read_equation(str(node.args[0]), [len(_shape(operand)) for operand in operands])
    sizes: dict[str, int] = {}
    for letters, operand in zip(equation.operands, operands, strict=True):
        for letter, size in zip(letters, _shape(operand), strict=True):
            sizes[letter] = max(size, sizes.get(letter, 1))
    total, done = 0, set(equation.operands[0])
    for at, letters in enumerate(equation.operands[1:], 2):
        done |= set(letters)
        total += math.prod(sizes[letter] for letter in done)
        done &= set("".join(equation.operands[at:]) + equation.output)
    return total


def _logits(node: fx.Node) -> int:
    return math.prod(_shape(node.args[1]))


def _grouping(node: fx.Node) -> int:
    """The likeness of all tokens to the anchors, and that of the idle ones to the workers, in each part by itself."""
    told: Any = node.args[2:]
    (parts, tokens, width), (prefix, kept, (_, anchors, *_)) = _shape(node.args[0]), told
    idle, workers = tokens - len(prefix) - kept, kept if ops.leads(prefix) else len(prefix) + kept
    return int(parts * width * (tokens * anchors + idle * workers))


def _averages(node: fx.Node) -> int:
    """Each number of a token is weighed and added up."""
    return math.prod(_shape(node.args[0]))


def _shape(node: Any) -> list[int]:
    try:
        return shape_of(node, ONE_IMAGE)
    except ZeroDivisionError as error:
        raise BlockError(
            f"blocks: `{node}` has no size for a batch of one (at {source_line(node)}); dimension 0 of the input must "
            "count images"
        ) from error


def _size(node: fx.Node) -> int:
    return math.prod(_shape(node))


# Element-wise work, normalisation and softmax are not counted, as is the custom of the field.
FORMULAS: dict[Any, Callable[[fx.Node], int]] = {
    aten.linear.default: _linear,
    aten.matmul.default: _product,
    aten.mm.default: _product,
    aten.bmm.default: _product,
    aten.mv.default: _product,
    aten.addmm.default: _added_product,
    aten.baddbmm.default: _added_product,
    aten.conv1d.default: _convolution,
    aten.conv2d.default: _convolution,
    aten.conv2d.padding: _convolution,
    aten.conv3d.default: _convolution,
    aten.conv_transpose1d.default: _transposed_convolution,
    aten.conv_transpose2d.input: _transposed_convolution,
    aten.conv_transpose3d.input: _transposed_convolution,
    aten.einsum.default: _einsum,
    aten.scaled_dot_product_attention.default: _attention,
    ops.norm_linear: _query,
    ops.score_tokens: _product,
    ops.sum_over_heads: _logits,
    following.group_tokens: _grouping,
    following.average_groups: _averages,
}


def count_macs(nodes: Iterable[fx.Node]) -> int:
    """Multiply-adds of the nodes for a batch of one image.

    Linear layers, matrix products and convolutions cost the size of their output times the length of what is
    summed, transposed convolutions that of their input times what each number is spread over; attention of H heads, N
    queries and M keys costs `H * N * M * (D_qk + D_v)`.
    """
    return sum(map(_macs, nodes))


def _macs(node: fx.Node) -> int:
    layer = layer_of(node)
    if layer is None:
        return FORMULAS[node.target](node) if node.target in FORMULAS else 0
    if layer.kind == "Linear":
        return _size(node) * int(layer.settings[0])
    if layer.kind == "Conv2d":
        channels, _, kernel, *_, groups = layer.settings
        return _size(node) * int(channels // groups * math.prod(kernel))
    return 0
