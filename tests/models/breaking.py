"""Vision Transformers that do in their forward what a compiler stumbles over."""

import torch
from torch import nn

from tests.models.small import build


class Broken(nn.Module):
    """A ViT in which something breaks the graph after so many blocks."""

    def __init__(self, after):
        super().__init__()
        self.vit, self.after = build("vit"), after

    def forward(self, x):
        x = self.vit._pos_embed(self.vit.patch_embed(x))
        x = self.vit.blocks[: self.after](x)
        torch._dynamo.graph_break()
        return self.vit.head(self.vit.norm(self.vit.blocks[self.after :](x))[:, 0])


class Autocast(nn.Module):
    """A ViT that switches autocast by itself."""

    def __init__(self, enabled):
        super().__init__()
        self.vit, self.enabled = build("vit"), enabled

    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.enabled):
            return self.vit(x)


class HalfFrozen(nn.Module):
    """A ViT whose first blocks get no gradients."""

    def __init__(self):
        super().__init__()
        self.vit = build("vit")

    def forward(self, x):
        with torch.no_grad():
            x = self.vit.blocks[:2](self.vit._pos_embed(self.vit.patch_embed(x)))
        return self.vit.head(self.vit.norm(self.vit.blocks[2:](x))[:, 0])
