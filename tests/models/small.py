"""Small timm models with random weights, one per family, and what a test has to know of each."""

from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import timm
import torch
from timm.models.vision_transformer import ParallelScalingBlock
from torch import nn

DEPTH = 4
SMALL = {"img_size": 48, "patch_size": 8, "embed_dim": 48, "num_heads": 3, "depth": DEPTH, "num_classes": 10}
SQUARE = {"img_size": 64, "patch_size": 8, "embed_dim": 64, "num_heads": 1}
DROPOUTS = {
    "proj_drop_rate": 0.2,
    "attn_drop_rate": 0.2,
    "drop_path_rate": 0.3,
    "drop_rate": 0.1,
    "pos_drop_rate": 0.1,
}
TOKENS = ("cls_token", "dist_token", "reg_token", "pos_embed", "latent")


class Spec(NamedTuple):
    """A timm name and overrides, the number of leading prefix tokens, the position of the class token."""

    timm_name: str
    prefix: int
    class_position: int | None
    overrides: Mapping[str, Any] = MappingProxyType({})
    fused: bool = True


MODELS = {
    "vit": Spec("vit_tiny_patch16_224", 1, 0),
    "deit": Spec("deit_tiny_patch16_224", 1, 0),
    "distilled": Spec("deit_tiny_distilled_patch16_224", 2, 0),
    "layer_scale": Spec("deit3_small_patch16_224", 1, 0),
    "registers": Spec("vit_small_patch14_reg4_dinov2", 5, 0),
    "registers_gap": Spec("vit_little_patch16_reg4_gap_256", 4, None),
    "registers_map": Spec("vit_so150m_patch16_reg4_map_256", 4, None),
    "gap": Spec("vit_medium_patch16_gap_256", 0, None),
    "siglip": Spec("vit_base_patch32_siglip_256", 0, None),
    "qk_norm": Spec("vit_tiny_patch16_224", 1, 0, {"qk_norm": True}),
    "qk_norm_gap": Spec("vit_medium_patch16_gap_256", 0, None, {"qk_norm": True}),
    "parallel_things": Spec("vit_small_patch16_18x2_224", 1, 0),
    "parallel_scaling": Spec("vit_pwee_patch16_reg1_gap_256", 1, 0),
    "parallel_fused": Spec(
        "vit_tiny_patch16_224", 1, 0, {"block_fn": partial(ParallelScalingBlock, fuse_out_proj=True)}
    ),
    "clip": Spec("vit_base_patch32_clip_quickgelu_224", 1, 0),
    "average_pool": Spec("vit_tiny_patch16_224", 1, 0, {"global_pool": "avg"}),
    "hand_written": Spec("vit_tiny_patch16_224", 1, 0, fused=False),
    "hand_written_gap": Spec("vit_medium_patch16_gap_256", 0, None, {"qk_norm": True}, fused=False),
    "collision": Spec("vit_medium_patch16_gap_256", 0, None, SQUARE),
    "collision_class": Spec("vit_tiny_patch16_224", 1, 0, SQUARE),
}


class Mixing(nn.Module):
    """A block whose queries, keys and values see the neighbouring tokens: it cannot idle."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mix = nn.Conv1d(width, width, 3, padding=1)
        self.attn = timm.layers.Attention(width, num_heads=3, qkv_bias=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mixed = self.mix(self.norm(x).transpose(1, 2)).transpose(1, 2)
        return x + self.attn(mixed)


class Wrapper(nn.Module):
    """A model inside a model, with inputs and outputs of its own."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, picture: torch.Tensor, gain: torch.Tensor) -> dict[str, object]:
        logits = self.net(picture * gain)
        return {"logits": logits, "pair": (logits.argmax(-1), gain)}


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0) -> None:
    """Gives every parameter a value that matters, with activations of order one."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith(TOKENS):
            parameter.copy_(0.5 * noise)
        elif name.endswith("gamma"):
            parameter.copy_(0.6 + 0.2 * noise)
        elif name.endswith("bias"):
            parameter.copy_(0.2 * noise)
        elif parameter.ndim == 1:
            parameter.copy_(1 + 0.2 * noise)
        else:
            parameter.copy_(noise * parameter[0].numel() ** -0.5)


def build(name: str, seed: int = 0, **overrides: Any) -> nn.Module:
    """The model of that name in evaluation mode; the same seed gives the same weights."""
    spec = MODELS[name]
    fused = timm.layers.use_fused_attn()
    timm.layers.set_fused_attn(spec.fused)
    try:
        model = timm.create_model(spec.timm_name, **(SMALL | spec.overrides | overrides))
    finally:
        timm.layers.set_fused_attn(fused)
    randomise(model, seed)
    return model.eval()


def build_mixing() -> nn.Module:
    """A plain ViT whose block 1 cannot idle."""
    model = build("vit")
    model.blocks[1] = Mixing(SMALL["embed_dim"])
    randomise(model)
    return model.eval()


def image_tokens(model: nn.Module) -> int:
    return model.patch_embed.num_patches


def images(model: nn.Module, batch: int, seed: int = 0) -> torch.Tensor:
    """Noise over a colour of its own for each image, so that images and their tokens are told apart."""
    generator = torch.Generator().manual_seed(seed)
    colour = torch.randn(batch, 3, 1, 1, generator=generator)
    return colour + torch.randn(batch, 3, *model.patch_embed.img_size, generator=generator)


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """Everything of a model that a conversion could disturb, in a form that `==` compares."""
    values = model.state_dict(keep_vars=True)
    state = {name: (id(value), value.flatten().tolist()) for name, value in values.items()}
    modes = {name: module.training for name, module in model.named_modules()}
    kinds = {name: (type(module), sorted(vars(module))) for name, module in model.named_modules()}
    hooks = {
        name: [len(value) for key, value in sorted(vars(module).items()) if key.endswith("_hooks")]
        for name, module in model.named_modules()
    }
    trainable = {name: (value.requires_grad, value.grad is None) for name, value in model.named_parameters()}
    return {"state": state, "modes": modes, "kinds": kinds, "hooks": hooks, "trainable": trainable}
