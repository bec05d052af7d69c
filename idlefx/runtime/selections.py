"""Which tokens work in each idling block, and whom the others follow: what the choices in the graph decide."""

from typing import Any

import torch
from torch import fx, nn

from idlefx.graph.notes import Role, only_made_for
from idlefx.graph.state import buffers_kept
from idlefx.runtime.labels import without_labels
from idlefx.runtime.module import IdleModule, conversion_of, converted
from idlefx.runtime.windows import of_each_window

# Of the nodes that tell what works: positions and places, or those in each window, and where these stand.
OF_ALL: tuple[Role, ...] = ("index", "place")
IN_WINDOWS: tuple[Role, ...] = ("chosen", "chosen place", "where", "slots")


def selections(idle: IdleModule, *args: Any, **kwargs: Any) -> dict[int, torch.Tensor]:
    """Which tokens work in each idling block.

    Args:
        idle: A converted model.
        *args: Its inputs.
        **kwargs: Its inputs by keyword.

    Returns:
        By block index, the positions (B, P + K) of prefix and kept image tokens, ascending.
    """
    return {block: index for block, (index, _) in _decided(idle, args, kwargs).items()}


def groups(idle: IdleModule, *args: Any, **kwargs: Any) -> dict[int, torch.Tensor]:
    """Whom each token goes with in each idling block.

    Args:
        idle: A converted model.
        *args: Its inputs.
        **kwargs: Its inputs by keyword.

    Returns:
        By block index, for each token (B, N) the position of the one that works for it: its own where it works, that
        of its worker where it follows, and -1 where it rests.
    """
    told = {}
    for block, (index, place) in _decided(idle, args, kwargs).items():
        works = index.shape[1]
        told[block] = torch.where(place < works, index.gather(1, place.clamp(max=works - 1)), -1)
    return told


def _decided(idle: IdleModule, args: Any, kwargs: Any) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """By block, the positions of those that work (B, W), and of each token its place among them (B, N) or behind."""
    idle = converted(idle)
    stages = conversion_of(idle).plan.stages
    opened = {
        stage[0].block: [
            only_made_for(idle.graph, stage[0].block, role)
            for role in (IN_WINDOWS if stage[0].unit == "tokens" else OF_ALL)
        ]
        for stage in stages
    }
    recorder = _Recorder(idle, {node for nodes in opened.values() for node in nodes})
    flat = conversion_of(idle).calls.flat(args, without_labels(kwargs, conversion_of(idle).loss))
    with torch.no_grad(), buffers_kept(idle):
        recorder.run(*flat, enable_io_processing=False)
    decided: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for stage in stages:
        index, place, *where = (recorder.seen[node] for node in opened[stage[0].block])
        if where:
            index, place = of_each_window(index, place, *where)
        if stage[0].joins:  # these are positions among the workers of the block before
            workers, places = decided[stage[0].block - 1]
            index, place = workers.gather(1, index), place.gather(1, places)
        decided |= {step.block: (index, place) for step in stage}
    return decided


class _Recorder(fx.Interpreter):
    def __init__(self, module: nn.Module, wanted: set[fx.Node]) -> None:
        super().__init__(module)
        self.wanted, self.seen = wanted, dict[fx.Node, torch.Tensor]()

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n in self.wanted:
            self.seen[n] = result
        return result
