"""Three models for dense prediction, small and with random weights: what a converted encoder is put into.

Each has an encoder of another kind: SAM's, whose windows are padded and whose other blocks attend over the whole grid;
Swin, a pyramid whose windows are shifted; and ViTDet's, in front of a detector of another library.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign, box_iou
from transformers import (
    Mask2FormerConfig,
    Mask2FormerModel,
    SamConfig,
    SamModel,
    SwinConfig,
    VitDetBackbone,
    VitDetConfig,
)

from idlefx.zoo.entry import randomise

SIDE = 128  # pixels
VIT = {"image_size": SIDE, "patch_size": 8, "window_size": 3, "hidden_size": 48, "num_hidden_layers": 6}
HEAD = 32  # features that the heads work on


@dataclass(frozen=True)
class Subject:
    """A dense model, and how it is used.

    Attributes:
        name: What the table calls it.
        model: The whole of it.
        path: Where its encoder is.
        layers: The blocks that open a stage.
        call: What it returns for images (B, 3, SIDE, SIDE), as tensors by name.
        same: The share of two such answers that agrees, from 0 to 1.
    """

    name: str
    model: nn.Module
    path: str
    layers: list[int]
    call: Callable[[nn.Module, Tensor], Any]
    same: Callable[[Any, Any], float]

    @property
    def encoder(self) -> nn.Module:
        """The part that is converted."""
        return self.model.get_submodule(self.path)


def sam() -> Subject:
    """SAM, asked for the mask at the middle of the image."""
    config = SamConfig(
        vision_config=VIT
        | {"num_attention_heads": 3, "mlp_dim": 96, "global_attn_indexes": [2, 5]}
        | {"output_channels": HEAD, "num_pos_feats": HEAD // 2},
        prompt_encoder_config={"hidden_size": HEAD, "image_size": SIDE, "patch_size": 8, "mask_input_channels": 4},
        mask_decoder_config={"hidden_size": HEAD, "mlp_dim": 64, "num_attention_heads": 4, "iou_head_hidden_dim": 32},
    )

    def call(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
        middle = torch.full((len(images), 1, 1, 2), SIDE / 2)
        answer = model(pixel_values=images, input_points=middle)
        return {"masks": answer.pred_masks, "quality": answer.iou_scores}

    def same(dense: dict[str, Tensor], idle: dict[str, Tensor]) -> float:
        inside = [answer["masks"] > 0 for answer in (dense, idle)]
        return ((inside[0] & inside[1]).sum() / (inside[0] | inside[1]).sum()).item()

    model = seeded(lambda: randomise(SamModel(config)))
    return Subject("SAM, mask decoder", model, "vision_encoder", [1, 3], call, same)


def mask2former() -> Subject:
    """Mask2Former on the feature maps of four stages of Swin."""
    stages = [f"stage{number}" for number in (1, 2, 3, 4)]
    swin = SwinConfig(
        image_size=SIDE, embed_dim=24, depths=[2] * 4, num_heads=[2, 2, 4, 4], window_size=4, out_features=stages
    )
    config = Mask2FormerConfig(
        backbone_config=swin, num_queries=10, num_attention_heads=4, encoder_layers=2, decoder_layers=2,
        feature_size=HEAD, mask_feature_size=HEAD, hidden_dim=HEAD, encoder_feedforward_dim=64, dim_feedforward=64,
    )  # fmt: skip

    def call(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
        answer = model(pixel_values=images)
        return {"masks": answer.masks_queries_logits[-1], "queries": answer.transformer_decoder_last_hidden_state}

    def same(dense: dict[str, Tensor], idle: dict[str, Tensor]) -> float:
        return (dense["masks"].argmax(1) == idle["masks"].argmax(1)).float().mean().item()

    model = seeded(lambda: randomise(Mask2FormerModel(config)))
    return Subject("Mask2Former on Swin", model, "pixel_level_module.encoder", [2, 4, 6], call, same)


class Pyramid(nn.Module):
    """Maps of three resolutions made of the one that a plain ViT gives, as in ViTDet.

    Source: Exploring Plain Vision Transformer Backbones for Object Detection, arXiv:2203.16527.
    """

    out_channels = HEAD

    def __init__(self, vit: nn.Module, width: int) -> None:
        super().__init__()
        self.vit = vit
        self.fine = nn.ConvTranspose2d(width, HEAD, 2, 2)
        self.middle = nn.Conv2d(width, HEAD, 1)
        self.coarse = nn.Conv2d(width, HEAD, 2, 2)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """By name, maps (B, HEAD, H, W) of a quarter, an eighth and a sixteenth of the sides of images."""
        (features,) = self.vit(images).feature_maps
        return {name: getattr(self, name)(features) for name in ("fine", "middle", "coarse")}


def faster_rcnn() -> Subject:
    """torchvision's Faster R-CNN on ViTDet's encoder."""
    config = VitDetConfig(
        **VIT, pretrain_image_size=SIDE, num_attention_heads=3, mlp_ratio=2, window_block_indices=[0, 1, 3, 4],
        use_relative_position_embeddings=True, out_features=["stage6"],
    )  # fmt: skip

    def build() -> nn.Module:  # its heads keep their own initial weights: wilder ones scatter the boxes
        anchors = AnchorGenerator(((16,), (32,), (64,)), ((0.5, 1.0, 2.0),) * 3)
        pool = MultiScaleRoIAlign(["fine", "middle", "coarse"], 7, 2)
        return FasterRCNN(
            Pyramid(randomise(VitDetBackbone(config)), VIT["hidden_size"]), num_classes=25,
            min_size=SIDE, max_size=SIDE, image_mean=[0.0] * 3, image_std=[1.0] * 3,
            rpn_anchor_generator=anchors, box_roi_pool=pool, box_score_thresh=0.0, box_detections_per_img=20,
        )  # fmt: skip

    def call(model: nn.Module, images: Tensor) -> list[dict[str, Tensor]]:
        return model(list(images))

    def same(dense: list[dict[str, Tensor]], idle: list[dict[str, Tensor]]) -> float:
        overlaps = [box_iou(a["boxes"], b["boxes"]).amax(1) for a, b in zip(dense, idle, strict=True)]
        return (torch.cat(overlaps) > 0.5).float().mean().item()

    return Subject("Faster R-CNN on ViTDet", seeded(build), "backbone.vit", [1, 3], call, same)


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    """A model with the same random weights each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build().eval()


SUBJECTS = (sam, mask2former, faster_rcnn)
