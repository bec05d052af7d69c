"""The bound of tokens that follow: a converted model whose stages work on their first tokens, and choose nothing."""

from copy import deepcopy
from typing import Any

import torch
from torch import fx

from idlefx.analysis.macs import count_macs
from idlefx.bench.baselines import Baseline
from idlefx.bench.results import FIRST
from idlefx.errors import InputError
from idlefx.graph.queries import remove_dead, tensor_argument
from idlefx.graph.sizes import shape_of
from idlefx.runtime import following, gather_scatter
from idlefx.runtime.module import IdleModule, conversion_of

aten = torch.ops.aten


def first_tokens(idle: IdleModule) -> Baseline:
    """The bound as a baseline, beside which a converted model is timed; see `work_on_first`."""
    twin = work_on_first(idle)
    return Baseline(FIRST, twin, count_macs(twin.graph.nodes) / 1e9)


def work_on_first(idle: IdleModule) -> IdleModule:
    """A copy of a model whose idle tokens follow, in which the first tokens of every stage work instead.

    Its blocks do the products that they did, but nothing is scored, chosen, gathered or averaged, and no size is added
    to a logit: a stage cuts its first tokens off and works on them. The next stage cuts them off in turn; only what
    reads the whole stream finds the others behind them, as they came. Its results mean nothing. Its time is what
    following would take if it cost nothing but its blocks.

    Args:
        idle: A converted model; it stays as it is.

    Raises:
        InputError: Its idle tokens rest.
    """
    if conversion_of(idle).plan.idle != "follow":
        raise InputError("baseline first: it bounds what following costs, and tokens of this model rest; --idle follow")
    twin = deepcopy(idle)
    graph, workers = twin.graph, dict[fx.Node, int]()
    for node in graph.find_nodes(op="call_function", target=following.average_groups):
        stream, index, _, _, dim, *_ = _arguments(node)
        workers[index] = shape_of(index)[1]
        for part in list(node.users):
            if part.args[1] == 0:  # the means; the sizes go with the terms that are made of them
                _cut(part, stream, dim, workers[index])
    for node in graph.find_nodes(op="call_function", target=aten.gather.default):
        if (index := _arguments(node)[2]) in workers:  # positions among all tokens, where groups join
            workers[node] = workers[index]
    for node in graph.find_nodes(op="call_function", target=gather_scatter.take_tokens):
        if node.args[1] in workers:
            tokens, index, *dims = _arguments(node)
            _cut(node, tokens, dims[0] if dims else 1, workers[index])
    for node in graph.find_nodes(op="call_function", target=following.size_term):
        for user in list(node.users):
            _unweigh(user, node)
    for node in reversed(graph.find_nodes(op="call_function", target=following.restore_tokens)):
        _set_behind(node)
    remove_dead(graph)
    twin.recompile()
    return twin


def _arguments(node: fx.Node) -> Any:
    return node.args


def _cut(node: fx.Node, stream: Any, dim: Any, count: int) -> None:
    """Let a node take the first tokens of a stream."""
    node.target, node.args = aten.narrow.default, (stream, dim, 0, count)


def _unweigh(user: fx.Node, term: fx.Node) -> None:
    """Let an attention do without the sizes of groups."""
    if user.target is aten.scaled_dot_product_attention.default:
        user.update_arg(3, None)
    else:  # the mask, or the logits, that the sizes are added to
        user.replace_all_uses_with(tensor_argument(user, 0))


def _set_behind(node: fx.Node) -> None:
    """Give a stage that begins the tokens that worked, and all else those and the others behind them."""
    entry, _, worked, *_, dim, _ = _arguments(node)
    tokens, working = shape_of(node)[dim], shape_of(worked)[dim]

    def begins(user: fx.Node) -> bool:
        return user.target is aten.narrow.default and (cut := _arguments(user))[1:3] == (dim, 0) and cut[3] <= working

    node.replace_all_uses_with(worked, begins)
    with node.graph.inserting_before(node):
        others = node.graph.call_function(aten.narrow.default, (entry, dim, working, tokens - working))
    node.target, node.args = aten.cat.default, ([worked, others], dim)
