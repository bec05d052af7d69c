"""Queries, keys and values of the generated models, in all their spellings.

Shapes: B images, N tokens, prefix included, C width, H heads, D head width.
"""

import torch
from torch import Tensor, nn

from tests.models.generated.config import TOKENS_BEFORE_HEADS, Config
from tests.models.generated.norms import Cosine, Written
from tests.models.generated.positions import angles, rotate, rotate_complex


class Projections(nn.Module):
    """The part of attention that makes queries, keys and values; `heads` and `kv_heads` are known before."""

    config: Config
    heads: int
    kv_heads: int
    head_width: int

    def add_projections(self) -> None:
        c = self.config
        width = self.heads * self.head_width
        if c.projection in ("fused", "chunked", "interleaved"):
            self.qkv = nn.Linear(c.width, 3 * width)
        elif c.projection == "key_value":
            self.query = nn.Linear(c.width, width)
            self.key_value = nn.Linear(c.width, 2 * self.kv_heads * self.head_width, bias=False)
        elif c.projection == "separate":
            self.query = nn.Linear(c.width, width)
            self.key = nn.Linear(c.width, self.kv_heads * self.head_width, bias=False)
            self.value = nn.Linear(c.width, self.kv_heads * self.head_width)
        elif c.projection == "raw":
            kv_width = self.kv_heads * self.head_width
            widths = (width, kv_width, kv_width)
            self.query, self.key, self.value = (nn.Parameter(torch.empty(c.width, w)) for w in widths)
            self.query_bias = nn.Parameter(torch.empty(width))
        else:
            shape = (self.heads, c.width, self.head_width)
            self.query, self.key, self.value = (nn.Parameter(torch.empty(shape)) for _ in range(3))

    def add_head_norms(self) -> None:
        norms = {"layer": nn.LayerNorm, "written": Written, "cosine": Cosine}
        if self.config.qk_norm != "none":
            self.query_norm, self.key_norm = (norms[self.config.qk_norm](self.head_width) for _ in range(2))

    @property
    def touches_heads(self) -> bool:
        return self.config.rotary != "none" or self.config.qk_norm != "none" or self.config.groups != "none"

    def project(self, x: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of tokens (B, N, C) as (B, N, H, D) or (B, H, N, D), rotated and normalised."""
        c, heads, head_width = self.config, self.heads, self.head_width
        batch, count, _ = (len(x), *x.shape[1:]) if c.batch == "len" else x.shape
        tokens_before_heads = c.core in TOKENS_BEFORE_HEADS
        placed = x if positions is None else x + positions
        if c.projection == "raw_heads":
            to = "bnhd" if tokens_before_heads else "bhnd"
            q, k = (torch.einsum(f"bnc,hcd->{to}", placed, w) for w in (self.query, self.key))
            v = torch.einsum(f"bnc,hcd->{to}", x, self.value)
        elif c.projection == "fused" and positions is None:
            qkv = self.qkv(x).reshape(batch, count, 3, heads, head_width)
            q, k, v = qkv.unbind(2) if tokens_before_heads else qkv.permute(2, 0, 3, 1, 4).unbind(0)
        elif c.projection == "interleaved" and positions is None:
            qkv = self.qkv(x).reshape(batch, count, heads, 3, head_width)
            q, k, v = qkv.unbind(3) if tokens_before_heads else qkv.permute(3, 0, 2, 1, 4)
        else:
            flat = [y.view(batch, count, -1, head_width) for y in self.flat(x, placed)]
            q, k, v = flat if tokens_before_heads else (y.transpose(1, 2) for y in flat)
        if c.qk_norm != "none":
            q, k = self.query_norm(q), self.key_norm(k)
        if c.rotary != "none":
            q, k = self.turned(q), self.turned(k)
        return q, k, v

    def flat(self, x: Tensor, placed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (B, N, H * D)."""
        c = self.config
        if c.projection == "separate":
            return self.query(placed), self.key(placed), self.value(x)
        if c.projection == "raw":
            return placed @ self.query + self.query_bias, placed @ self.key, torch.matmul(x, self.value)
        if c.projection == "key_value":
            k, v = self.key_value(x).chunk(2, dim=-1)
            return self.query(placed), k, v
        if placed is x:
            return self.qkv(x).chunk(3, dim=-1)
        return *self.qkv(placed).chunk(3, dim=-1)[:2], self.qkv(x)[..., 2 * self.heads * self.head_width :]

    def turned(self, x: Tensor) -> Tensor:
        """Rotate the heads of every token by its place."""
        c = self.config
        tokens_before_heads = c.core in TOKENS_BEFORE_HEADS
        if c.rotary == "complex":
            return rotate_complex(x, self.turn[:, None] if tokens_before_heads else self.turn)
        if c.rotary == "computed":
            turn = angles(self.places, self.head_width)
            cos, sin = turn.cos(), turn.sin()
        else:
            cos, sin = self.cos, self.sin
        if tokens_before_heads:
            cos, sin = cos[:, None], sin[:, None]
        if c.rotary != "image_only":
            return rotate(x, cos, sin)
        start, stop = c.image_start, c.image_start + c.image_tokens
        if tokens_before_heads:
            return torch.cat([x[:, :start], rotate(x[:, start:stop], cos, sin), x[:, stop:]], dim=1)
        return torch.cat([x[:, :, :start], rotate(x[:, :, start:stop], cos, sin), x[:, :, stop:]], dim=2)

    def repeat(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Give every query head its key and value head."""
        dim = 2 if self.config.core in TOKENS_BEFORE_HEADS else 1
        if self.config.groups == "repeated":
            return q, k.repeat_interleave(2, dim=dim), v.repeat_interleave(2, dim=dim)
        if self.config.groups == "expanded":
            k, v = (y.unsqueeze(dim + 1).expand(*y.shape[: dim + 1], 2, *y.shape[dim + 1 :]) for y in (k, v))
            return q, k.flatten(dim, dim + 1), v.flatten(dim, dim + 1)
        return q, k, v
