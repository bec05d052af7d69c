"""A private tower over patches of several images in one sequence (N, C), with attention over each image alone."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models.small import randomise

WIDTH, HEADS, PATCH = 32, 2, 12
EACH = WIDTH // HEADS
Cut = Callable[[Tensor, Sequence[int]], Sequence[Tensor]]


def by_split(x: Tensor, lengths: Sequence[int]) -> Sequence[Tensor]:
    """Tokens stand in the last dimension but one."""
    return x.split(list(lengths), -2)


def by_slices(x: Tensor, lengths: Sequence[int]) -> Sequence[Tensor]:
    ends = [sum(lengths[: at + 1]) for at in range(len(lengths))]
    return [x[..., end - length : end, :] for length, end in zip(lengths, ends, strict=True)]


def by_narrow(x: Tensor, lengths: Sequence[int]) -> Sequence[Tensor]:
    return [x.narrow(-2, sum(lengths[:at]), length) for at, length in enumerate(lengths)]


def by_chunks(x: Tensor, lengths: Sequence[int]) -> Sequence[Tensor]:
    return x.chunk(len(lengths), -2)


class Block(nn.Module):
    """A block that attends over each of the segments of a sequence.

    Args:
        lengths: How many tokens each segment has.
        fused: Whether attention is one call; else it is spelled out.
        shares_keys: Whether all heads have one key and value.
        turns: Whether queries and keys are turned by an angle for each position.
        biased: Whether there is a table (heads, N, N) that is added to the logits, of which each segment reads its own.
        post_norm: Whether norms stand behind the sums.
        cut: What cuts a sequence into segments.
        dropout: Share of the MLP's output that is dropped in train mode.
    """

    def __init__(
        self, lengths: Sequence[int], *, fused: bool = True, shares_keys: bool = False, turns: bool = False,
        biased: bool = False, post_norm: bool = False, cut: Cut = by_split, dropout: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.lengths, self.fused, self.post_norm, self.cut = tuple(lengths), fused, post_norm, cut
        self.key_heads = 1 if shares_keys else HEADS
        self.norm, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.query, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.key, self.value = (nn.Linear(WIDTH, self.key_heads * EACH) for _ in range(2))
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 48), nn.GELU(), nn.Linear(48, WIDTH), nn.Dropout(dropout))
        count = sum(lengths)
        self.register_buffer("angles", torch.randn(count, EACH // 2) if turns else None)
        self.bias = nn.Parameter(torch.randn(HEADS, count, count)) if biased else None

    def turned(self, x: Tensor) -> Tensor:  # (…, N, EACH)
        if self.angles is None:
            return x
        (a, b), cos, sin = x.chunk(2, -1), self.angles.cos(), self.angles.sin()
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        if self.fused:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        logits = (q @ k.transpose(-2, -1)) * EACH**-0.5
        return (logits if bias is None else logits + bias).softmax(-1) @ v

    def attention(self, x: Tensor) -> Tensor:
        q = self.turned(self.query(x).unflatten(-1, (HEADS, EACH)).transpose(-3, -2))
        k, v = (layer(x).unflatten(-1, (self.key_heads, EACH)).transpose(-3, -2) for layer in (self.key, self.value))
        k = self.turned(k)
        if self.key_heads == 1:
            k, v = (t.expand(*t.shape[:-3], HEADS, *t.shape[-2:]) for t in (k, v))
        ends = [sum(self.lengths[: at + 1]) for at in range(len(self.lengths))]
        spans = [slice(end - length, end) for length, end in zip(self.lengths, ends, strict=True)]
        biases = [None if self.bias is None else self.bias[:, span, span] for span in spans]
        parts = zip(*(self.cut(t, self.lengths) for t in (q, k, v)), biases, strict=True)
        return self.out(torch.cat([self.attend(*part) for part in parts], -2).transpose(-3, -2).flatten(-2))

    def forward(self, x: Tensor) -> Tensor:  # (N, C) or (B, N, C)
        if self.post_norm:
            x = self.norm(x + self.attention(x))
            return self.norm2(x + self.mlp(x))
        x = x + self.attention(self.norm(x))
        return x + self.mlp(self.norm2(x))


class Tower(nn.Module):
    """Patches (N, 12), or as many in each sequence of a batch, through such blocks."""

    def __init__(self, blocks: Sequence[nn.Module], count: int) -> None:
        super().__init__()
        self.patches, self.positions = nn.Linear(PATCH, WIDTH), nn.Parameter(torch.randn(count, WIDTH))
        self.blocks, self.norm, self.head = nn.ModuleList(blocks), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 5)

    def forward(self, patches: Tensor) -> Tensor:
        x = self.patches(patches) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def tower(lengths: Sequence[int], depth: int = 3, kind: type[Block] = Block, **options: object) -> Tower:
    """A tower whose blocks all attend over the same segments, with weights that matter."""
    torch.manual_seed(0)
    model = Tower([kind(lengths, **options) for _ in range(depth)], sum(lengths)).eval()
    randomise(model)
    return model
