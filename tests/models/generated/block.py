"""A block of the generated models: where its norms, branches and residual connections stand."""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models.generated.attention import Attention
from tests.models.generated.config import Config
from tests.models.generated.habits import leave_attention
from tests.models.generated.mlp import Mlp
from tests.models.generated.norms import NORMS
from tests.models.generated.unfit import Overlapping, ReducedKeys


class Block(nn.Module):
    """Attention and MLP with their norms and residual connections; takes and returns tokens (B, N, C) or (N, B, C)."""

    def __init__(self, config: Config, unfit: str = "none") -> None:
        super().__init__()
        self.config, c = config, config
        cores = 2 if c.block in ("branches", "two_cores", "nested") else 1
        kind = {"reduced_keys": ReducedKeys, "overlapping": Overlapping}.get(unfit, Attention)
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
        if c.wrapper == "forward_hook":
            self.attentions[0].register_forward_hook(lambda module, given, out: 0.8 * out)

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
        with torch.autocast("cpu", enabled=False) if self.config.region == "autocast_attention" else nullcontext():
            out = self.attentions[0](x, positions, valid)
        if self.config.block == "two_cores":
            out = self.join(torch.cat([out, self.attentions[1](x, positions, valid)], dim=-1))
        if self.config.block == "nested":
            out = self.attentions[1](out, positions, valid)
        if self.config.injected:
            out = out + self.inject(origin)
        out = leave_attention(self.config, out)
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
