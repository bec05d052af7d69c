"""The graph passes, one a file, imported as `idlefx.passes`.

A pass is a function `(module, plan) -> module`. It edits the graph in place, keeps no state and prints nothing;
with an empty plan it changes nothing but the spelling of attention; `add_cut_loss` and `return_stream` alone add an
output. Nodes it adds carry their example values. It may be run on any module that `idlefx.capture` captured, and is
checked by the runner in `idlefx.pipeline`.
"""

from idlefx.passes.cut_loss import add_cut_loss
from idlefx.passes.follow import follow_workers
from idlefx.passes.group import form_groups
from idlefx.passes.idle import idle_tokens
from idlefx.passes.lower import lower_spellings
from idlefx.passes.normalize import normalize_attention
from idlefx.passes.query import shorten_query
from idlefx.passes.select import select_tokens
from idlefx.passes.stream import return_stream

__all__ = [
    "add_cut_loss", "follow_workers", "form_groups", "idle_tokens", "lower_spellings", "normalize_attention",
    "return_stream", "select_tokens", "shorten_query",
]  # fmt: skip
