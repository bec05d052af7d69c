"""What a model does beside computing its output: gradients of its own, statistics it keeps, regions in other modes.

Shapes: B images, M image tokens, N tokens, C width.
"""

from typing import Any

import torch
from torch import Tensor, nn

from tests.models.generated.config import Config


class Reverse(torch.autograd.Function):
    """The gradient with its sign changed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return -gradient


class Habits(nn.Module):
    """What happens to the patches before they become tokens, and to what the head reads."""

    config: Config
    norm: nn.Module
    head: nn.Module
    mean: Tensor

    def add_habits(self) -> None:
        c = self.config
        if c.buffer != "none":
            self.register_buffer("mean", torch.zeros(c.width))
        if c.statistics:
            self.statistics = nn.BatchNorm1d(c.width)
        if c.modes == "sampling":
            self.sampling = nn.Dropout(0.3)
        if c.gradient == "module_hook":
            self.norm.register_full_backward_hook(lambda module, before, after: (0.5 * before[0],))

    def enter_patches(self, x: Tensor) -> Tensor:
        """Patches (B, M, C), shifted by what was measured on them."""
        c = self.config
        if c.statistics:
            x = self.statistics(x.flatten(0, 1)).view_as(x)
        if c.buffer == "in_place":
            self.mean.mul_(0.9).add_(x.detach().mean((0, 1)), alpha=0.1)
        elif c.buffer == "reassigned":
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean((0, 1))
        elif c.buffer == "copied":
            with torch.no_grad():
                self.mean.copy_(0.9 * self.mean + 0.1 * x.mean((0, 1)))
        if c.buffer != "none":
            x = x - self.mean
        if c.region == "no_grad":
            with torch.no_grad():
                level = x.mean((1, 2), keepdim=True)
            x = x - level
        elif c.region == "no_grad_write":
            with torch.no_grad():
                x.mul_(1.2)
        return x

    def read(self, pooled: Tensor) -> Tensor:
        """The logits of what the head reads, (…, C)."""
        c = self.config
        if c.gradient == "reversed":
            pooled = Reverse.apply(pooled)
        elif c.gradient == "hooked" and pooled.requires_grad:
            pooled.register_hook(lambda gradient: 0.5 * gradient)
        if c.modes == "sampling":
            pooled = self.sampling(pooled)
        if c.region == "autocast":
            with torch.autocast("cpu", enabled=False):
                return self.head(pooled.float())
        return self.head(pooled)


def leave_attention(config: Config, out: Tensor) -> Tensor:
    """What attention gave (…, C), each token by itself."""
    if config.gradient == "reversed_in_blocks":
        return Reverse.apply(out)
    if config.region == "no_grad_in_blocks":
        with torch.no_grad():
            gate = torch.sigmoid(out.mean(-1, keepdim=True))
        return out * gate
    return out


def set_modes(model: nn.Module, modes: str) -> None:
    """Put a model, or some of its parts, into other modes than evaluation."""
    model.train(modes not in ("eval", "sampling"))
    if modes == "frozen_blocks":
        model.blocks.eval()
    elif modes == "frozen_statistics":
        model.statistics.eval()
    elif modes == "sampling":
        model.sampling.train()


def wrap(model: nn.Module, wrapper: str) -> nn.Module:
    """The model as somebody may hold it."""
    if wrapper == "compiled_block":
        model.blocks[0] = torch.compile(model.blocks[0])
    if wrapper in ("parallel", "both"):
        model = nn.DataParallel(model)
    return torch.compile(model) if wrapper in ("compiled", "both") else model
