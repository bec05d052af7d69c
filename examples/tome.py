"""Token merging (ToMe, arXiv:2210.09461) for timm's plain Vision Transformers, to compare following with.

Each block merges `merged` pairs of like tokens between attention and MLP, by bipartite matching on its keys; sizes are
carried on, weigh the means and enter attention as logarithms. For dense heads every token gets back what became of
the token it was merged into.

Shapes: B images, N tokens with the class token first, C width, H heads, D head width.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Merging(nn.Module):
    """The blocks of a ViT with `merged[i]` tokens fewer behind block i; returns all tokens (B, N, C)."""

    def __init__(self, blocks: Sequence[nn.Module], merged: Sequence[int]) -> None:
        super().__init__()
        self.blocks, self.merged = nn.ModuleList(blocks), tuple(merged)

    def forward(self, x: Tensor) -> Tensor:
        sizes = x.new_ones(x.shape[:2])
        places = torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1)  # where each token is by now
        for block, merged in zip(self.blocks, self.merged, strict=True):
            attended, keys = attend(block.attn, block.norm1(x), sizes)
            x = x + block.ls1(attended)
            if merged:
                moves = match(keys, merged)
                x, sizes = merge(x, sizes, moves, x.shape[1] - merged)
                places = moves.gather(1, places)
            x = x + block.ls2(block.mlp(block.norm2(x)))
        return x.gather(1, places[..., None].expand(-1, -1, x.shape[-1]))


def attend(attention: nn.Module, x: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """Attention in which a token counts as often as it has tokens in it; and the keys' mean over heads, (B, N, D)."""
    q, k, v = attention.qkv(x).unflatten(2, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    out = F.scaled_dot_product_attention(q, k, v, sizes.log()[:, None, None])
    return attention.proj(out.transpose(1, 2).flatten(2)), k.mean(1)


def match(keys: Tensor, merged: int) -> Tensor:
    """Where each token goes (B, N): of every second token the `merged` most like one of the others join it."""
    batch, count, _ = keys.shape
    unit = F.normalize(keys, dim=-1)
    likeness = unit[:, ::2] @ unit[:, 1::2].mT
    likeness[:, 0] = -torch.inf  # the class token stays
    best, partner = likeness.max(-1)
    leaving = best.argsort(dim=1, descending=True)[:, :merged]
    stays = torch.ones(batch, count, dtype=torch.long, device=keys.device)
    stays.scatter_(1, 2 * leaving, 0)
    moves = stays.cumsum(1) - 1  # those that stay close ranks
    joined = moves.gather(1, 2 * partner.gather(1, leaving) + 1)
    return moves.scatter(1, 2 * leaving, joined)


def merge(x: Tensor, sizes: Tensor, moves: Tensor, left: int) -> tuple[Tensor, Tensor]:
    """The `left` tokens where they go, as means over all that is in them; and how much that is."""
    sums = x.new_zeros(x.shape[0], left, x.shape[2])
    sums.scatter_add_(1, moves[..., None].expand_as(x), x * sizes[..., None])
    sizes = sizes.new_zeros(x.shape[0], left).scatter_add_(1, moves, sizes)
    return sums / sizes[..., None], sizes


def gmacs(merged: Sequence[int], tokens: int, width: int) -> float:
    """Multiply-adds of the blocks for one image, in units of 1e9; MLPs are four times as wide."""
    total = 0
    for each in merged:
        total += 4 * tokens * width**2 + 2 * tokens**2 * width + 8 * (tokens - each) * width**2
        tokens -= each
    return total / 1e9


def spread(budget: float, tokens: int, width: int, depth: int) -> list[int]:
    """How many tokens each block merges, equally many but for one, so that a budget of GMACs is just met."""
    for total in range(depth * tokens):
        counts, left = [], tokens
        for block in range(depth):
            wanted = total // depth + (block >= depth - total % depth)
            counts.append(min(wanted, (left - 1) // 2))  # no more than half of them can join others
            left -= counts[-1]
        if gmacs(counts, tokens, width) <= budget:
            return counts
    raise ValueError(f"no merging of {tokens} tokens in {depth} blocks gets below {budget} GMACs")
