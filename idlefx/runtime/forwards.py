"""The forward of a converted model: what fx made of its graph, behind the checks of its calls.

torch.compile stores what it makes of a function with the function's code, and compiles one code a few times only. Hence

1. every forward has a code of its own, so that any number of converted models can be compiled in one process;
2. a graph that is as it was gets the forward that it had, so that going from train to eval mode and back compiles
   nothing anew.
"""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import fx

from idlefx.runtime.call_checks import checked
from idlefx.runtime.conversion import Conversion
from idlefx.runtime.labels import with_loss
from idlefx.runtime.swaps import containers_of, guarded

Forward = Callable[..., Any]


class Made(NamedTuple):
    """A forward, and the source and the names of the bare one that it was made of."""

    source: str
    names: dict[str, Any]
    forward: Forward


class Forwards:
    """The forwards of one converted model.

    Args:
        conversion: How it is called, and how its loss is computed.
    """

    def __init__(self, conversion: Conversion) -> None:
        self._conversion = conversion
        self._made: dict[fx.Graph, Made] = {}

    def of(self, graph: fx.Graph, source: str, forward: Forward) -> Forward:
        """A forward with checks.

        Args:
            graph: The graph.
            source: The source of what fx made of it now.
            forward: That, bare or behind checks.
        """
        bare: Any = inspect.unwrap(forward)
        made = self._made.get(graph)
        if made is None or (made.source, made.names) != (source, bare.__globals__):
            inner = checked(guarded(bare, containers_of(graph)), self._conversion.calls)
            whole: Any = with_loss(inner, self._conversion.loss)
            whole.__code__ = whole.__code__.replace()
            made = self._made[graph] = Made(source, bare.__globals__, whole)
        return made.forward
