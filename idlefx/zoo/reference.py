"""Token idling on the user's own eager modules: an independent answer to what a converted model returns.

Nothing here looks at a graph. A block runs on all of its tokens, once to read its queries and keys, once more with
the idle tokens hidden from its attention; then the idle tokens take back what they were. Whatever a block reads by
position, that is what it gives on the working tokens alone. One file, however long: it imports nothing of the package.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

PRODUCTS = {  # which arguments are multiplied
    torch.matmul: (0, 1), Tensor.matmul: (0, 1), Tensor.__matmul__: (0, 1), torch.bmm: (0, 1), Tensor.bmm: (0, 1),
    torch.baddbmm: (1, 2), Tensor.baddbmm: (1, 2),
}  # fmt: skip
SOFTMAXES = (torch.softmax, Tensor.softmax, F.softmax)


class Attention(TorchFunctionMode):
    """Reads all attention over a sequence of `tokens` tokens that runs inside it, and may hide keys from it.

    Attributes:
        found: Raw queries and keys (B, H, N, D) of each attention, keys served once to each head.
    """

    def __init__(self, batch: int, tokens: int, hidden: Tensor | None = None) -> None:
        super().__init__()
        self.batch, self.tokens, self.hidden = batch, tokens, hidden
        self.found: list[tuple[Tensor, Tensor]] = []
        self._product: tuple[Tensor, Tensor] | None = None
        self._weighs = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self._fused(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            return self._multi_head(*args, **kwargs)
        if func in SOFTMAXES and self._product is not None and args[0].shape[-1] == self.tokens:
            q, k = self._product
            self._find(q, k.transpose(-2, -1))
            self._product, self._weighs = None, True
            return func(self._hide(args[0], -1, -math.inf), *args[1:], **kwargs)
        if func in PRODUCTS:
            return self._multiply(func, list(args), kwargs)
        return func(*args, **kwargs)

    def _multiply(self, func: Any, args: list[Any], kwargs: Any) -> Tensor:
        """A product of queries and keys, which is remembered, or of weights and values, which lose the hidden ones."""
        a, b = PRODUCTS[func]
        square = (self.tokens, self.tokens)
        if self._weighs and args[a].shape[-2:] == square:
            self._weighs = False
            args[b] = self._hide(args[b], -2, 0)
        result: Tensor = func(*args, **kwargs)
        if result.shape[-2:] == square:
            self._product = args[a], args[b]
        return result

    def _find(self, q: Tensor, k: Tensor) -> None:
        q, k = (x.reshape(self.batch, -1, self.tokens, x.shape[-1]) for x in (q, k))
        self.found.append((q, k.repeat_interleave(q.shape[1] // k.shape[1], 1)))

    def _hide(self, x: Tensor, dim: int, fill: float) -> Tensor:
        """Fill the hidden keys along a dimension of logits or values (B, …)."""
        if self.hidden is None:
            return x
        shape = [-1, *(1,) * (x.ndim - 1)]
        shape[dim] = self.tokens
        return x.masked_fill(self.hidden.repeat_interleave(x.shape[0] // self.batch, 0).view(shape), fill)

    def _fused(self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **options: Any) -> Tensor:
        if k.shape[-2] == self.tokens == q.shape[-2]:
            self._find(q, k)
            mask = q.new_zeros(*(1,) * (q.ndim - 1), self.tokens) if attn_mask is None else attn_mask
            if mask.dtype == torch.bool:
                mask = q.new_zeros(mask.shape).masked_fill(~mask, -math.inf)
            mask = mask.expand(q.shape[0], *mask.shape[1:] if mask.ndim == q.ndim else mask.shape)
            attn_mask = self._hide(mask, -1, -math.inf)
        return F.scaled_dot_product_attention(q, k, v, attn_mask, **options)

    def _multi_head(
        self, query: Tensor, key: Tensor, value: Tensor, width: int, heads: int, *rest: Any, **kw: Any
    ) -> Any:
        if query.shape[0] == key.shape[0] == self.tokens:
            weight, bias = rest[:2]
            both = F.linear(query, weight[: 2 * width], None if bias is None else bias[: 2 * width])
            q, k = both.unflatten(2, (2, heads, -1)).permute(2, 1, 3, 0, 4)
            self._find(q, k)
            kw["key_padding_mask"] = self.hidden
        return F.multi_head_attention_forward(query, key, value, width, heads, *rest, **kw)


@dataclass(frozen=True)
class Tokens:
    """What is always kept in a block: the positions that no image flows into, and the class token if there is one."""

    prefix: tuple[int, ...]
    class_token: int | None


@dataclass(frozen=True)
class Answer:
    """What the model returns when tokens idle.

    Attributes:
        output: The model's output.
        excess: By how much the best token that was not chosen outscores the worst that was, in standard deviations
            of the scores: 0 where the choice is the published one, a rounding error where scores tie.
    """

    output: Any
    excess: float


def look(model: nn.Module, paths: Sequence[str], call: Callable[[], Any]) -> dict[str, Tokens]:
    """Find prefix and class token by running the model on different images, and by gradients.

    Args:
        model: The dense model.
        paths: Module paths of its blocks, in order.
        call: Runs the model on a batch of different images.
    """
    inputs: dict[str, Tensor] = {}
    streams: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for path in paths:

            def hook(module: nn.Module, args: Any, kwargs: Any, output: Any, path: str = path) -> None:
                inputs[path] = _stream((args, kwargs))
                streams[path] = _stream(output, inputs[path].shape)

            stack.callback(model.get_submodule(path).register_forward_hook(hook, with_kwargs=True).remove)
        with torch.enable_grad():
            output = call()
    prefixes: dict[int, tuple[int, ...]] = {}
    for x in inputs.values():
        same = (x == x[:1]).flatten(2).all(2).all(0)
        prefixes.setdefault(x.shape[1], tuple(same.nonzero().flatten().tolist()))
    reads = [_read(leaf, streams[paths[-1]]) for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
    return {path: _tokens(prefixes[x.shape[1]], reads) for path, x in inputs.items()}


@torch.enable_grad()
def _read(leaf: Tensor, stream: Tensor) -> set[int]:
    """Positions of the stream that an output depends on."""
    if not leaf.requires_grad:
        return set()
    noise = torch.randn(leaf.shape, generator=torch.Generator().manual_seed(0))
    (gradient,) = torch.autograd.grad((leaf * noise).sum(), stream, retain_graph=True, allow_unused=True)
    return set() if gradient is None else set(gradient.abs().sum((0, 2)).nonzero().flatten().tolist())


def _tokens(prefix: tuple[int, ...], reads: list[set[int]]) -> Tokens:
    if len(prefix) == 1:
        return Tokens(prefix, prefix[0])  # read or not
    alone = [min(read) for read in reads if read and read <= set(prefix)]
    some = any(read & set(prefix) for read in reads)
    return Tokens(prefix, min(alone) if alone else prefix[0] if some else None)


def _stream(values: Any, shape: torch.Size | None = None) -> Tensor:
    """The residual stream among the inputs or outputs of a block."""
    return next(
        t for t in tree_leaves(values) if isinstance(t, Tensor) and (t.shape == shape if shape else t.ndim == 3)
    )


def kept_tokens(keep: float, tokens: int) -> int:
    """K of M image tokens."""
    return max(1, math.floor(keep * tokens + 1e-9))


def scores(attention: Attention, tokens: Tokens) -> Tensor:
    """Mean over heads of the raw logit of the class query, or of the mean image query, on each token.

    Returns:
        Scores (B, N), minus infinity on the prefix.
    """
    q, k = (torch.cat(heads, 1) for heads in zip(*attention.found, strict=True))
    image = [p for p in range(k.shape[2]) if p not in tokens.prefix]
    query = q[:, :, image].mean(2) if tokens.class_token is None else q[:, :, tokens.class_token]
    found = torch.einsum("bhd,bhnd->bn", query, k) / k.shape[1]
    found[:, list(tokens.prefix)] = -math.inf
    return found


@torch.no_grad()
def idle(
    model: nn.Module,
    keeps: Mapping[str, float],
    tokens: Mapping[str, Tokens],
    chosen: Mapping[str, Tensor],
    call: Callable[[], Any],
) -> Answer:
    """Run the dense model with tokens idling in some blocks.

    Args:
        model: The dense model.
        keeps: Keep ratio of each idling block, by module path.
        tokens: Prefix and class token of each block.
        chosen: Positions (B, n) that work, as another implementation chose them; they are used, so that a tie does
            not count as an error, and held against the published rule.
        call: Runs the model.

    Raises:
        ValueError: A choice misses a prefix token, or has another number of tokens than the rule says.
    """
    excesses: list[float] = []
    with ExitStack() as stack:
        for path, keep in keeps.items():
            block = model.get_submodule(path)
            forward = _idling(block.forward, keep, tokens[path], chosen[path], excesses)
            stack.enter_context(patch.object(block, "forward", forward))
        output = call()
    return Answer(output, max(excesses, default=0.0))


def _idling(
    dense: Callable[..., Any], keep: float, tokens: Tokens, chosen: Tensor, excesses: list[float]
) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        x = _stream((args, kwargs))
        batch, count = x.shape[:2]
        working = torch.zeros(batch, count, dtype=torch.bool).scatter_(1, chosen, True)
        wanted = len(tokens.prefix) + kept_tokens(keep, count - len(tokens.prefix))
        if not working[:, list(tokens.prefix)].all() or not (working.sum(1) == wanted).all():
            raise ValueError(f"{working.sum(1).tolist()} tokens work where {wanted} should, or a prefix token idles")
        with Attention(batch, count) as attention:
            dense(*args, **kwargs)
        if not attention.found:
            raise ValueError("the block runs no attention that the reference recognises")
        found = scores(attention, tokens)
        spread = found[found > -math.inf].std()
        best = found.masked_fill(working, -math.inf).amax(1)
        worst = found.masked_fill(~working | (found == -math.inf), math.inf).amin(1)
        excesses.append(float(((best - worst) / spread).clamp(min=0).max()))
        with Attention(batch, count, ~working):
            output = dense(*args, **kwargs)
        put = lambda t: torch.where(working[..., None], t, x) if t.shape == x.shape else t  # noqa: E731
        return tree_map_only(Tensor, put, output)

    return forward
