"""Models of timm whose blocks attend over one sequence of tokens; most lines name a model and what makes it small."""

from collections.abc import Iterator
from functools import partial
from importlib import import_module

from torch import nn

from idlefx.zoo.entry import DEPTH, Entry, Options, images

WIDTH = {"embed_dim": 48, "depth": DEPTH, "num_heads": 3, "num_classes": 7}
SMALL = {**WIDTH, "img_size": 40, "patch_size": 8}

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


def timm_model(name: str, options: Options, *, fused: bool = True, file: str = "") -> nn.Module:
    """A timm model, or of a class in one of its files; `fused=False` writes attention as matmul, softmax, matmul."""
    import timm

    build = getattr(import_module(f"timm.models.{file}"), name) if file else partial(timm.create_model, name)
    before = timm.layers.config.use_fused_attn()
    timm.layers.config.set_fused_attn(fused)
    try:
        model: nn.Module = build(**options)
    finally:
        timm.layers.config.set_fused_attn(bool(before))
    return model


def _vitamin(name: str) -> nn.Module:
    from timm.models.vitamin import VitCfg, VitConvCfg

    convolution = VitConvCfg(norm_layer="layernorm2d", norm_eps=1e-6)
    stem = VitCfg(embed_dim=(16, 32, 48), depths=(1, 1, 1), stem_width=16, conv_cfg=convolution, head_type="1d")
    return timm_model(name, {**WIDTH, "img_size": 64, "embed_cfg": stem})


def timm_entries() -> Iterator[Entry]:
    """The rows."""
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
