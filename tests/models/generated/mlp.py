"""The MLP of the generated models in all its spellings, of tokens (B, N, C)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models.generated.config import Config


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
        if unfit == "written_buffer":
            self.register_buffer("seen", torch.zeros(config.hidden))

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
        if self.unfit == "written_buffer":
            self.seen.mul_(0.9).add_(x.detach().mean((0, 1)), alpha=0.1)
            return x - self.seen
        if self.unfit == "autocast":
            with torch.autocast("cpu", enabled=False):
                return F.gelu(x.float())
        if self.unfit == "depthwise":
            front, image, end = x.split([c.image_start, c.image_tokens, c.tokens - c.image_start - c.image_tokens], 1)
            grid = image.transpose(1, 2).reshape(len(x), c.hidden, *c.grid)
            return torch.cat([front, self.mix(grid).flatten(2).transpose(1, 2), end], dim=1)
        return x
