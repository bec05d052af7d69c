"""Windows that rest, and tokens that rest or follow in windows, in the user's own eager modules.

Which token stands in which slot is found by running the block: for each bit of their numbers, the tokens that have it
set are changed, and the keys that change with them have it set too. A slot whose key never changes is padding.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

PRODUCTS = (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm)
SOFTMAXES = (torch.softmax, Tensor.softmax, F.softmax)
NOBODY = -1


class WindowAttention(TorchFunctionMode):
    """Reads queries and keys of all attention that runs inside it, and weighs its keys if told how.

    Args:
        added: For each attention in order, what is added to the logits of its keys (rows, slots), a row for each window
            and head; minus infinity hides a key.

    Attributes:
        found: Queries and keys of each attention, (rows, slots, D).
    """

    def __init__(self, added: list[Tensor] | None = None) -> None:
        super().__init__()
        self.added = list(added or [])
        self.found: list[tuple[Tensor, Tensor]] = []
        self._product: tuple[Tensor, Tensor, int] | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self._fused(*args, **kwargs)
        if func in SOFTMAXES and self._product is not None and args[0].numel() == self._product[2]:
            q, k, _ = self._product
            self._find(q, k.transpose(-2, -1))
            self._product = None
            return func(self._weigh(args[0]), *args[1:], **kwargs)
        result = func(*args, **kwargs)
        if func is torch.einsum and _multiplies_keys(args[0]):
            args = (args[1], args[2].transpose(-2, -1))
            func = torch.matmul
        if func in PRODUCTS and result.shape[-1] == result.shape[-2]:
            self._product = (args[0], args[1], result.numel())
        return result

    def _find(self, q: Tensor, k: Tensor) -> None:
        self.found.append((q.flatten(0, -3), k.flatten(0, -3)))

    def _weigh(self, logits: Tensor) -> Tensor:
        """Logits (…, slots, slots) with what is added; where all keys are hidden nobody reads what comes out."""
        if not self.added:
            return logits
        added = self.added.pop(0)
        added = added.masked_fill((added == -math.inf).all(1, keepdim=True), 0)
        return logits + added.reshape(*logits.shape[:-2], 1, -1).to(logits.dtype)

    def _fused(self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **options: Any) -> Tensor:
        self._find(q, k)
        mask = q.new_zeros(()) if attn_mask is None else attn_mask
        if mask.dtype == torch.bool:
            mask = q.new_zeros(mask.shape).masked_fill(~mask, -math.inf)
        mask = self._weigh(mask.expand(*q.shape[:-1], k.shape[-2]))
        return F.scaled_dot_product_attention(q, k, v, mask, **options)


def _multiplies_keys(equation: str) -> bool:
    """Whether an einsum is queries times keys, such as "bhid,bhjd->bhij"."""
    a, b, result = equation.replace(" ", "").replace("->", ",").split(",")
    return a[-1] == b[-1] and a[:-2] == b[:-2] and result == a[:-1] + b[-2]


@dataclass(frozen=True)
class Slots:
    """The tokens of one attention.

    Attributes:
        tokens: For each row and slot the token, `image * N + position`, or `NOBODY` (rows, slots).
        queries: Of each token (B * N, H, D).
        keys: Of each token (B * N, H, D).
        window: A number for the window of each token (B * N,), the lowest of its tokens.
    """

    tokens: Tensor
    queries: Tensor
    keys: Tensor
    window: Tensor

    @property
    def table(self) -> Tensor:
        """The token in each slot of each window, (windows, slots)."""
        lowest = self.tokens.amin(1)
        return torch.stack([self.tokens[lowest == window][0] for window in lowest.unique()])

    @property
    def is_over_heads(self) -> bool:
        """Whether the heads of one token stand in all slots of a row: weights that a model makes and never reads."""
        return bool((self.tokens == self.tokens[:, :1]).all())


def find_slots(run: Callable[[Tensor], Any], x: Tensor, dims: tuple[int, ...]) -> list[Slots]:
    """Which token stands in which slot of each attention of a block.

    Args:
        run: Runs the block on a stream.
        x: The stream.
        dims: Where the tokens stand in it.
    """
    sizes = [x.shape[d] if d in (0, *dims) else 1 for d in range(x.ndim)]
    numbers = torch.arange(math.prod(sizes)).view(sizes)

    def attention(stream: Tensor) -> list[tuple[Tensor, Tensor]]:
        with WindowAttention() as reads:
            run(stream)
        return reads.found

    plain = attention(x)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x.dtype) * x.std()
    changed = [(k != old).any(-1) for (_, k), (_, old) in zip(attention(x + noise), plain, strict=True)]
    tokens = [torch.where(c, 0, NOBODY) for c in changed]
    for bit in range(numbers.numel().bit_length()):
        moved = attention(torch.where((numbers >> bit & 1).bool(), x + noise, x))
        for found, (_, k), (_, old) in zip(tokens, moved, plain, strict=True):
            found += (k != old).any(-1).long() << bit
    return [_slots(found, q, k) for found, (q, k) in zip(tokens, plain, strict=True)]


def _slots(tokens: Tensor, q: Tensor, k: Tensor) -> Slots:
    real = tokens != NOBODY
    order = tokens[real].argsort(stable=True)  # the heads of a token stand in the order of the rows
    count = int(tokens.max()) + 1
    queries, keys = (x[real][order].view(count, -1, x.shape[-1]) for x in (q, k))
    lowest = tokens.masked_fill(~real, count).amin(1, keepdim=True).expand_as(tokens)
    window = lowest[real][order].view(count, -1)[:, 0]
    return Slots(tokens, queries, keys, window)


def rested(
    run: Callable[[Tensor], Any],
    x: Tensor,
    dims: tuple[int, ...],
    keep: float,
    chosen: Tensor,
    unit: str,
    *,
    inside: bool = False,
) -> tuple[Any, float]:
    """A block in which some windows work, or some tokens of each window.

    Args:
        run: Runs the dense block on a stream.
        x: The stream.
        dims: Where the tokens stand in it.
        keep: Share that works.
        chosen: Positions (B, n) that work, as another implementation chose them; N stands for no token.
        unit: What idles, whole "windows" or "tokens" in each.
        inside: Whether these positions are counted window by window, and not as the tokens stand in the stream.

    Returns:
        What the block returns; and by how much the best that was not chosen outscores the worst that was, in standard
        deviations of the scores.

    Raises:
        ValueError: Other windows or tokens work than the rule allows.
    """
    batch, count = x.shape[0], math.prod(x.shape[d] for d in dims)
    found = find_slots(run, x, dims)
    slots = [each for each in found if not each.is_over_heads]
    if not slots or any(not torch.equal(each.window, slots[0].window) for each in slots):
        raise ValueError("the block runs no attention over windows that the reference recognises")
    if inside:
        by_window = dict.fromkeys(map(tuple, slots[0].tokens.tolist()))  # the rows of one head, in their order
        chosen = torch.tensor(list(by_window)).view(batch, count).remainder(count).gather(1, chosen)
    works = torch.zeros(batch, count + 1, dtype=torch.bool).scatter_(1, chosen, True)[:, :count].flatten()
    queries, keys = (torch.cat(parts, 1) for parts in zip(*((s.queries, s.keys) for s in slots), strict=True))
    window, image = slots[0].window, torch.arange(batch).repeat_interleave(count)
    mean = _means(queries, image if unit == "windows" else window)
    scores = (mean * keys).sum((1, 2)) / keys.shape[1]
    if unit == "windows":
        scores, groups = _means(scores, window), image
        heads = window == torch.arange(len(window))  # one token stands for its window
        if not torch.equal(works[window], works):
            raise ValueError("a window works in part")
        excess = _excess(scores[heads], works[heads], groups[heads], keep)
    else:
        excess = _excess(scores, works, window, keep)
    hidden = [(s.tokens != NOBODY) & ~works[s.tokens.clamp(min=0)] & (not s.is_over_heads) for s in found]
    with WindowAttention([torch.zeros(h.shape).masked_fill(h, -math.inf) for h in hidden]):
        output = run(x)
    where = works.view([x.shape[d] if d in (0, *dims) else 1 for d in range(x.ndim)])
    put = lambda t: torch.where(where, t, x) if t.shape == x.shape else t  # noqa: E731
    return tree_map_only(Tensor, put, output), excess


def _means(values: Tensor, groups: Tensor) -> Tensor:
    """For each entry the mean over its group."""
    sums = torch.zeros_like(values).index_add(0, groups, values)
    sizes = torch.zeros_like(groups).index_add(0, groups, torch.ones_like(groups))
    return (sums / sizes.clamp(min=1).view(-1, *(1,) * (values.ndim - 1)))[groups]


def _excess(scores: Tensor, works: Tensor, groups: Tensor, keep: float) -> float:
    """How far the choice is off the rule, in each group by itself."""
    worst = 0.0
    for group in groups.unique():
        own, chosen = scores[groups == group], works[groups == group]
        wanted = max(1, math.floor(keep * len(own) + 1e-9))
        if int(chosen.sum()) != wanted:
            raise ValueError(f"{int(chosen.sum())} work of {len(own)} where {wanted} should")
        if wanted < len(own):
            worst = max(worst, float((own[~chosen].max() - own[chosen].min()) / scores.std()))
    return worst
