"""The graph passes, one a file, imported as `idlefx.passes`.

A pass is a function `(module, plan) -> module`. It edits the graph in place, keeps no state and prints nothing;
with an empty plan it changes nothing but the spelling of attention. Nodes it adds carry their example values. It
may be run on any module that `idlefx.frontend` captured, and is checked by the runner in `idlefx.pipeline`.
"""

from idlefx.passes.idle import idle
from idlefx.passes.normalize import normalize
from idlefx.passes.select import select

__all__ = ["idle", "normalize", "select"]
