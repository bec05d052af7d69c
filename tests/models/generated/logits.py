"""Scale, bias, mask, talking heads and softmax of the generated models, in all their spellings.

Shapes: B images, N tokens, prefix included, C width, H heads, D head width.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models.generated.config import Config
from tests.models.generated.positions import angles, coordinates, relative_index


class Logits(nn.Module):
    """The part of attention between the products of queries with keys and the weights of values."""

    config: Config
    heads: int
    head_width: int
    scale: float
    dropout: float

    def add_mixing(self) -> None:
        c = self.config
        talks = c.talking != "none"
        for name in ("before", "after"):
            self.register_parameter(name, nn.Parameter(torch.empty(self.heads, self.heads)) if talks else None)
        if c.scale == "learned":
            self.temperature = nn.Parameter(torch.empty(()))
        if c.scale == "learned_per_head":
            self.temperature = nn.Parameter(torch.empty(self.heads, 1, 1))

    def add_tables(self) -> None:
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
