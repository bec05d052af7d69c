"""Windows that work, or tokens that work in each: their positions, what is read at them, and their order.

Tokens are gathered window by window, so that what the model does to make windows is one reshape. A slot without a
token, where the model pads, has the position N, one behind the last.
"""

import math
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from idlefx.runtime.gather_scatter import put_tokens, take_tokens
from idlefx.runtime.grids import Dims, laid_out, tokens_first


def tables(
    like: Tensor, begins: tuple[int, ...], first: tuple[int, ...], shape: tuple[int, int], tokens: int
) -> tuple[Tensor, Tensor]:
    """Which token stands in which slot.

    Args:
        like: A tensor on the device.
        begins: The slots, counted through all windows, in which runs of tokens that follow one another begin.
        first: The first token of each; -1 for a run of slots without tokens.
        shape: How many windows there are, and how many slots each has.
        tokens: N, how many tokens.

    Returns:
        The token in each slot of each window (windows, slots), N where there is none; and of each token the slot
        (N,), counted through all windows.
    """
    starts, at = (torch.tensor(each, device=like.device) for each in (first, begins))
    places = torch.arange(shape[0] * shape[1], device=like.device)
    run = torch.zeros_like(places).scatter(0, at, 1).cumsum(0) - 1
    where = torch.where(starts[run] < 0, tokens, starts[run] + places - at[run])
    slots = torch.zeros(tokens + 1, dtype=places.dtype, device=like.device).scatter(0, where, places)
    return where.view(shape), slots[:tokens]


def window_scores(scores: Tensor, where: Tensor) -> Tensor:
    """The mean over the tokens of each window (B, windows) of scores of all tokens (B, N)."""
    real = (where < scores.shape[1]).to(scores.dtype)
    padded = F.pad(scores, (0, 1))[:, where.flatten()].unflatten(1, where.shape)
    return padded.sum(2) / real.sum(1)


def in_windows(x: Tensor, where: Tensor) -> Tensor:
    """Tokens of the stream (B, N, C) window by window, each as if it were an image (B * windows, slots, C)."""
    return take_tokens(x, where.flatten().expand(x.shape[0], -1)).reshape(-1, where.shape[1], x.shape[2])


def in_stream(x: Tensor, slots: Tensor) -> Tensor:
    """Undo `in_windows`, where windows have no padding.

    Args:
        x: Tokens window by window (B * windows, slots, C).
        slots: The slot of each token (N,).
    """
    tokens = x.reshape(-1, slots.shape[0], x.shape[2])
    return take_tokens(tokens, slots.expand(tokens.shape[0], -1))


def size_term(sizes: Tensor, like: Tensor, dims: Dims, sides: tuple[int, ...]) -> Tensor:
    """What is added to the logits of a key that stands for several tokens of its window; see `following.size_term`.

    Args:
        sizes: How many tokens each key stands for (B * windows, K).
        like: Queries, whose type it has.
        dims: What the dimensions of the logits hold; nothing where the term is the same all along.
        sides: Sizes of the sides in them, those that say which window first.
    """
    term = sizes.to(torch.promote_types(like.dtype, torch.float32)).log().to(like.dtype)
    beside = [n for dim in dims for what, n in dim if what == "features"]
    term = term.reshape(-1, math.prod(sides), *(1 for _ in beside))
    return laid_out(term.expand(-1, -1, *beside), dims, sides)


def of_whole_windows(chosen: Tensor, place: Tensor, where: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
    """Positions of the tokens of windows that work.

    Args:
        chosen: The windows (B, K).
        place: For each window where it stands among those that work, K or more if it does not (B, windows).
        where: The token in each slot (windows, slots).
        slots: The slot of each token (N,).

    Returns:
        Positions (B, K * slots), window by window; and for each token where it stands there (B, N), behind all where
        it does not work.
    """
    size = where.shape[1]
    return where[chosen].flatten(1), place[:, slots // size] * size + slots % size


def of_each_window(chosen: Tensor, place: Tensor, where: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
    """Positions of the tokens that work in each window.

    Args:
        chosen: Their slots (B * windows, K).
        place: For each slot where it stands among those that work, K or more if it does not (B * windows, slots).
        where: The token in each slot (windows, slots).
        slots: The slot of each token (N,).

    Returns:
        Positions (B, windows * K), window by window; and for each token where it stands there (B, N), behind all where
        it does not work.
    """
    (count, size), kept = where.shape, chosen.shape[1]
    index = where.expand(chosen.shape[0] // count, -1, -1).flatten(0, 1).gather(1, chosen)
    among = place.reshape(-1, count * size)[:, slots]
    stands = torch.where(among < kept, slots // size * kept + among, count * kept)
    return index.reshape(-1, count * kept), stands


def take_padded(x: Tensor, index: Tensor, dim: int = 1, batch_dim: int = 0) -> Tensor:
    """`take_tokens` where a position may be N: there are zeros."""
    return take_tokens(_with_nobody(x, dim), index, dim, batch_dim)


def put_padded(x: Tensor, index: Tensor, tokens: Tensor, dim: int, batch_dim: int, place: Tensor) -> Tensor:
    """`put_tokens` where a position may be N: what stands there is put nowhere."""
    place = F.pad(place, (0, 1), value=index.shape[1])
    return put_tokens(_with_nobody(x, dim), index, tokens, dim, batch_dim, place).narrow(dim, 0, x.shape[dim])


def _with_nobody(x: Tensor, dim: int) -> Tensor:
    return F.pad(x, (*(0, 0) * (x.ndim - 1 - dim), 0, 1))


def rearrange(
    x: Tensor, index: Tensor, before: Dims, sizes: tuple[int, ...], after: Dims, new: tuple[int, ...], tokens: int = 0
) -> Tensor:
    """Working tokens, which stand window by window, with windows and slots in other dimensions.

    Args:
        x: They.
        index: Their positions (B, n).
        before: What the dimensions of `x` hold.
        sizes: Of the sides in them.
        after: What those of the result hold.
        new: Sizes of the sides in them.
        tokens: N where slots without a token must be zeros, as the model pads here; 0 elsewhere.
    """
    each = tokens_first(x, before, sizes, index.shape[0])
    if tokens:
        there = (index < tokens).reshape(*index.shape, *(1,) * (each.ndim - 2))
        each = torch.where(there, each, torch.zeros_like(each))
    return laid_out(each, after, new)


def all_in_order(x: Tensor, like: Tensor, batch_dim: int, dims: Dims, sizes: tuple[int, ...]) -> Tensor:
    """Features of all tokens, window by window (B, windows * slots, …).

    Args:
        x: They.
        like: A tensor with the images along `batch_dim`.
        batch_dim: Its batch dimension.
        dims: What the dimensions of `x` hold.
        sizes: Of the sides in them, those that say which window first.
    """
    return tokens_first(x, dims, sizes, like.shape[batch_dim])


def read_places(
    table: Tensor, chosen: Tensor, dims: Any, full: tuple[bool, ...], windows: int, size: int, unit: str
) -> Tensor:
    """Read a table at the windows that work, or at pairs of slots of those tokens that work in each window.

    Args:
        table: With as many dimensions as what it is broadcast to.
        chosen: The windows (B, K), or the slots window by window (B * windows, K).
        dims: What the dimensions of the output hold, as products of ("batch", 0), ("window", 0), ("slot", 0) and
            ("features", size).
        full: For each dimension whether the table has an entry for each place, and not one that serves all.
        windows: How many windows there are.
        size: How many slots a window has.
        unit: "windows" or "tokens".
    """
    by_window = unit == "windows"
    batch = chosen.shape[0] if by_window else chosen.shape[0] // windows
    index = chosen if by_window else chosen.reshape(batch, windows, -1)
    whole = {"batch": batch, "window": windows, "slot": size}
    factors = [(what, whole.get(what, n), long) for dim, long in zip(dims, full, strict=True) for what, n in dim]
    at = {what: place for place, (what, *_) in enumerate(factors)}
    along = [at["batch"], *([] if by_window or "window" not in at else [at["window"]])]
    spread = {at["batch"]: batch} | ({} if by_window or "window" not in at else {at["window"]: windows})
    table = table.reshape([n if long else 1 for _, n, long in factors])
    table = table.expand([spread.get(place, n) for place, n in enumerate(table.shape)])
    index = index if len(along) == index.ndim - 1 else index.squeeze(1)  # there is one window
    for place, (what, _, long) in enumerate(factors):
        if long and what == ("window" if by_window else "slot"):
            table = _gathered(table, index, (*along, place))
    ends = [*accumulate(len(dim) for dim in dims)]
    return table.reshape([math.prod(table.shape[end - len(d) : end]) for d, end in zip(dims, ends, strict=True)])


def _gathered(table: Tensor, index: Tensor, places: tuple[int, ...]) -> Tensor:
    """Entries along the last of some dimensions, by an index whose dimensions are these."""
    shape = [1] * table.ndim
    for place, n in zip(places, index.shape, strict=True):
        shape[place] = n
    index = index.permute(sorted(range(index.ndim), key=places.__getitem__)).reshape(shape)
    wide = [*table.shape[: places[-1]], shape[places[-1]], *table.shape[places[-1] + 1 :]]
    return table.gather(places[-1], index.expand(wide))
