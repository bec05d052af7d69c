"""Models of Hugging Face's transformers; most lines name a class and the sizes that make it small."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from idlefx.zoo.entry import DEPTH, Entry, Inputs, Options, images


def _patches(batch: int) -> Inputs:
    return {
        "pixel_values": torch.randn(batch, 1, 1) + torch.randn(batch, 25, 3 * 64),
        "pixel_attention_mask": torch.ones(batch, 25, dtype=torch.long),
        "spatial_shapes": torch.tensor([[5, 5]] * batch),
    }


def _with_noise(batch: int) -> Inputs:
    return {"pixel_values": images(batch), "noise": torch.rand(batch, 25)}


def _film(batch: int, frames: int) -> Inputs:
    return {"pixel_values": torch.randn(batch, 1, 3, 1, 1) + torch.randn(batch, frames, 3, 40, 40)}


def _wide(batch: int) -> Tensor:
    return torch.randn(batch, 3, 1, 1) + torch.randn(batch, 3, 32, 48)


def _sounds(batch: int) -> Inputs:
    return {"input_features": torch.randn(batch, 1, 1, 1) + torch.randn(batch, 1, 64, 64)}


def _prompts(batch: int) -> Inputs:
    names = ("pixel_values", "prompt_pixel_values", "prompt_masks")
    return {name: images(batch, side=32) for name in names}


_of_64_pixels = partial(images, side=64)
POOLED = {
    "refused": "(convolves over|pools) neighbouring tokens|does not attend over the token axis|breaks up",
    "inputs": _of_64_pixels,
}
TIMES = {"attention": "eager", "inputs": partial(_film, frames=2)}
FOCAL = {"image_size": 32, "embed_dim": 16, "depths": [1, 1]}
FACE = {
    "hidden_size": 48, "num_hidden_layers": DEPTH, "num_attention_heads": 3, "intermediate_size": 96,
    "image_size": 40, "patch_size": 8,
}  # fmt: skip
DENSE = {"num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3], "neck_hidden_sizes": [16] * 4}
FACE_SWIN = {
    "image_size": 32, "patch_size": 4, "embed_dim": 24, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4,
}  # fmt: skip
SHIFTED = {**FACE_SWIN, "depths": [2, 1]}
PADDED, WIDE = {**SHIFTED, "image_size": 36}, {**SHIFTED, "image_size": [32, 48], "window_size": 3}
STAGES = {**SHIFTED, "out_indices": [1, 2]}
SUPER = {**SHIFTED, "image_size": 16, "patch_size": 1}
FACE_SAM = {"image_size": 64, "window_size": 3, "global_attn_indexes": [2], "output_channels": 16, "mlp_dim": 96}
FACE_SAM_3 = {"image_size": 64, "window_size": 4, "global_attn_indexes": [1], "pretrain_image_size": 32}
FACE_SAM_2 = {
    "image_size": [64, 64], "hidden_size": 16, "num_attention_heads": 1, "blocks_per_stage": [1, 2, 3, 2],
    "embed_dim_per_stage": [16, 32, 64, 128], "num_attention_heads_per_stage": [1, 2, 4, 8],
    "window_size_per_stage": [4, 2, 2, 2], "global_attention_blocks": [4],
    "window_positional_embedding_background_size": [4, 4],
}  # fmt: skip
VIT_DET = {"image_size": 64, "pretrain_image_size": 64, "window_block_indices": [0], "window_size": 3}
BIASED = {**VIT_DET, "window_size": 4, "use_relative_position_embeddings": True, "out_indices": [1, 3]}
LW_DETR = {
    "image_size": 64,
    "pretrain_image_size": 64,
    "num_windows": 4,
    "window_block_indices": [0, 2],
    "out_indices": [1, 3],
}
RF_DETR = {"image_size": 64, "num_windows": 2}  # those blocks attend over all windows that `out_indices` names
FACE_HIERA = {
    "image_size": [64, 64], "embed_dim": 16, "depths": [2, 2, 2, 1], "num_heads": [1, 2, 2, 2],
    "embed_dim_multiplier": 2.0,
}  # fmt: skip
CLAP = {
    "patch_size": 4, "patch_stride": [4, 4], "spec_size": 64, "num_mel_bins": 64, "window_size": 4, "hidden_size": 48,
    "patch_embeds_hidden_size": 24, "depths": [2, 1], "num_attention_heads": [2, 2], "num_hidden_layers": 2,
}  # fmt: skip
PYRAMID = {
    "image_size": 64, "depths": [1, 1, 1, 2], "hidden_sizes": [16, 32, 32, 64], "num_attention_heads": [1, 2, 2, 2],
}  # fmt: skip
MOBILE = {
    "image_size": 128, "hidden_sizes": [24, 32, 48], "neck_hidden_sizes": [8, 8, 16, 16, 24, 24, 64],
    "num_attention_heads": 2,
}  # fmt: skip
CVT = {"embed_dim": [16, 32, 48], "num_heads": [1, 2, 2], "depth": [1, 2, 3], "mlp_ratio": [2.0, 2.0, 2.0]}
FLORENCE = {
    "embed_dim": [16, 32, 32, 32], "num_heads": [2, 2, 2, 2], "num_groups": [2, 2, 2, 2], "depths": [1, 1, 1, 1],
    "window_size": 4,
}  # fmt: skip
SEG_GPT = {
    "image_size": [64, 32], "intermediate_hidden_state_indices": [1, 2], "merge_index": 0, "mlp_dim": 96,
    "pretrain_image_size": 32, "decoder_hidden_size": 16,
}  # fmt: skip
HUGGING_FACE: tuple[tuple[str, str, Options, dict[str, Any]], ...] = (  # label, class, options, how the entry differs
    ("ViT", "ViTModel", {}, {}),
    ("ViT classifier", "ViTForImageClassification", {}, {}),
    ("DeiT", "DeiTModel", {}, {}),
    ("DeiT with teacher", "DeiTForImageClassificationWithTeacher", {}, {}),
    ("BEiT", "BeitModel", {"use_relative_position_bias": True}, {}),
    ("BEiT, shared bias", "BeitForImageClassification", {"use_shared_relative_position_bias": True}, {}),
    ("Data2Vec vision", "Data2VecVisionModel", {"use_relative_position_bias": True}, {}),
    ("DINOv2", "Dinov2Model", {}, {}),
    ("DINOv2, SwiGLU", "Dinov2ForImageClassification", {"use_swiglu_ffn": True}, {}),
    ("DINOv2 backbone", "Dinov2Backbone", {"out_indices": [1, 3]}, {}),
    ("DINOv2 with registers", "Dinov2WithRegistersModel", {}, {}),
    ("DINOv3 ViT", "DINOv3ViTModel", {"num_register_tokens": 4}, {}),
    ("DINOv3 ViT, gated", "DINOv3ViTModel", {"num_register_tokens": 4, "use_gated_mlp": True}, {}),
    ("CLIP vision", "CLIPVisionModel", {}, {}),
    ("CLIP vision, projected", "CLIPVisionModelWithProjection", {}, {}),
    ("MetaCLIP 2 vision", "MetaClip2VisionModel", {}, {}),
    ("SigLIP vision", "SiglipVisionModel", {}, {}),
    ("SigLIP2 vision", "Siglip2VisionModel", {"num_patches": 25}, {"inputs": _patches}),
    ("I-JEPA", "IJepaModel", {}, {}),
    ("ViT-MAE encoder", "ViTMAEModel", {"mask_ratio": 0.0}, {"inputs": _with_noise}),
    ("ViT-MSN", "ViTMSNModel", {}, {}),
    ("AIMv2", "Aimv2VisionModel", {}, {}),
    ("TIPSv2", "Tipsv2VisionModel", {}, {}),
    ("Sapiens2", "Sapiens2Model", {}, {}),
    ("InternVL vision", "InternVLVisionModel", {"image_size": [40, 40], "patch_size": [8, 8]}, {}),
    ("OwlViT vision", "OwlViTVisionModel", {}, {}),
    ("BLIP vision", "BlipVisionModel", {}, {"attention": "eager"}),
    ("FLAVA image", "FlavaImageModel", {}, {"attention": "eager"}),
    ("ViViT", "VivitModel", {"num_frames": 2, "tubelet_size": [2, 8, 8]}, {"inputs": partial(_film, frames=2)}),
    ("VideoMAE", "VideoMAEModel", {"num_frames": 4}, {"inputs": partial(_film, frames=4)}),
    ("DPT backbone", "DPTModel", {"backbone_out_indices": [0, 1, 2, 2]}, {}),
    ("DPT depth", "DPTForDepthEstimation", {**DENSE, "fusion_hidden_size": 16}, {"blocks": 4}),
    ("YOLOS detector", "YolosForObjectDetection", {"image_size": [40, 40], "num_detection_tokens": 5}, {}),
    ("ViTDet backbone", "VitDetModel", VIT_DET, {"attention": "eager"}),
    ("ViTDet, relative position", "VitDetBackbone", BIASED, {"attention": "eager"}),
    ("LW-DETR ViT", "LwDetrViTBackbone", LW_DETR, {}),
    ("RF-DETR ViT", "RfDetrDinov2Backbone", {**RF_DETR, "out_indices": [1, 3]}, {}),
    ("RF-DETR ViT, SwiGLU", "RfDetrDinov2Backbone", {**RF_DETR, "out_indices": [1, 2, 3], "use_swiglu_ffn": True}, {}),
    ("SAM vision", "SamVisionModel", FACE_SAM, {}),
    ("SAM-HQ vision", "SamHQVisionModel", FACE_SAM, {}),
    (
        "SAM 2 Hiera",
        "Sam2HieraDetModel",
        FACE_SAM_2,
        {"blocks": 8, "refused": "pools", "inputs": _of_64_pixels},
    ),
    ("SAM 3 ViT", "Sam3ViTModel", FACE_SAM_3, {}),
    ("SAM 3 ViT, padded", "Sam3ViTModel", {**FACE_SAM_3, "window_size": 3}, {"attention": "sdpa"}),
    ("Hiera", "HieraModel", FACE_HIERA, {"attention": "eager", "blocks": 7, "refused": "max.dim takes a statistic"}),
    ("Swin", "SwinModel", FACE_SWIN, {"blocks": 2}),
    ("Swin, padded", "SwinModel", PADDED, {"attention": "eager"}),
    ("Swin backbone", "SwinBackbone", STAGES, {}),
    ("Swin v2", "Swinv2Model", FACE_SWIN, {"blocks": 2, "attention": "eager"}),
    ("Swin v2 backbone", "Swinv2Backbone", STAGES, {"attention": "eager"}),
    ("Donut Swin", "DonutSwinModel", FACE_SWIN, {"blocks": 2, "attention": "eager"}),
    ("Donut Swin, not square", "DonutSwinModel", WIDE, {"attention": "eager", "inputs": _wide}),
    ("MaskFormer Swin", "MaskFormerSwinBackbone", STAGES, {"attention": "eager"}),
    ("Swin2SR", "Swin2SRForImageSuperResolution", SUPER, {"attention": "eager"}),
    ("CLAP audio", "ClapAudioModel", CLAP, {"attention": "eager", "inputs": _sounds}),
    ("SegGPT", "SegGptModel", SEG_GPT, {"attention": "eager", "inputs": _prompts}),
    ("TimeSformer, joint", "TimesformerModel", {"num_frames": 2, "attention_type": "joint_space_time"}, TIMES),
    ("TimeSformer", "TimesformerModel", {"num_frames": 2}, {**TIMES, "refused": "breaks up the token axis"}),
    ("MobileViT", "MobileViTModel", MOBILE, {"attention": "eager", "blocks": 9, "inputs": partial(images, side=128)}),
    ("PVT", "PvtModel", PYRAMID, {"attention": "eager", **POOLED, "blocks": 5}),
    ("PVT v2", "PvtV2Model", PYRAMID, {"attention": "eager", **POOLED, "blocks": 5}),
    ("SegFormer", "SegformerModel", PYRAMID, {"attention": "eager", **POOLED, "blocks": 5}),
    ("CvT", "CvtModel", CVT, {"attention": "eager", **POOLED, "blocks": 6}),
    ("Florence-2 vision", "Florence2VisionBackbone", FLORENCE, {"attention": "sdpa", **POOLED, "blocks": 8}),
    ("FocalNet", "FocalNetModel", FOCAL, {"attention": "eager", "refused": "no attention", "blocks": 0}),
)


def hugging_face(name: str, options: Options, attention: str) -> nn.Module:
    """A Hugging Face model of that class."""
    import transformers

    kind = getattr(transformers, name, None)
    if kind is None:
        raise ImportError(f"this version of transformers has no {name}")
    own = {"embed_dim", "hidden_sizes", "patch_stride", "embed_dim_per_stage"} & set(options)  # sizes of each stage
    sizes = options if own else {**FACE, **options}
    model: nn.Module = kind(kind.config_class(**sizes, attn_implementation=attention))
    return model


def hugging_face_entries() -> Iterator[Entry]:
    """The rows, one for each way of attention."""
    for label, name, options, given in HUGGING_FACE:
        own = dict(given)
        for attention in own.pop("attention", "sdpa eager").split():
            build = partial(hugging_face, name, options, attention)
            yield Entry(f"{label}, {attention}", f"transformers {name}", build, **own)
