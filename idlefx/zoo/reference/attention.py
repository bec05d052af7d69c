"""The attention that runs in a user's own modules: its queries and keys are read, and its keys may be weighed."""

import math
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

PRODUCTS = {  # which arguments are multiplied
    torch.matmul: (0, 1), Tensor.matmul: (0, 1), Tensor.__matmul__: (0, 1), torch.bmm: (0, 1), Tensor.bmm: (0, 1),
    torch.baddbmm: (1, 2), Tensor.baddbmm: (1, 2),
}  # fmt: skip
SOFTMAXES = (torch.softmax, Tensor.softmax, F.softmax)
VIEWS = (Tensor.view, Tensor.reshape, Tensor.unflatten, torch.reshape, torch.unflatten)
SCALINGS = {
    operator: power
    for power, names in ((1, ("mul", "mul_", "__mul__", "__rmul__")), (-1, ("div", "div_", "__truediv__")))
    for name in names
    for operator in {getattr(Tensor, name), getattr(torch, name, None)} - {None}
}


class Core(NamedTuple):
    """What one attention compares.

    Attributes:
        queries: Raw, (B, H, N, D).
        keys: Raw, served once to each head, (B, H, N, D).
        scale: What their product is multiplied by: a number, or a tensor that is 1 long in both of its last
            dimensions, those of the tokens.
    """

    queries: Tensor
    keys: Tensor
    scale: Any


class Attention(TorchFunctionMode):
    """Reads all attention over a sequence of `tokens` tokens that runs inside it, and may weigh its keys.

    Args:
        batch: Images B.
        tokens: Tokens N of each.
        sizes: How many tokens each key stands for, (B, N): its logarithm is added to the key's logits, so that 0
            hides the key; every key stands for itself if not told.

    Attributes:
        found: Queries and keys of each attention.
    """

    def __init__(self, batch: int, tokens: int, sizes: Tensor | None = None) -> None:
        super().__init__()
        self.batch, self.tokens, self.sizes = batch, tokens, sizes
        self.found: list[Core] = []
        self._product: tuple[Tensor, Tensor] | None = None
        self._logits: Tensor | None = None
        self._scale: Any = 1.0
        self._weighs = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self._fused(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            return self._multi_head(*args, **kwargs)
        if func in SOFTMAXES and self._product is not None and args[0].shape[-1] == self.tokens:
            q, k = self._product
            self._find(q, k.transpose(-2, -1), self._scale)
            self._product, self._logits, self._weighs = None, None, True
            return func(self._weigh(args[0]), *args[1:], **kwargs)
        if func in PRODUCTS:
            return self._multiply(func, list(args), kwargs)
        if func in VIEWS and args[0] is self._logits:
            self._logits = func(*args, **kwargs)
            return self._logits
        if func in SCALINGS and len(args) == 2 and args[0] is self._logits:
            return self._rescale(func, args[1])
        return func(*args, **kwargs)

    def _multiply(self, func: Any, args: list[Any], kwargs: Any) -> Tensor:
        """A product of queries and keys, which is remembered, or of weights and values, which lose the hidden ones."""
        a, b = PRODUCTS[func]
        square = (self.tokens, self.tokens)
        if self._weighs and args[a].shape[-2:] == square:
            self._weighs = False
            args[b] = self._without_hidden(args[b])
        result: Tensor = func(*args, **kwargs)
        if result.shape[-2:] == square:
            self._product, self._logits, self._scale = (args[a], args[b]), result, kwargs.get("alpha", 1.0)
        return result

    def _rescale(self, func: Any, factor: Any) -> Tensor:
        """Products of queries and keys times or over a factor, which is remembered if it is the same for all tokens."""
        result: Tensor = func(self._logits, factor)
        if not isinstance(factor, Tensor) or factor.ndim < 2 or factor.shape[-2:] == (1, 1):
            self._logits, self._scale = result, self._scale * factor ** SCALINGS[func]
        return result

    def _find(self, q: Tensor, k: Tensor, scale: Any) -> None:
        q, k = (x.reshape(self.batch, -1, self.tokens, x.shape[-1]) for x in (q, k))
        self.found.append(Core(q, k.repeat_interleave(q.shape[1] // k.shape[1], 1), scale))

    def _weigh(self, logits: Tensor) -> Tensor:
        """Logits (B, …, N) with what the sizes of the keys add to them."""
        sizes = self._along(logits, -1)
        return logits if sizes is None else logits + sizes.log().to(logits.dtype)

    def _without_hidden(self, values: Tensor) -> Tensor:
        """Values (B, …, N, D) with zeros for hidden keys."""
        sizes = self._along(values, -2)
        return values if sizes is None else values.masked_fill(sizes == 0, 0)

    def _along(self, x: Tensor, dim: int) -> Tensor | None:
        """The sizes, laid along a dimension of x (B, …) or (B * H, …)."""
        if self.sizes is None:
            return None
        shape = [-1, *(1,) * (x.ndim - 1)]
        shape[dim] = self.tokens
        return self.sizes.repeat_interleave(x.shape[0] // self.batch, 0).view(shape)

    def _fused(self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **options: Any) -> Tensor:
        if k.shape[-2] == self.tokens == q.shape[-2]:
            self._find(q, k, options.get("scale") or q.shape[-1] ** -0.5)
            mask = q.new_zeros(*(1,) * (q.ndim - 1), self.tokens) if attn_mask is None else attn_mask
            if mask.dtype == torch.bool:
                mask = q.new_zeros(mask.shape).masked_fill(~mask, -math.inf)
            mask = mask[(None,) * (q.ndim - mask.ndim)]
            attn_mask = self._weigh(mask.expand(q.shape[0], *mask.shape[1:]))
        return F.scaled_dot_product_attention(q, k, v, attn_mask, **options)

    def _multi_head(
        self, query: Tensor, key: Tensor, value: Tensor, width: int, heads: int, *rest: Any, **kw: Any
    ) -> Any:
        if query.shape[0] == key.shape[0] == self.tokens:
            weight, bias = rest[:2]
            both = F.linear(query, weight[: 2 * width], None if bias is None else bias[: 2 * width])
            q, k = both.unflatten(2, (2, heads, -1)).permute(2, 1, 3, 0, 4)
            self._find(q, k, q.shape[-1] ** -0.5)
            kw["key_padding_mask"] = self._padding(kw.get("key_padding_mask"), query.dtype)
        return F.multi_head_attention_forward(query, key, value, width, heads, *rest, **kw)

    def _padding(self, padding: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """What is added to the logits of each key (B, N), where True, or minus infinity, has hidden it already."""
        if self.sizes is None:
            return padding
        added = self.sizes.log().to(dtype)
        if padding is None:
            return added
        return added.masked_fill(padding, -math.inf) if padding.dtype == torch.bool else added + padding


class SegmentAttention(Attention):
    """Reads attention that runs over one segment of a sequence after the other.

    Args:
        batch: Images B, or one sequence of packed ones.
        lengths: How many tokens each segment has; one of all tokens is any other attention.
        sizes: How many tokens each key of the sequence stands for, (B, N).
    """

    def __init__(self, batch: int, lengths: tuple[int, ...], sizes: Tensor | None = None) -> None:
        super().__init__(batch, lengths[0])
        self.lengths, self._all_sizes = lengths, sizes
        self._begin(0)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs)
        if len(self.found) > self._before and not self._weighs:  # the attention over the segment is done
            self._begin(len(self.found))
        return result

    def _begin(self, before: int) -> None:
        self._before, place = before, before % len(self.lengths)
        self.tokens, stop = self.lengths[place], list(accumulate(self.lengths))[place]
        self.sizes = None if self._all_sizes is None else self._all_sizes[:, stop - self.tokens : stop]

    @property
    def by_segment(self) -> list[list[Core]]:
        """What was found, for each segment.

        Raises:
            ValueError: Some segment has no attention of its own.
        """
        count = len(self.lengths)
        if not self.found or len(self.found) % count:
            raise ValueError("the block runs no attention that the reference recognises, or not over all segments")
        return [self.found[place::count] for place in range(count)]
