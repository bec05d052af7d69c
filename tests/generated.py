"""Private Vision Transformers nobody has seen: one tiny model, whose parts are spelled as a `Config` says.

Shapes: B images, P prefix and M image tokens, N = P + M, C width.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from generated_attention import NORMS, Attention, ReducedKeys, Windows
from generated_config import Config
from torch import Tensor, nn

PATCH, CLASSES, LABELS = 4, 7, 5


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
        if self.config.mlp == "pointwise_convolution":
            x = F.conv1d(x.transpose(1, 2), self.first.weight[..., None], self.first.bias)
            x = self.mixed(F.gelu(x).transpose(1, 2)).transpose(1, 2)
            return F.conv1d(x, self.second.weight[..., None], self.second.bias).transpose(1, 2)
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
        if self.unfit == "token_shift":
            return x + x.roll(1, dims=1)
        if self.unfit == "token_sum":
            return x.cumsum(dim=1) / c.tokens
        if self.unfit == "squeeze":
            return x * torch.sigmoid(x.amax(dim=1, keepdim=True))
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
        cores = 2 if c.block in ("branches", "two_cores", "nested") else 1
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
        if c.injected:
            self.inject = nn.Linear(c.width, c.width)

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

    def attended(
        self, x: Tensor, positions: Tensor | None, valid: Tensor | None, label: Tensor | None, origin: Tensor | None
    ) -> Tensor:
        """The attention branch of normalised tokens; a label (B, C) shifts, scales and gates it."""
        if label is not None:
            label = label[None] if self.config.tokens_first else label[:, None]
            shift, scale, gate = self.modulation(F.silu(label)).chunk(3, dim=-1)
            x = x * (1 + scale) + shift
        out = self.attentions[0](x, positions, valid)
        if self.config.block == "two_cores":
            out = self.join(torch.cat([out, self.attentions[1](x, positions, valid)], dim=-1))
        if self.config.block == "nested":
            out = self.attentions[1](out, positions, valid)
        if self.config.injected:
            out = out + self.inject(origin)
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
        self.key_value = nn.Linear(width, 2 * width)
        self.out, self.mlp = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        k, v = self.key_value(x).chunk(2, dim=-1)
        pooled = self.out(F.scaled_dot_product_attention(self.latent.expand(x.shape[0], -1, -1), k, v))
        return (pooled + self.mlp(pooled))[:, 0]


@dataclass
class Output:
    logits: Tensor
    probabilities: Tensor


torch.export.register_dataclass(Output, serialized_type_name="generated.Output")


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
        if c.around != "none":
            self.stem, self.neck = nn.Linear(c.width, c.width), nn.Linear(c.width, c.width)
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
        """The tokens, and what the blocks read beside them: positions, valid tokens, label, the tokens themselves."""
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
        x = x + self.stem(x) if c.around in ("stem", "both") else x
        return x, (positions, valid, label if c.inputs == "modulated" else None, x if c.injected else None)

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
        x = x + self.neck(x) if c.around in ("neck", "both") else x
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
        if c.outputs == "dataclass":
            return Output(logits, logits.softmax(-1))
        if c.outputs == "features":
            return logits, features[:-1]
        return {"logits": logits, "more": (logits.softmax(-1), None)} if c.outputs == "dict" else logits


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0, gain: float = 1.0) -> None:
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
            fan_in = parameter.shape[1] if parameter.ndim == 3 else parameter[0].numel()
            parameter.copy_(gain * noise * fan_in**-0.5)


def build(config: Config, seed: int = 0) -> ViT:
    """The model in evaluation mode; the same seed gives the same weights."""
    model = ViT(config)
    randomise(model, seed, 0.6 if config.norm in ("affine", "none") else 1.0)
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
