"""Attention of the generated models in all its spellings.

Shapes: B images, N tokens, prefix included, C width, H heads, D head width.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models.generated.config import MULTIHEAD, Config
from tests.models.generated.logits import Logits
from tests.models.generated.projections import Projections


class Attention(Projections, Logits):
    """Self-attention of tokens (B, N, C), or (N, B, C) where they stand first."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config, c = config, config
        self.heads, self.head_width = c.heads, c.head_width
        self.kv_heads = self.heads if c.groups == "none" else 1 if c.groups == "broadcast" else self.heads // 2
        self.scale = (0.7 if c.scale in ("before", "after", "both") else 1.0) * self.head_width**-0.5
        self.dropout = 0.1 if c.dropout else 0.0
        if c.core in MULTIHEAD:
            self.attention = nn.MultiheadAttention(
                c.width, self.heads, dropout=self.dropout, batch_first=not c.tokens_first
            )
        else:
            self.add_projections()
            self.out = nn.Linear(self.heads * self.head_width, c.width)
        self.add_head_norms()
        self.add_mixing()
        self.add_tables()

    def forward(self, x: Tensor, positions: Tensor | None, valid: Tensor | None) -> Tensor:
        c = self.config
        if c.core in MULTIHEAD:
            return self.multihead(x, positions, valid)
        if c.tokens_first and c.core in ("bmm", "baddbmm") and c.projection == "separate" and not self.touches_heads:
            return self.merged_first(x, positions, valid)
        if c.tokens_first:
            x, positions = x.transpose(0, 1), None if positions is None else positions.transpose(0, 1)
        q, k, v = self.repeat(*self.project(x, positions))
        mix = getattr(self, c.core)
        out = self.out(mix(q, k, v, valid))
        return out.transpose(0, 1) if c.tokens_first else out

    def sdpa(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> Tensor:
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=self.mask(q.shape[2], valid), dropout_p=self.dropout if self.training else 0.0,
            scale=self.scale if self.config.scale == "after" else None, enable_gqa=self.config.groups == "native",
        )  # fmt: skip
        return out.transpose(1, 2).flatten(2)

    def matmul(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> Tensor:
        q, k = self.shrunk(q, k)
        out = self.weights(q @ k.transpose(-2, -1), valid) @ v
        return out.transpose(1, 2).reshape(*out.shape[:1], out.shape[2], -1)

    def permute(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> Tensor:
        q, k = self.shrunk(q, k)
        weights = self.weights(q.permute(0, 2, 1, 3) @ k.permute(0, 2, 3, 1), valid)
        return torch.matmul(weights, v.permute(0, 2, 1, 3)).permute(0, 2, 1, 3).flatten(2)

    def einsum(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> Tensor:
        q, k = self.shrunk(q, k)
        weights = self.weights(torch.einsum("bhqd,bhkd->bhqk", q, k), valid)
        return torch.einsum("bhqk,bhkd->bhqd", weights, v).permute(0, 2, 1, 3).flatten(2)

    def einsum_bnhd(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> Tensor:
        q, k = self.shrunk(q, k)
        weights = self.weights(torch.einsum("bqhd,bkhd->bhqk", q, k), valid)
        return torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2)

    def bmm(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> Tensor:
        batch, heads, count, head_width = q.shape
        out = self.merged(*(y.reshape(batch * heads, count, head_width) for y in (q, k, v)), batch, valid)
        return out.view(batch, heads, count, head_width).transpose(1, 2).reshape(batch, count, heads * head_width)

    baddbmm = bmm

    def merged(self, q: Tensor, k: Tensor, v: Tensor, batch: int, valid: Tensor | None) -> Tensor:
        """Attention of heads that stand with the batch, (B * H, N, D)."""
        q, k = self.shrunk(q, k)
        stacked, (count, _) = (batch, self.heads), q.shape[1:]
        if self.config.core == "bmm":
            logits = torch.bmm(q, k.transpose(1, 2)).view(*stacked, count, count)
            return torch.bmm(self.weights(logits, valid).view(-1, count, count), v)
        scale = self.scale if self.config.scale in ("default", "after") else 1.0
        mask = self.mask(count, valid)
        if mask is None:
            empty = torch.empty(q.shape[0], count, count, dtype=q.dtype)
            logits = torch.baddbmm(empty, q, k.transpose(1, 2), beta=0, alpha=scale)
        else:
            mask = mask if mask.dtype != torch.bool else torch.zeros(mask.shape).masked_fill(~mask, -math.inf)
            mask = mask.expand(*stacked, count, count).reshape(-1, count, count)
            logits = torch.baddbmm(mask, q, k.transpose(1, 2), beta=1.0, alpha=scale)
        return torch.bmm(F.dropout(F.softmax(logits, -1), self.dropout, self.training), v)

    def merged_first(self, x: Tensor, positions: Tensor | None, valid: Tensor | None) -> Tensor:
        """The same for tokens (N, B, C), which never change places with the batch."""
        count, batch, _ = x.shape
        placed = x if positions is None else x + positions
        flat = (y.reshape(count, batch * self.heads, self.head_width).transpose(0, 1) for y in self.flat(x, placed))
        out = self.merged(*flat, batch, valid)
        return self.out(out.transpose(0, 1).reshape(count, batch, -1))

    def multihead(self, x: Tensor, positions: Tensor | None, valid: Tensor | None) -> Tensor:
        c = self.config
        placed = x if positions is None else x + positions
        mask = self.mask(x.shape[not c.tokens_first], None)
        if mask is not None:
            mask = ~mask if mask.dtype == torch.bool else mask
            mask = mask.repeat(x.shape[c.tokens_first], 1, 1) if mask.ndim == 3 else mask
        weights = {} if c.core == "multihead_weights" else {"need_weights": False}
        padding = None if valid is None else ~valid
        return self.attention(placed, placed, x, attn_mask=mask, key_padding_mask=padding, **weights)[0]
