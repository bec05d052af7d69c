"""The models of the compatibility table: every way a library builds a Vision Transformer, small and random.

One long table on purpose: most lines name a model and the sizes that make it small.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

DEPTH = 3
Inputs = Tensor | dict[str, Tensor]
Options = Mapping[str, Any]


@dataclass(frozen=True)
class Entry:
    """A model of the table.

    Attributes:
        label: What the table calls it.
        family: The library, and the file or class in it.
        build: Makes it, untrained.
        blocks: How many blocks it has; None where that is not the point.
        refused: What the reasons of those that cannot idle say, a regular expression; empty where all can.
        inputs: Makes a batch, a tensor or keyword inputs; guessed from the model if None.
    """

    label: str
    family: str
    build: Callable[[], nn.Module]
    blocks: int | None = DEPTH
    refused: str = ""
    inputs: Callable[[int], Inputs] | None = None

    def make(self) -> nn.Module:
        """The model with random parameters, in evaluation mode."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = self.build()
        return randomise(model).eval()


def images(batch: int, side: int = 40) -> Tensor:
    """Noise over a colour of its own for each image, so that images and their tokens are told apart."""
    return torch.randn(batch, 3, 1, 1) + torch.randn(batch, 3, side, side)


@torch.no_grad()
def randomise(model: nn.Module) -> nn.Module:
    """Give every parameter a value that matters, with activations of order one."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 2 and parameter.shape[0] == 1:  # class tokens, registers, position embeddings
            parameter.copy_(0.5 * noise)
        elif parameter.ndim > 1:
            gain = 2 if parameter.ndim == 4 else 1  # convolutions stand before rectifiers
            parameter.copy_(noise * (gain / parameter[0].numel()) ** 0.5)
        elif parameter.numel() > 1 and not parameter.any():
            parameter.copy_(0.2 * noise)
        elif parameter.numel() > 1:
            parameter.copy_(0.8 + 0.2 * noise)
    return model


WIDTH = {"embed_dim": 48, "depth": DEPTH, "num_heads": 3, "num_classes": 7}
SMALL = {**WIDTH, "img_size": 40, "patch_size": 8}
SAM = {**SMALL, "depth": 4, "img_size": 64, "window_size": 3, "global_attn_indexes": (1, 3)}
SWIN = {"img_size": 32, "patch_size": 4, "embed_dim": 24, "depths": (2, 1), "num_heads": (2, 2), "window_size": 4}

TIMM: tuple[tuple[str, Options, str], ...] = (
    (
        "vision_transformer",
        SMALL,
        "vit_tiny_patch16_224 vit_base_patch16_224_miil aimv2_1b_patch14_224 beit3_base_patch16_224 "
        "eva_large_patch14_196 flexivit_small test_vit test_vit2 test_vit3 test_vit4 vit_base_patch14_dinov2 "
        "vit_base_patch14_reg1_tipsv2 vit_small_patch14_reg4_dinov2 vit_small_patch16_18x2_224 "
        "vit_base_patch32_clip_224 vit_base_patch32_clip_quickgelu_224 vit_base_patch16_gap_224 "
        "vit_base_patch16_radio_v3 vit_little_patch16_reg4_gap_256 vit_base_patch16_rpn_224 "
        "vit_base_patch16_siglip_224 vit_base_patch16_xp_224 vit_base_patch32_siglip_256 "
        "vit_base_patch32_siglip_gap_256 vit_medium_patch16_gap_256 vit_wee_patch16_reg1_gap_256 "
        "vit_dwee_patch16_reg1_gap_256 vit_dpwee_patch16_reg1_gap_256 vit_giant_patch14_dinov2 "
        "vit_giant_patch14_reg1_tipsv2 vit_giant_patch14_reg4_dinov2 vit_so400m_patch16_radio_v4 "
        "vit_intern300m_patch14_448 vit_pwee_patch16_reg1_gap_256 vit_so150m2_patch16_reg1_gap_256 "
        "vit_so150m_patch16_reg4_gap_256 vit_so150m_patch16_reg4_map_256",
    ),
    ("deit", SMALL, "deit_tiny_patch16_224 deit_tiny_distilled_patch16_224 deit3_small_patch16_224"),
    ("beit", SMALL, "beit_base_patch16_224 beitv2_base_patch16_224"),
    (
        "eva",
        SMALL,
        "eva02_base_patch14_224 eva02_base_patch16_clip_224 eva02_enormous_patch14_clip_224 eva02_tiny_patch14_224 "
        "eva_giant_patch14_224 eva_giant_patch14_clip_224 vit_7b_patch16_dinov3 vit_small_patch16_dinov3 "
        "vit_small_patch16_dinov3_qkvb vit_small_plus_patch16_dinov3 vit_small_plus_patch16_dinov3_qkvb "
        "vit_small_patch16_lingbot vit_giant_patch16_lingbot vit_base_patch16_rope_224 vit_small_patch16_rope_224 "
        "vit_small_patch16_rope_ape_224 vit_small_patch16_rope_mixed_224 vit_small_patch16_rope_mixed_ape_224 "
        "vit_medium_patch16_rope_reg1_gap_256 vit_mediumd_patch16_rope_reg1_gap_256 "
        "vit_betwixt_patch16_rope_reg4_gap_256 vit_pe_core_tiny_patch16_384 vit_pe_core_gigantic_patch14_448 "
        "vit_pe_lang_gigantic_patch14_448 vit_pe_lang_large_patch14_448 vit_pe_spatial_tiny_patch16_512",
    ),
    ("eva", {**SMALL, "embed_dim": 64, "num_heads": 4, "num_kv_heads": (4, 2, 4)}, "vit_base_patch16_sapiens2"),
    (
        "vision_transformer_relpos",
        SMALL,
        "vit_relpos_small_patch16_224 vit_relpos_base_patch16_cls_224 vit_relpos_base_patch16_clsgap_224 "
        "vit_relpos_base_patch16_plus_240 vit_relpos_small_patch16_rpn_224 vit_relpos_base_patch32_plus_rpn_256 "
        "vit_relpos_medium_patch16_cls_224 vit_srelpos_medium_patch16_224 vit_srelpos_small_patch16_224",
    ),
    ("cait", SMALL, "cait_xxs24_224"),
    ("vision_transformer_hybrid", {**WIDTH, "img_size": 64, "patch_size": 1}, "vit_tiny_r_s16_p8_224"),
    ("vision_transformer_hybrid", {**WIDTH, "img_size": 64, "embed_dim": 768}, "vit_base_mci_224"),
    (
        "vision_transformer_hybrid",
        {**WIDTH, "img_size": 96},
        "vit_small_r26_s32_224 vit_base_r50_s16_224 vit_small_resnet26d_224 vit_small_resnet50d_s16_224",
    ),
    (
        "naflexvit",
        {**WIDTH, "patch_size": 8},
        "naflexvit_base_patch16_gap naflexvit_base_patch16_par_gap naflexvit_base_patch16_parfac_gap "
        "naflexvit_base_patch16_map naflexvit_so150m2_patch16_reg1_gap naflexvit_so150m2_patch16_reg1_map "
        "naflexvit_base_patch16_siglip naflexvit_base_patch16_radio_v3 naflexvit_large_patch16_radio_v3 "
        "naflexvit_so400m_patch16_radio_v4",
    ),
    (
        "gemma4_vit",
        {**SMALL, "img_size": 48, "head_dim": 16, "intermediate_size": 96, "position_embedding_size": 64},
        "gemma4_vit_167m gemma4_vit_570m gemma4_vit_167m_enc",
    ),
    ("deepseek_vit", {**SMALL, "img_size": 48, "mlp_ratio": 2.0}, "deepseek_vit_412m deepseek_vit_412m_enc"),
    (
        "qwen3_vit",
        {**SMALL, "img_size": 48, "pos_embed_grid_size": 6},
        "qwen3_vit_88m qwen3_vit_88m_merge qwen3_vit_88m_enc",
    ),
)
UNFUSED = (
    "vit_tiny_patch16_224 vit_medium_patch16_gap_256 vit_small_patch16_18x2_224 vit_dwee_patch16_reg1_gap_256 "
    "vit_base_patch16_xp_224 beit_base_patch16_224 eva02_tiny_patch14_224 vit_small_patch16_rope_mixed_224 "
    "vit_relpos_small_patch16_224 vit_relpos_base_patch16_cls_224"
)
NOT_ALL: tuple[tuple[str, str, Options, int | None, str], ...] = (  # family, name, options, blocks, what is refused
    ("vision_transformer_sam", "samvit_base_patch16_224", SAM, 4, ""),
    ("vision_transformer_sam", "samvit_base_patch16", {**SAM, "num_classes": 0}, 4, ""),
    ("swin_transformer", "swin_tiny_patch4_window7_224", SWIN, 3, ""),
    ("swin_transformer", "swin_small_patch4_window7_224", {**SWIN, "window_size": 3}, 3, ""),
    ("swin_transformer", "swin_s3_tiny_224", SWIN, 3, ""),
    ("swin_transformer_v2", "swinv2_tiny_window8_256", SWIN, 3, ""),
    ("swin_transformer_v2_cr", "swinv2_cr_tiny_224", SWIN, 3, "in another order"),
    ("maxxvit", "maxvit_nano_rw_256", {"img_size": 64}, 14, ""),
    ("maxxvit", "maxxvit_rmlp_nano_rw_256", {"img_size": 64}, 14, ""),
    ("twins", "twins_svt_small", {"img_size": 64}, 18, "grid of patches"),
    ("pvt_v2", "pvt_v2_b0", {}, 8, "grid of patches"),
    ("mvitv2", "mvitv2_tiny", {"img_size": 64}, 10, "grid of patches"),
    ("xcit", "xcit_nano_12_p16_224", {"embed_dim": 32, "depth": 2, "num_heads": 2}, None, "over the token axis"),
    ("hiera", "hiera_tiny_224", {"img_size": 64}, 12, "grid of patches"),
    ("convit", "convit_tiny", {"img_size": 64, "embed_dim": 32, "depth": 3, "num_heads": 2}, 3, "over the token axis"),
    ("levit", "levit_128s", {"img_size": 128}, 9, ""),
    ("mlp_mixer", "mixer_s32_224", {"img_size": 64}, 0, "no attention"),
    ("resnet", "resnet10t", {}, 0, "no attention"),
)


def timm_model(name: str, options: Options, *, fused: bool = True) -> nn.Module:
    """A timm model; `fused=False` writes its attention as matmul, softmax, matmul."""
    import timm

    before = timm.layers.config.use_fused_attn()
    timm.layers.config.set_fused_attn(fused)
    try:
        model: nn.Module = timm.create_model(name, **options)
    finally:
        timm.layers.config.set_fused_attn(bool(before))
    return model


def _vitamin(name: str) -> nn.Module:
    from timm.models.vitamin import VitCfg, VitConvCfg

    convolution = VitConvCfg(norm_layer="layernorm2d", norm_eps=1e-6)
    stem = VitCfg(embed_dim=(16, 32, 48), depths=(1, 1, 1), stem_width=16, conv_cfg=convolution, head_type="1d")
    return timm_model(name, {**WIDTH, "img_size": 64, "embed_cfg": stem})


def _timm_entries() -> Iterator[Entry]:
    for family, options, names in TIMM:
        for name in names.split():
            # Encoders have no classes, and models for language do not say how large their images are.
            given = {k: v for k, v in options.items() if k != "num_classes" or not name.endswith("_enc")}
            side = partial(images, side=48) if options.get("img_size") == 48 else None
            yield Entry(name, f"timm {family}", partial(timm_model, name, given), inputs=side)
    for name in ("vitamin_small_224", "vitamin_xlarge_256"):
        yield Entry(name, "timm vitamin", partial(_vitamin, name))
    for name in UNFUSED.split():
        yield Entry(f"{name}, unfused", "timm", partial(timm_model, name, SMALL, fused=False))
    for family, name, options, blocks, reason in NOT_ALL:
        side = partial(images, side=options.get("img_size", 64))
        yield Entry(name, f"timm {family}", partial(timm_model, name, options), blocks, reason, side)


def _torchvision() -> nn.Module:
    from torchvision.models import VisionTransformer

    return VisionTransformer(40, 8, DEPTH, 3, 48, 96, num_classes=7)


def _torchvision_swin() -> nn.Module:
    from torchvision.models.swin_transformer import SwinTransformer

    return SwinTransformer([4, 4], 24, [2, 1], [2, 2], [4, 4], num_classes=7)


def _torchvision_swin_v2() -> nn.Module:
    from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformer, SwinTransformerBlockV2

    options = {"block": SwinTransformerBlockV2, "downsample_layer": PatchMergingV2}
    return SwinTransformer([4, 4], 24, [2, 1], [2, 2], [4, 4], num_classes=7, **options)


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


FACE = {
    "hidden_size": 48, "num_hidden_layers": DEPTH, "num_attention_heads": 3, "intermediate_size": 96,
    "image_size": 40, "patch_size": 8,
}  # fmt: skip
DENSE = {"num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3], "neck_hidden_sizes": [16] * 4}
FACE_SWIN = {
    "image_size": 32, "patch_size": 4, "embed_dim": 24, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4,
}  # fmt: skip
FACE_SAM = {"image_size": 64, "window_size": 3, "global_attn_indexes": [2], "output_channels": 16, "mlp_dim": 96}
VIT_DET = {"image_size": 64, "pretrain_image_size": 64, "window_block_indices": [0], "window_size": 3}
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
    ("SAM vision", "SamVisionModel", FACE_SAM, {}),
    ("Swin", "SwinModel", FACE_SWIN, {"blocks": 2}),
    ("Swin v2", "Swinv2Model", FACE_SWIN, {"blocks": 2, "attention": "eager"}),
    ("Donut Swin", "DonutSwinModel", FACE_SWIN, {"blocks": 2, "attention": "eager"}),
)


def hugging_face(name: str, options: Options, attention: str) -> nn.Module:
    """A Hugging Face model of that class."""
    import transformers

    kind = getattr(transformers, name, None)
    if kind is None:
        raise ImportError(f"this version of transformers has no {name}")
    sizes = options if "embed_dim" in options else {**FACE, **options}
    model: nn.Module = kind(kind.config_class(**sizes, attn_implementation=attention))
    return model


def _hugging_face_entries() -> Iterator[Entry]:
    for label, name, options, given in HUGGING_FACE:
        own = dict(given)
        for attention in own.pop("attention", "sdpa eager").split():
            build = partial(hugging_face, name, options, attention)
            yield Entry(f"{label}, {attention}", f"transformers {name}", build, **own)


QUICK = (
    "vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "vit_small_patch14_reg4_dinov2", "test_vit3",
    "vit_small_patch16_18x2_224", "vit_base_patch16_xp_224", "vit_base_patch16_rpn_224", "beit_base_patch16_224",
    "eva02_tiny_patch14_224", "vit_small_patch16_dinov3", "vit_small_patch16_rope_mixed_224",
    "vit_relpos_base_patch16_cls_224", "cait_xxs24_224", "naflexvit_base_patch16_gap", "vitamin_small_224",
    "vit_medium_patch16_gap_256, unfused", "torchvision ViT", "ViT, sdpa", "DINOv2 with registers, eager",
    "CLIP vision, eager", "DPT depth, sdpa", "swin_tiny_patch4_window7_224", "convit_tiny", "resnet10t",
)  # fmt: skip


def entries(*, quick: bool = False) -> list[Entry]:
    """All models of the table, or the few that stand for them."""
    small = partial(images, side=32)
    swins = {"torchvision Swin": _torchvision_swin, "torchvision Swin v2": _torchvision_swin_v2}
    every = [
        *_timm_entries(),
        Entry("torchvision ViT", "torchvision", _torchvision),
        *(Entry(label, "torchvision", build, inputs=small) for label, build in swins.items()),
        *_hugging_face_entries(),
    ]
    return [entry for entry in every if not quick or entry.label in QUICK]
