"""Private Vision Transformers nobody has seen: one tiny model, and a `Config` that says how each of its parts is spelled.

Shapes: B images, P prefix and M image tokens, N = P + M, C width, H heads, D head width.
"""

import math
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PATCH, CLASSES, LABELS = 4, 7, 5
HAND_WRITTEN = ("matmul", "permute", "einsum", "einsum_bnhd", "bmm", "baddbmm")
TOKENS_BEFORE_HEADS = ("permute", "einsum_bnhd")
MULTIHEAD = ("multihead", "multihead_weights")
WINDOW = 2

CHOICES: dict[str, tuple[Any, ...]] = {
    "core": ("sdpa", *HAND_WRITTEN, *MULTIHEAD),
    "scale": ("default", "before", "after", "divided", "both", "learned"),
    "projection": ("fused", "chunked", "interleaved", "separate", "key_value", "raw", "raw_heads"),
    "groups": ("none", "repeated", "expanded", "native"),
    "mask": ("none", "float", "boolean", "diagonal", "diagonal_added"),
    "bias": ("none", "table", "distances", "computed_distances"),
    "rotary": ("none", "given", "computed", "image_only", "complex"),
    "qk_norm": (False, True),
    "talking": ("none", "linear", "einsum"),
    "dropout": (False, True),
    "block": (
        "pre", "post", "sandwich", "parallel", "parallel_norms", "mlp_first", "branches", "two_cores", "attention_only"
    ),
    "residual": ("plain", "half", "alpha", "layer_scale", "shortcut", "in_place"),
    "mlp": ("plain", "gated", "glu", "flattened", "raw"),
    "norm": ("layer", "rms", "written", "affine", "none"),
    "tokens_first": (False, True),
    "shared": (False, True),
    "prefix": (1, 0, 2, 3),
    "place": ("front", "end", "split", "class_last", "late"),
    "positions": ("learned", "image", "none", "inside", "queries"),
    "head": ("class", "class_and_mean", "mean", "mean_of_all", "pooling", "image_pooling", "dense"),
    "inputs": ("image", "label", "label_token", "modulated", "valid"),
    "batch": ("shape", "len", "implicit"),
    "outputs": ("tensor", "dict", "features", "skips"),
    "collision": ("none", "width", "head", "hidden", "all"),
    "grid": ((4, 4), (3, 5), (2, 6)),
    "unfit": ("none", "depthwise", "token_mean", "token_norm", "reduced_keys", "windows", "token_mlp"),
}  # fmt: skip


@dataclass(frozen=True, repr=False)
class Config:
    """How a model is spelled; `CHOICES` lists what each field may say, the simplest first."""

    core: str = "sdpa"
    scale: str = "default"
    projection: str = "fused"
    groups: str = "none"
    mask: str = "none"
    bias: str = "none"
    rotary: str = "none"
    qk_norm: bool = False
    talking: str = "none"
    dropout: bool = False
    block: str = "pre"
    residual: str = "plain"
    mlp: str = "plain"
    norm: str = "layer"
    tokens_first: bool = False
    shared: bool = False
    prefix: int = 1
    place: str = "front"
    positions: str = "learned"
    head: str = "class"
    inputs: str = "image"
    batch: str = "shape"
    outputs: str = "tensor"
    collision: str = "none"
    grid: tuple[int, int] = (4, 4)
    unfit: str = "none"
    depth: int = 3

    def __repr__(self) -> str:
        said = [f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if getattr(self, f.name) != f.default]
        return f"Config({', '.join(said)})"

    @property
    def image_tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def tokens(self) -> int:
        return self.prefix + self.image_tokens

    @property
    def heads(self) -> int:
        if self.collision == "all":
            return 1
        return 2 if self.collision == "head" or self.width % 4 == 0 else 1

    @property
    def width(self) -> int:
        return {"width": self.tokens, "head": 2 * self.tokens, "all": 64}.get(self.collision, 24)

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    @property
    def hidden(self) -> int:
        return self.tokens if self.collision in ("hidden", "all") else 2 * self.width

    @property
    def prefix_positions(self) -> tuple[int, ...]:
        front = {"end": 0, "split": min(self.prefix, 1)}.get(self.place, self.prefix)
        return (*range(front), *range(front + self.image_tokens, self.tokens))

    @property
    def image_start(self) -> int:
        """Where the image tokens begin, which stand side by side."""
        return next(p for p in range(self.tokens) if p not in self.prefix_positions)

    @property
    def class_position(self) -> int | None:
        """The class token: the one the head reads, or the first prefix token where it reads all tokens alike."""
        if self.head in ("mean", "image_pooling") or not self.prefix:
            return None
        if self.head in ("class", "class_and_mean") and self.place == "class_last":
            return self.prefix_positions[-1]
        return self.prefix_positions[0]

    def prefix_at(self, block: int) -> tuple[int, ...]:
        """The prefix that a block sees."""
        return () if self.place == "late" and block < self.depth - 1 else self.prefix_positions

    def class_at(self, block: int) -> int | None:
        """The class token that a block sees."""
        return self.class_position if self.prefix_at(block) else None

    def can_idle(self, block: int) -> bool:
        return self.unfit == "none" or block != 1

    def normalised(self) -> "Config":
        """The nearest config whose parts fit together."""
        c, none = self, "none"
        if c.unfit in ("windows", "reduced_keys"):
            c = replace(c, core="sdpa", grid=(4, 4), mask=none, bias=none, rotary=none, groups=none, prefix=0)
            c = replace(c, inputs="image" if c.inputs in ("label_token", "valid") else c.inputs, positions="learned")
        if c.unfit != none:
            c = replace(c, block="pre", tokens_first=False, shared=False, place="front", collision=none)
            c = replace(c, residual="plain" if c.residual == "in_place" else c.residual)
        if c.collision == "all":
            c = replace(c, grid=(8, 8), prefix=0, inputs="image" if c.inputs == "label_token" else c.inputs)
        if c.inputs == "label_token":
            c = replace(c, prefix=max(c.prefix, 1))
        if c.prefix == 0:
            c = replace(c, place="front", head={"class": "mean", "class_and_mean": "mean"}.get(c.head, c.head))
        if c.place == "late":
            c = replace(c, mask=none, bias=none, rotary=none, positions="image", outputs="tensor", block="pre")
            c = replace(c, inputs="image" if c.inputs in ("label_token", "valid") else c.inputs)
        if c.core in MULTIHEAD:
            c = replace(c, scale="default", projection="fused", groups=none, rotary=none, qk_norm=False, talking=none)
        if c.core not in HAND_WRITTEN:
            c = replace(c, talking=none, scale=c.scale if c.scale in ("default", "after") else "default")
        if c.core in ("bmm", "baddbmm"):
            c = replace(c, talking=none)
        if c.core == "baddbmm":
            c = replace(c, scale="after" if c.scale in ("learned", "divided") else c.scale)
        if c.inputs == "valid" and c.mask != "float":
            c = replace(c, mask=none)
        if c.groups == "native" and c.core != "sdpa":
            c = replace(c, groups="repeated")
        if c.heads == 1:
            c = replace(c, groups=none, talking=none)
        if c.groups != none and c.projection in ("fused", "chunked", "interleaved", "raw_heads"):
            c = replace(c, projection="separate")
        if c.head_width % 2:
            c = replace(c, rotary=none)
        if c.block == "post" and c.norm == none:
            c = replace(c, norm="layer")
        if c.head == "dense" and c.outputs == "features":
            c = replace(c, outputs="dict")
        return c


def written_rms(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * weight


class Written(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return written_rms(x, self.weight)


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

    def __init__(self, config: Config, heads: int | None = None) -> None:
        super().__init__()
        self.config, c = config, config
        self.heads = heads or c.heads
        self.head_width = c.head_width
        width = self.heads * self.head_width
        self.kv_heads = self.heads // 2 if c.groups != "none" else self.heads
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
            self.query, self.key, self.value = (nn.Parameter(torch.empty(c.width, w)) for w in (width, kv_width, kv_width))
            self.query_bias = nn.Parameter(torch.empty(width))
        else:
            shape = (self.heads, c.width, self.head_width)
            self.query, self.key, self.value = (nn.Parameter(torch.empty(shape)) for _ in range(3))
        if c.core not in MULTIHEAD:
            self.out = nn.Linear(width, c.width)
        if c.qk_norm:
            self.query_norm, self.key_norm = nn.LayerNorm(self.head_width), nn.LayerNorm(self.head_width)
        talks = c.talking != "none"
        for name in ("before", "after"):
            self.register_parameter(name, nn.Parameter(torch.empty(self.heads, self.heads)) if talks else None)
        if c.scale == "learned":
            self.temperature = nn.Parameter(torch.tensor(0.1))
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
        return self.config.rotary != "none" or self.config.qk_norm or self.config.groups != "none"

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
        if c.qk_norm:
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
        if self.config.scale == "learned":
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
        c, (rows, columns), area = self.config, (self.config.grid[0] // WINDOW, self.config.grid[1] // WINDOW), WINDOW**2
        batch, count, width = x.shape
        windows = x.view(batch, rows, WINDOW, columns, WINDOW, width).transpose(2, 3).reshape(-1, area, width)
        q, k, v = self.qkv(windows).view(-1, area, 3, c.heads, c.head_width).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        out = out.reshape(batch, rows, columns, WINDOW, WINDOW, width).transpose(2, 3).reshape(batch, count, width)
        return self.out(out)


class Mlp(nn.Module):
    """Two layers applied to each token; `unfit` lets the tokens see one another between them."""

    def __init__(self, config: Config, unfit: str) -> None:
        super().__init__()
        self.config, self.unfit = config, unfit
        gates = 2 if config.mlp in ("gated", "glu") else 1
        self.first, self.second = nn.Linear(config.width, gates * config.hidden), nn.Linear(config.hidden, config.width)
        if unfit == "depthwise":
            self.mix = nn.Conv2d(config.hidden, config.hidden, 3, padding=1, groups=config.hidden)
        if unfit == "token_mlp":
            self.mix = nn.Linear(config.tokens, config.tokens)

    def forward(self, x: Tensor) -> Tensor:
        shape = x.shape
        if self.config.mlp == "flattened" and self.unfit == "none":
            x = x.reshape(-1, shape[-1])
        if self.config.mlp == "raw":
            x = F.gelu(torch.matmul(x, self.first.weight.t()) + self.first.bias)
            return torch.einsum("...c,dc->...d", self.mixed(x), self.second.weight) + self.second.bias
        if self.config.mlp == "gated":
            gate, x = self.first(x).chunk(2, dim=-1)
            x = F.silu(gate) * x
        elif self.config.mlp == "glu":
            x = F.glu(self.first(x), dim=-1)
        else:
            x = F.gelu(self.first(x))
        x = F.dropout(x, 0.1 if self.config.dropout else 0.0, self.training)
        return self.second(self.mixed(x)).view(shape)

    def mixed(self, x: Tensor) -> Tensor:
        c = self.config
        if self.unfit == "token_mean":
            return x + x.mean(dim=1, keepdim=True)
        if self.unfit == "token_norm":
            return x / x.norm(dim=1, keepdim=True)
        if self.unfit == "token_mlp":
            return self.mix(x.transpose(1, 2)).transpose(1, 2)
        if self.unfit == "depthwise":
            front, image, end = x.split([c.image_start, c.image_tokens, c.tokens - c.image_start - c.image_tokens], 1)
            grid = image.transpose(1, 2).reshape(len(x), c.hidden, *c.grid)
            return torch.cat([front, self.mix(grid).flatten(2).transpose(1, 2), end], dim=1)
        return x


class Block(nn.Module):
    """Attention and MLP with their norms and residual connections; takes and returns tokens (B, N, C) or (N, B, C)."""

    def __init__(self, config: Config, unfit: str = "none") -> None:
        super().__init__()
        self.config, c = config, config
        cores = 2 if c.block in ("branches", "two_cores") else 1
        kind = {"reduced_keys": ReducedKeys, "windows": Windows}.get(unfit, Attention)
        self.attentions = nn.ModuleList(kind(config) for _ in range(cores))
        self.norms = nn.ModuleList(NORMS[c.norm](c.width) for _ in range(4))
        self.mlps = nn.ModuleList(Mlp(c, unfit) for _ in range(2 if c.block == "branches" else 1))
        if c.block == "two_cores":
            self.join = nn.Linear(2 * c.width, c.width)
        if c.residual == "layer_scale":
            self.gammas = nn.ParameterList(torch.empty(c.width) for _ in range(2))
        if c.inputs == "modulated":
            self.modulation = nn.Linear(c.width, 3 * c.width)

    def forward(self, x: Tensor, *context: Tensor | None) -> Tensor:
        if self.config.block == "mlp_first":
            return self.attend(self.feed(x), *context)
        if self.config.block == "parallel":
            y = self.norms[0](x)
            return self.merge(x, self.attended(y, *context) + self.mlps[0](y), 0)
        if self.config.block == "parallel_norms":
            return self.merge(x, self.attended(self.norms[0](x), *context) + self.mlps[0](self.norms[1](x)), 0)
        x = self.attend(x, *context)
        return x if self.config.block == "attention_only" else self.feed(x)

    def attend(self, x: Tensor, *context: Tensor | None) -> Tensor:
        if self.config.block == "post":
            return self.norms[0](self.merge(x, self.attended(x, *context), 0))
        if self.config.block == "sandwich":
            return self.merge(x, self.norms[2](self.attended(self.norms[0](x), *context)), 0)
        if self.config.block == "branches":
            second = self.attentions[1](self.norms[2](x), *context[:2])
            return self.merge(x, self.attended(self.norms[0](x), *context) + second, 0)
        return self.merge(x, self.attended(self.norms[0](x), *context), 0)

    def feed(self, x: Tensor) -> Tensor:
        if self.config.block == "post":
            return self.norms[1](self.merge(x, self.mlps[0](x), 1))
        if self.config.block == "sandwich":
            return self.merge(x, self.norms[3](self.mlps[0](self.norms[1](x))), 1)
        if self.config.block == "branches":
            return self.merge(x, self.mlps[0](self.norms[1](x)) + self.mlps[1](self.norms[3](x)), 1)
        return self.merge(x, self.mlps[0](self.norms[1](x)), 1)

    def attended(self, x: Tensor, positions: Tensor | None, valid: Tensor | None, label: Tensor | None) -> Tensor:
        """The attention branch of normalised tokens; a label (B, C) shifts, scales and gates it."""
        if label is not None:
            label = label[None] if self.config.tokens_first else label[:, None]
            shift, scale, gate = self.modulation(F.silu(label)).chunk(3, dim=-1)
            x = x * (1 + scale) + shift
        out = self.attentions[0](x, positions, valid)
        if self.config.block == "two_cores":
            out = self.join(torch.cat([out, self.attentions[1](x, positions, valid)], dim=-1))
        return out if label is None else gate * out

    def merge(self, x: Tensor, branch: Tensor, which: int) -> Tensor:
        """Add a branch to the residual stream."""
        kind = self.config.residual
        if kind == "half":
            return x + branch / 2
        if kind == "alpha":
            return torch.add(x, branch, alpha=0.5)
        if kind == "layer_scale":
            return x + self.gammas[which] * branch
        if kind == "shortcut":
            return 0.8 * x + branch
        if kind == "in_place":
            branch += x
            return branch
        return x + branch


class Pooling(nn.Module):
    """A learned query gathers from the tokens (B, N, C) what the head reads, (B, C)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.latent = nn.Parameter(torch.empty(1, 1, width))
        self.key_value, self.out, self.mlp = nn.Linear(width, 2 * width), nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        k, v = self.key_value(x).chunk(2, dim=-1)
        pooled = self.out(F.scaled_dot_product_attention(self.latent.expand(x.shape[0], -1, -1), k, v))
        return (pooled + self.mlp(pooled))[:, 0]


class ViT(nn.Module):
    """`forward(image)` or `forward(image, other)`: a label (B,), or which image tokens are valid (B, M)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config, c = config, config
        self.patches = nn.Conv2d(3, c.width, PATCH, PATCH)
        learned = c.prefix - (c.inputs == "label_token")
        if learned:
            self.prefix = nn.Parameter(torch.empty(1, learned, c.width))
        if c.positions != "none":
            count = c.image_tokens if c.positions == "image" else c.tokens
            self.positions = nn.Parameter(torch.empty(1, count, c.width))
        if c.inputs in ("label", "label_token", "modulated"):
            self.labels = nn.Embedding(LABELS, c.width)
        fit = Block(c) if c.shared else None
        unfits = [c.unfit if index == 1 else "none" for index in range(c.depth)]
        self.blocks = nn.ModuleList(fit or Block(c, unfit) for unfit in unfits)
        if c.outputs == "skips":
            self.joined = nn.Linear(2 * c.width, c.width)
        self.norm = nn.LayerNorm(c.width)
        if "pooling" in c.head:
            self.pooling = Pooling(c.width)
        self.head = nn.Linear(c.width * (2 if c.head == "class_and_mean" else 1), CLASSES)

    def forward(self, image: Tensor, other: Tensor | None = None) -> Any:
        x, context = self.embed(image, other)
        features: list[Tensor] = []
        for index in range(self.config.depth):
            x = self.enter(index, x, features)
            x = self.through(index, x, context)
            features.append(x)
        return self.leave(x, features)

    def embed(self, image: Tensor, other: Tensor | None) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """The tokens, and what the blocks read beside them: positions, valid tokens, label."""
        c = self.config
        x = self.patches(image).flatten(2).transpose(1, 2)
        if c.batch == "implicit":
            x = x.reshape(-1, c.image_tokens, c.width)
        if c.positions == "image":
            x = x + self.positions
        label = self.labels(other) if c.inputs in ("label", "label_token", "modulated") else None
        if c.place != "late":
            x = self.with_prefix(x, label)
        if c.positions == "learned":
            x = x + self.positions
        if c.inputs == "label":
            x = x + label[:, None]
        positions = self.positions if c.positions == "queries" else None
        valid = None
        if c.inputs == "valid":
            after = c.tokens - c.image_start - c.image_tokens
            valid = F.pad(other, (c.image_start, after), value=True)
        if c.tokens_first:
            x, positions = x.transpose(0, 1), None if positions is None else positions.transpose(0, 1)
        return x, (positions, valid, label if c.inputs == "modulated" else None)

    def with_prefix(self, x: Tensor, label: Tensor | None) -> Tensor:
        """Put the prefix tokens around the image tokens (B, M, C)."""
        c, pieces = self.config, []
        batch = len(x) if c.batch == "len" else x.shape[0]
        if c.inputs == "label_token":
            pieces.append(label[:, None])
        if hasattr(self, "prefix"):
            repeated = self.prefix.repeat(batch, 1, 1) if c.batch == "implicit" else self.prefix.expand(batch, -1, -1)
            pieces += repeated.split(1, dim=1) if c.place == "split" else [repeated]
        if c.place == "end":
            return torch.cat([x, *pieces], dim=1)
        return torch.cat([*pieces[:1], x, *pieces[1:]] if c.place == "split" else [*pieces, x], dim=1)

    def enter(self, index: int, x: Tensor, features: list[Tensor]) -> Tensor:
        """What happens to the tokens between blocks."""
        c, last = self.config, index == self.config.depth - 1
        if c.place == "late" and last:
            x = x.transpose(0, 1) if c.tokens_first else x
            x = self.with_prefix(x, None)
            x = x.transpose(0, 1) if c.tokens_first else x
        if c.outputs == "skips" and last:
            x = self.joined(torch.cat([x, features[0]], dim=-1))
        if c.positions == "inside":
            x = x + (self.positions.transpose(0, 1) if c.tokens_first else self.positions)
        return x

    def through(self, index: int, x: Tensor, context: tuple[Tensor | None, ...]) -> Tensor:
        return self.blocks[index](x, *context)

    def leave(self, x: Tensor, features: list[Tensor]) -> Any:
        """What the model returns."""
        c = self.config
        x = self.norm(x.transpose(0, 1) if c.tokens_first else x)
        image = x[:, c.image_start : c.image_start + c.image_tokens]
        if c.head in ("class", "class_and_mean"):
            pooled = x[:, c.class_position]
            pooled = torch.cat([pooled, image.mean(1)], dim=-1) if c.head == "class_and_mean" else pooled
        elif c.head == "dense":
            pooled = x
        elif c.head in ("pooling", "image_pooling"):
            pooled = self.pooling(x if c.head == "pooling" else image)
        else:
            pooled = (image if c.head == "mean" else x).mean(dim=1)
        logits = self.head(pooled)
        if c.outputs == "features":
            return logits, features[:-1]
        return {"logits": logits, "more": (logits.softmax(-1), None)} if c.outputs == "dict" else logits


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0) -> None:
    """Give every parameter a value that matters, with activations of order one."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name in ("prefix", "positions") or name.endswith(("table", "latent")):
            parameter.copy_(0.5 * noise)
        elif parameter.ndim == 0:
            parameter.fill_(0.3)
        elif parameter.ndim == 1:
            parameter.copy_(0.2 * noise if name.endswith("bias") else 0.8 + 0.2 * noise)
        else:
            parameter.copy_(noise * (parameter[0].numel() if parameter.ndim != 3 else parameter.shape[1]) ** -0.5)


def build(config: Config, seed: int = 0) -> ViT:
    """The model in evaluation mode; the same seed gives the same weights."""
    model = ViT(config)
    randomise(model, seed)
    return model.eval()


def inputs(config: Config, batch: int, seed: int = 0) -> tuple[Tensor, ...]:
    """Noise over a colour of its own for each image, and the second input if the model has one."""
    generator = torch.Generator().manual_seed(seed)
    colour = torch.randn(batch, 3, 1, 1, generator=generator)
    image = colour + torch.randn(batch, 3, *(PATCH * side for side in config.grid), generator=generator)
    if config.inputs == "image":
        return (image,)
    if config.inputs == "valid":
        invalid = torch.randint(config.image_tokens, (batch, 1), generator=generator)
        return image, torch.arange(config.image_tokens) != invalid
    return image, torch.randint(LABELS, (batch,), generator=generator)
