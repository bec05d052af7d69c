"""Private Vision Transformers nobody has seen: one tiny model, whose parts are spelled as a `Config` says.

Shapes: B images, P prefix and M image tokens, N = P + M, C width.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models.generated.block import Block
from tests.models.generated.config import Config
from tests.models.generated.habits import Habits

PATCH, CLASSES, LABELS = 4, 7, 5


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


class ViT(Habits):
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
        self.add_habits()

    def forward(self, image: Tensor, other: Tensor | None = None, gain: float = 1.0, flipped: bool = False) -> Any:
        x, context = self.embed(image.flip(-1) if flipped else gain * image, other)
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
        x = self.enter_patches(x)
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
        logits = self.read(pooled)
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


def inputs(config: Config, batch: int, seed: int = 0) -> tuple[Any, ...]:
    """Noise over a colour of its own for each image, the second input if the model has one, and flags."""
    generator = torch.Generator().manual_seed(seed)
    colour = torch.randn(batch, 3, 1, 1, generator=generator)
    image = colour + torch.randn(batch, 3, *(PATCH * side for side in config.grid), generator=generator)
    given: tuple[Any, ...] = (image,)
    if config.inputs == "valid":
        invalid = torch.randint(config.image_tokens, (batch, 1), generator=generator)
        given = image, torch.arange(config.image_tokens) != invalid
    elif config.inputs != "image":
        given = image, torch.randint(LABELS, (batch,), generator=generator)
    flags = {"none": (), "number": (2.0,), "switch": (1.0, True)}[config.flag]
    return (*given, None, *flags) if flags and len(given) == 1 else (*given, *flags)
