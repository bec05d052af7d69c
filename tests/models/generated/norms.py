"""Norms of the generated models, of tokens (…, C)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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
