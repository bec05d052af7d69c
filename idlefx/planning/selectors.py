"""Selector heads: pure scores of tokens, asking for their evidence by argument name.

The built-in scores are `class` (the block's own class-token logits), `mean` (the same with the mean query of all
image tokens), `norm` and `random`; `auto` is `class` where there is a class token and `mean` elsewhere.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from idlefx.errors import PlanError
from idlefx.options import AUTO

EVIDENCE = {
    "x": "the block's input (B, N, C)",
    "q": "queries of all tokens (B, H, N, D)",
    "k": "keys of all tokens (B, H, N, D)",
    "query": "the class token's query, or the mean query of all image tokens (B, H, 1, D)",
    "prefix": "positions of the prefix tokens, a tuple",
    "block": "index of the block",
}
LOGITS = ("class", "mean")


@dataclass(frozen=True)
class Selector:
    """A registered score: its name, its function, and the evidence the function asks for."""

    name: str
    function: Callable[..., Tensor]
    evidence: tuple[str, ...]


_REGISTRY: dict[str, Selector] = {}


def selector(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Register a token score under the function's name, as `selector="name"`.

    The function asks for evidence by argument name: `x` (B, N, C) the block's input; `q`, `k` (B, H, N, D);
    `query` (B, H, 1, D); `prefix` the positions of the prefix tokens; `block` its index. It returns scores (B, N),
    of which the highest are kept; those of the prefix are not looked at. It must look at each image by itself.

    Example:
        >>> @selector
        ... def brightest(x):  # x (B, N, C)
        ...     return x.mean(dim=-1)  # (B, N)

    Raises:
        PlanError: An argument is no known evidence, or the name is taken by a built-in score.
    """
    name = getattr(function, "__name__", "")
    if name in (AUTO, *_BUILT_IN):
        raise PlanError(f"selector: `{name}` is built in; give the function another name")
    return register(name, function)


def register(name: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Register a score under a name; see `selector`."""
    wanted = tuple(inspect.signature(function).parameters)
    unknown = [argument for argument in wanted if argument not in EVIDENCE]
    if unknown or not wanted:
        known = "; ".join(f"`{key}`: {meaning}" for key, meaning in EVIDENCE.items())
        raise PlanError(f"selector: `{name}` asks for {unknown or 'nothing'}; it may ask for {known}")
    _REGISTRY[name] = Selector(name, function, wanted)
    return function


def find_selector(name: str) -> Selector:
    """The score of that name.

    Raises:
        PlanError: There is none; the message lists those there are.
    """
    if name not in _REGISTRY:
        raise PlanError(f"plan: unknown selector {name!r}; known are {', '.join([AUTO, *sorted(_REGISTRY)])}")
    return _REGISTRY[name]


def logits(query: Tensor, k: Tensor) -> Tensor:
    """Raw attention logits of one query, averaged over heads (IdleViT, arXiv:2310.05654, section 3.2)."""
    return (query @ k.transpose(-1, -2)).mean(dim=1).squeeze(1)


def norm(x: Tensor) -> Tensor:
    """Length of each token's vector: a cheap baseline."""
    return x.float().norm(dim=-1)


def random(x: Tensor, block: int) -> Tensor:
    """Seeded noise, the same on every device and for every image, different from block to block: a baseline."""
    noise = torch.arange(x.shape[1], device=x.device) * 7919 + (block + 1) * 104729
    for _ in range(3):  # integers scrambled exactly, so that no rounding moves a choice
        noise = (noise * 1103515245 + 12345) % 2147483648
        noise = noise ^ (noise >> 13)
    return noise.to(torch.float64).expand(x.shape[0], -1)


_BUILT_IN: dict[str, Callable[..., Tensor]] = {"class": logits, "mean": logits, "norm": norm, "random": random}
for _name, _function in _BUILT_IN.items():
    register(_name, _function)
