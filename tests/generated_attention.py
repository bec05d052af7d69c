"""Attention of the generated models in all its spellings, and the norms.

Shapes: B images, P prefix and M image tokens, N = P + M, C width, H heads, D head width.
"""

import math

import torch
import torch.nn.functional as F
from generated_config import MULTIHEAD, TOKENS_BEFORE_HEADS, Config
from torch import Tensor, nn

WINDOW = 2


def written_rms(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * weight


class Written(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return written_rms(x, self.weight)


class Cosine(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.length = width**0.5

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1) * self.length


class Affine(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight + self.bias


NORMS = {"layer": nn.LayerNorm, "rms": nn.RMSNorm, "written": Written, "affine": Affine, "none": nn.Identity}


def coordinates(config: Config) -> Tensor:
    """Row and column of every token (N, 2), the prefix at (0, 0)."""
    rows, columns = config.grid
    places = torch.zeros(config.tokens, 2)
    image = torch.cartesian_prod(torch.arange(1.0, rows + 1), torch.arange(1.0, columns + 1))
    places[config.image_start : config.image_start + config.image_tokens] = image
    return places


def relative_index(config: Config) -> Tensor:
    """Which entry of a relative bias table serves each pair of tokens (N, N); the last one serves the prefix."""
    rows, columns = config.grid
    places = coordinates(config).long()
    step = places[:, None] - places[None]
    index = (step[..., 0] + rows - 1) * (2 * columns - 1) + step[..., 1] + columns - 1
    image = places[:, 0] > 0
    return torch.where(image[:, None] & image[None], index, (2 * rows - 1) * (2 * columns - 1))


def angles(places: Tensor, head_width: int) -> Tensor:
    """Rotary angles (…, D / 2) of places (…, 2)."""
    frequencies = 3.0 ** -torch.arange(head_width // 2, device=places.device)
    return (places[..., :1] + 0.5 * places[..., 1:]) * frequencies


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn pairs of features (…, D), one from each half, by given angles (…, D / 2)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def rotate_complex(x: Tensor, turn: Tensor) -> Tensor:
    """Turn neighbouring features (…, D) by complex numbers (…, D / 2)."""
    pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turn).flatten(-2)


class Attention(nn.Module):
    """Self-attention of tokens (B, N, C), or (N, B, C) where they stand first."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config, c = config, config
        self.heads, self.head_width = c.heads, c.head_width
        width = self.heads * self.head_width
        self.kv_heads = self.heads if c.groups == "none" else 1 if c.groups == "broadcast" else self.heads // 2
        self.scale = (0.7 if c.scale in ("before", "after", "both") else 1.0) * self.head_width**-0.5
        self.dropout = 0.1 if c.dropout else 0.0
        if c.core in MULTIHEAD:
            self.attention = nn.MultiheadAttention(
                c.width, self.heads, dropout=self.dropout, batch_first=not c.tokens_first
            )
        elif c.projection in ("fused", "chunked", "interleaved"):
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
        if c.core not in MULTIHEAD:
            self.out = nn.Linear(width, c.width)
        norms = {"layer": nn.LayerNorm, "written": Written, "cosine": Cosine}
        if c.qk_norm != "none":
            self.query_norm, self.key_norm = (norms[c.qk_norm](self.head_width) for _ in range(2))
        talks = c.talking != "none"
        for name in ("before", "after"):
            self.register_parameter(name, nn.Parameter(torch.empty(self.heads, self.heads)) if talks else None)
        if c.scale == "learned":
            self.temperature = nn.Parameter(torch.empty(()))
        if c.scale == "learned_per_head":
            self.temperature = nn.Parameter(torch.empty(self.heads, 1, 1))
        self._add_tables()

    def _add_tables(self) -> None:
        c = self.config
        places = coordinates(c)
        if c.bias == "table":
            entries = (2 * c.grid[0] - 1) * (2 * c.grid[1] - 1) + 1
            self.table = nn.Parameter(torch.empty(entries, self.heads))
            self.register_buffer("index", relative_index(c), persistent=False)
        if c.bias == "distances":
            self.register_buffer("distances", torch.cdist(places, places))
        if "distances" in c.bias:
            self.register_buffer("slopes", 0.5 ** torch.arange(1.0, self.heads + 1))
        if c.bias == "computed_distances" or c.rotary == "computed":
            self.register_buffer("places", places)
        if c.rotary != "none":
            turn = angles(places, self.head_width)
            if c.rotary == "image_only":
                turn = turn[c.image_start : c.image_start + c.image_tokens]
            if c.rotary == "complex":
                self.register_buffer("turn", torch.polar(torch.ones_like(turn), turn), persistent=False)
            elif c.rotary != "computed":
                self.register_buffer("cos", turn.cos(), persistent=False)
                self.register_buffer("sin", turn.sin(), persistent=False)
        added = seen = None
        if c.mask == "float":
            added = torch.sin(torch.arange(c.tokens**2) * 1.7).view(c.tokens, c.tokens)
        if c.mask == "diagonal_added":
            added = torch.zeros(c.tokens, c.tokens).fill_diagonal_(-math.inf)
        if c.mask == "boolean":
            pair = torch.arange(c.tokens)
            seen = ((pair[:, None] * 3 + pair * 5) % 7 > 1) | torch.eye(c.tokens).bool()
        self.register_buffer("added", added)
        self.register_buffer("seen", seen)

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

    def bias(self) -> Tensor | None:
        """What the positions of two tokens add to their scaled logit, (H, N, N)."""
        if self.config.bias == "table":
            return self.table[self.index].permute(2, 0, 1)
        if self.config.bias == "distances":
            return -self.slopes[:, None, None] * self.distances
        if self.config.bias == "computed_distances":
            distances = (self.places[:, None] - self.places[None]).pow(2).sum(-1).sqrt()
            return -self.slopes.view(-1, 1, 1) * distances
        return None

    def seen_keys(self, tokens: int, valid: Tensor | None) -> Tensor | None:
        """Which keys each query sees, (N, N) or (B, 1, 1, N)."""
        if valid is not None:
            return valid[:, None, None]
        if self.config.mask == "diagonal":
            return ~torch.eye(tokens, dtype=torch.bool)
        return self.seen

    def mask(self, tokens: int, valid: Tensor | None) -> Tensor | None:
        """Everything that is said about pairs of tokens, as one mask: what to add, or what is seen."""
        terms = [term for term in (self.bias(), self.added) if term is not None]
        seen = self.seen_keys(tokens, valid)
        if not terms:
            return seen
        added = sum(terms[1:], start=terms[0])
        return added if seen is None else added.masked_fill(~seen, -math.inf)

    def talk(self, logits: Tensor, weight: Tensor) -> Tensor:
        """Mix the heads of logits or weights (B, H, N, N)."""
        if self.config.talking == "linear":
            return F.linear(logits.permute(0, 2, 3, 1), weight).permute(0, 3, 1, 2)
        return torch.einsum("bhqk,gh->bgqk", logits, weight) if self.config.talking == "einsum" else logits

    def weights(self, logits: Tensor, valid: Tensor | None) -> Tensor:
        """Attention weights (B, H, N, N) from the products of queries and keys."""
        if self.config.scale.startswith("learned"):
            logits = logits * self.temperature.exp()
        elif self.config.scale == "divided":
            logits = logits / math.sqrt(self.head_width)
        elif self.config.scale in ("default", "after"):
            logits = logits * self.scale
        bias, seen = self.bias(), self.seen_keys(logits.shape[-1], valid)
        logits = logits if bias is None else logits + bias
        logits = self.talk(logits, self.before)
        logits = logits if self.added is None else logits + self.added
        logits = logits if seen is None else logits.masked_fill(~seen, torch.finfo(logits.dtype).min)
        weights = F.dropout(logits.softmax(dim=-1), self.dropout, self.training)
        return self.talk(weights, self.after)

    def shrunk(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Scale queries, or both, before they meet."""
        if self.config.scale == "before":
            return q * self.scale, k
        return (q * self.scale**0.5, k * self.scale**0.5) if self.config.scale == "both" else (q, k)

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


class ReducedKeys(nn.Module):
    """Attention over keys and values of patches of the token grid."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.query, self.key_value = nn.Linear(config.width, config.width), nn.Linear(config.width, 2 * config.width)
        self.reduce = nn.Conv2d(config.width, config.width, WINDOW, WINDOW)
        self.out = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor, positions: Tensor | None, valid: Tensor | None) -> Tensor:
        c = self.config
        batch, count, width = x.shape
        grid = x.transpose(1, 2).reshape(batch, width, *c.grid)
        fewer = self.reduce(grid).flatten(2).transpose(1, 2)
        k, v = self.key_value(fewer).view(batch, -1, 2, c.heads, c.head_width).permute(2, 0, 3, 1, 4)
        q = self.query(x).view(batch, count, c.heads, c.head_width).transpose(1, 2)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, count, width))


class Windows(nn.Module):
    """Attention inside windows of the token grid."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.qkv, self.out = nn.Linear(config.width, 3 * config.width), nn.Linear(config.width, config.width)

    def forward(self, x: Tensor, positions: Tensor | None, valid: Tensor | None) -> Tensor:
        c, area = self.config, WINDOW**2
        rows, columns = (side // WINDOW for side in c.grid)
        batch, count, width = x.shape
        windows = x.view(batch, rows, WINDOW, columns, WINDOW, width).transpose(2, 3).reshape(-1, area, width)
        q, k, v = self.qkv(windows).view(-1, area, 3, c.heads, c.head_width).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        out = out.reshape(batch, rows, columns, WINDOW, WINDOW, width).transpose(2, 3).reshape(batch, count, width)
        return self.out(out)
