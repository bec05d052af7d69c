"""Models of timm whose tokens stand on grids or in windows, those that convert in part, and those that are refused."""

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from idlefx.zoo.entry import Entry, Options, images
from idlefx.zoo.timm_models import WIDTH, timm_model

SAM = {**WIDTH, "depth": 4, "img_size": 64, "patch_size": 8, "window_size": 3, "global_attn_indexes": (1, 3)}
PLAIN = {**SAM, "use_rel_pos": False}
SWIN = {"img_size": 32, "patch_size": 4, "embed_dim": 24, "depths": (2, 1), "num_heads": (2, 2), "window_size": 4}
WIDE = {**SWIN, "img_size": (32, 48), "window_size": (2, 4)}
WHOLE = {**SWIN, "always_partition": True}
MAXVIT = {"img_size": 64, "embed_dim": (32, 32, 64, 64), "depths": (1, 1, 2, 2), "stem_width": 16}
NEST = {"img_size": 32, "embed_dims": (24, 24, 48), "num_heads": (2, 2, 2), "depths": (1, 1, 1)}
GCVIT = {"img_size": 64, "embed_dim": 16, "depths": (1, 2, 2, 2), "num_heads": (2, 2, 2, 2)}
LIKE_CONVIT = {"img_size": 64, "embed_dim": 32, "depth": 3, "num_heads": 2}
SAM2 = {
    "embed_dim": 16, "num_heads": 1, "stages": (1, 2, 3, 2), "global_att_blocks": (4,), "window_spec": (4, 2, 2, 2),
}  # fmt: skip
HIERA = {"img_size": 64, "embed_dim": 16, "stages": (1, 2, 3, 2), "num_heads": 1}
PIT = {"img_size": 64, "depth": (1, 2, 1)}
TINY_VIT = {
    "embed_dims": (16, 32, 32, 64), "depths": (1, 2, 2, 2), "num_heads": (1, 2, 2, 2), "window_sizes": (4, 4, 4, 2),
}  # fmt: skip
DAVIT = {"depths": (1, 1, 1, 1), "embed_dims": (16, 32, 32, 32), "num_heads": (2, 2, 2, 2)}
VISFORMER = {"img_size": 64, "embed_dim": 48, "depth": (1, 2, 2), "num_heads": 2}
VOLO = {"img_size": 64, "layers": (1, 1, 1, 1), "embed_dims": (24,) * 4, "num_heads": (2,) * 4}
BROKEN = "breaks up the token axis"
POOLED = "statistic over the token axis|(convolves over|pools) neighbouring tokens"


class _Row(NamedTuple):
    """A row: as `Entry`, with what the model's name or class is given.

    Attributes:
        family: The file of timm.
        name: The model's, or that of its class where timm's function does not let its sizes be chosen.
        options: What makes it small.
        blocks: How many blocks it has.
        refused: What the reasons of those that cannot idle say.
        also: What is added to its label.
        fused: Whether its attention is one call.
        side: Pixels of a side of its images, where no option says it.
    """

    family: str
    name: str
    options: Options
    blocks: int | None = None
    refused: str = ""
    also: str = ""
    fused: bool = True
    side: int = 64


ROWS = (
    _Row("vision_transformer_sam", "samvit_base_patch16_224", SAM, 4),
    _Row("vision_transformer_sam", "samvit_base_patch16", {**SAM, "num_classes": 0}, 4),
    _Row("vision_transformer_sam", "samvit_large_patch16", {**SAM, "window_size": 4, "global_attn_indexes": (2,)}, 4),
    _Row("vision_transformer_sam", "samvit_huge_patch16", PLAIN, 4, also="no positions"),
    _Row("vision_transformer_sam", "samvit_huge_patch16", {**PLAIN, "use_rope": True}, 4, also="rotary"),
    _Row("vision_transformer_sam", "samvit_huge_patch16", SAM, 4, also="unfused", fused=False),
    _Row("swin_transformer", "swin_tiny_patch4_window7_224", SWIN, 3),
    _Row("swin_transformer", "swin_small_patch4_window7_224", {**SWIN, "window_size": 3}, 3),
    _Row("swin_transformer", "swin_s3_tiny_224", SWIN, 3),
    _Row("swin_transformer", "swin_s3_small_224", {**SWIN, "img_size": 48, "window_size": (3, 6)}, 3),
    _Row("swin_transformer", "swin_base_patch4_window12_384", {**SWIN, "img_size": 40, "window_size": 5}, 3),
    _Row("swin_transformer", "swin_large_patch4_window7_224", {**SWIN, "img_size": 36}, 3, also="padded"),
    _Row("swin_transformer", "swin_tiny_patch4_window7_224", WIDE, 3, also="not square"),
    _Row("swin_transformer", "swin_tiny_patch4_window7_224", WHOLE, 3, also="unfused", fused=False),
    _Row("swin_transformer_v2", "swinv2_tiny_window8_256", SWIN, 3),
    _Row("swin_transformer_v2", "swinv2_tiny_window16_256", {**SWIN, "window_size": 8}, 3, also="one window"),
    _Row("swin_transformer_v2", "swinv2_small_window8_256", {**SWIN, "img_size": 36}, 3, also="padded"),
    _Row("swin_transformer_v2", "swinv2_small_window8_256", SWIN, 3, also="unfused", fused=False),
    _Row("swin_transformer_v2_cr", "swinv2_cr_tiny_224", SWIN, 3),
    _Row("swin_transformer_v2_cr", "swinv2_cr_tiny_ns_224", SWIN, 3),
    _Row("swin_transformer_v2_cr", "swinv2_cr_small_224", {**SWIN, "sequential_attn": True}, 3),
    _Row("swin_transformer_v2_cr", "swinv2_cr_small_ns_256", {**WHOLE, "img_size": 48, "window_size": 3}, 3),
    _Row("swin_transformer_v2_cr", "swinv2_cr_huge_224", {**SWIN, "extra_norm_period": 1}, 3),
    _Row("maxxvit", "maxvit_nano_rw_256", {"img_size": 64}, 14),
    _Row("maxxvit", "maxvit_rmlp_pico_rw_256", MAXVIT, 12),
    _Row("maxxvit", "maxvit_tiny_tf_224", MAXVIT, 12),
    _Row("maxxvit", "maxvit_tiny_pm_256", MAXVIT, 6, "other windows than another attention"),
    _Row("maxxvit", "maxxvit_rmlp_nano_rw_256", {"img_size": 64}, 14),
    _Row("maxxvit", "maxxvitv2_nano_rw_256", MAXVIT, 6),
    _Row("maxxvit", "maxxvitv2_rmlp_base_rw_224", MAXVIT, 6),
    _Row("maxxvit", "coatnet_0_rw_224", MAXVIT, 4, POOLED),
    _Row("maxxvit", "coatnet_0_224", MAXVIT, 4, POOLED),
    _Row("maxxvit", "coatnet_bn_0_rw_224", MAXVIT, 4, POOLED),
    _Row("maxxvit", "coatnet_rmlp_nano_rw_224", MAXVIT, 4, POOLED),
    _Row("maxxvit", "coatnet_nano_cc_224", MAXVIT, 2),
    _Row("maxxvit", "coatnext_nano_rw_224", MAXVIT, 4, POOLED),
    _Row("nest", "Nest", NEST, 3),
    _Row("nest", "Nest", {**NEST, "pad_type": "same"}, 3, also="unfused", fused=False),
    _Row("gcvit", "GlobalContextVit", {**GCVIT, "window_size": (4, 4, 4, 2)}, 7, "from outside the block"),
    _Row("twins", "twins_svt_small", {"img_size": 64}, 18, POOLED),
    _Row("twins", "twins_pcpvt_small", {"img_size": 64}, 16, POOLED),
    _Row("hiera", "hiera_tiny_224", {"img_size": 64}, 12, POOLED),
    _Row("hiera", "hiera_base_plus_224", HIERA, 8, POOLED),
    _Row("hiera", "hiera_small_abswin_256", HIERA, 8, POOLED),
    _Row("hieradet_sam2", "sam2_hiera_tiny", SAM2, 8, POOLED),
    _Row("hieradet_sam2", "hieradet_small", SAM2, 8, POOLED),
    _Row("visformer", "visformer_tiny", VISFORMER, 4),
    _Row("visformer", "visformer_small", {**VISFORMER, "attn_stage": "111"}, 5, POOLED),
    _Row("volo", "VOLO", VOLO, 3),
    _Row("levit", "levit_128s", {"img_size": 128}, 9),
    _Row("levit", "levit_conv_128s", {"img_size": 128}, 9),
    _Row("mobilevit", "mobilevit_xxs", {}, 9, side=128),
    _Row("pit", "pit_ti_224", PIT, 4),
    _Row("pit", "pit_ti_distilled_224", PIT, 4),
    _Row("metaformer", "caformer_s18", {}, 12),
    _Row("efficientformer", "efficientformer_l1", {}, 1, side=224),
    _Row("crossvit", "crossvit_9_240", {}, 12, "may be no prefix token", side=240),
    _Row("byoanet", "botnet26t_256", {"img_size": 128}, 3, "pads the token axis"),
    _Row("byoanet", "halonet26t", {}, 3, f"{BROKEN}|overlapping patches|{POOLED}", side=256),
    _Row("pvt_v2", "pvt_v2_b0", {}, 8, POOLED),
    _Row("pvt_v2", "pvt_v2_b2_li", {}, 16, POOLED),
    _Row("mvitv2", "mvitv2_tiny", {"img_size": 64}, 10, f"{BROKEN}|{POOLED}"),
    _Row("tiny_vit", "tiny_vit_5m_224", TINY_VIT, 6, POOLED),
    _Row("davit", "davit_tiny", DAVIT, 8, f"does not attend over the token axis|{POOLED}"),
    _Row("efficientformer_v2", "efficientformerv2_s0", {"img_size": 64}, 5, POOLED),
    _Row("efficientvit_msra", "efficientvit_m0", {"img_size": 64}, 6, POOLED),
    _Row("nextvit", "nextvit_small", {}, 4, POOLED),
    _Row("fastvit", "fastvit_sa12", {}, 2, POOLED),
    _Row("iformer", "iformer_t", {}, 5, POOLED),
    _Row("mobilenetv3", "mobilenetv4_hybrid_medium", {}, 8, POOLED),
    _Row("edgenext", "edgenext_xx_small", {}, 3, POOLED),
    _Row("shvit", "shvit_s1", {}, 9, "over the token axis"),
    _Row("lowformer", "lowformer_b0", {}, 7, "over the token axis"),
    _Row("coat", "coat_lite_tiny", {"img_size": 64}, 1, "over the token axis"),
    _Row("csatv2", "csatv2", {}, 18, f"attends over the batch|{POOLED}", side=128),
    _Row("xcit", "xcit_nano_12_p16_224", {"embed_dim": 32, "depth": 2, "num_heads": 2}, None, "over the token axis"),
    _Row("convit", "convit_tiny", LIKE_CONVIT, 3, "over the token axis"),
    _Row("mlp_mixer", "mixer_s32_224", {"img_size": 64}, 0, "no attention"),
    _Row("focalnet", "focalnet_tiny_srf", {}, 0, "no attention"),
    _Row("mobilevit", "mobilevitv2_050", {}, 0, "no attention"),
    _Row("resnet", "resnet10t", {}, 0, "no attention"),
)  # fmt: skip


def _sized(batch: int, sides: tuple[int, int]) -> Tensor:
    return torch.randn(batch, 3, 1, 1) + torch.randn(batch, 3, *sides)


def timm_window_entries() -> Iterator[Entry]:
    """The rows."""
    for row in ROWS:
        size = row.options.get("img_size", row.side)
        inputs = partial(images, side=size) if isinstance(size, int) else partial(_sized, sides=size)
        label = f"{row.name}, {row.also}" if row.also else row.name
        file = "" if row.name.islower() else row.family
        build = partial(timm_model, row.name, row.options, fused=row.fused, file=file)
        yield Entry(label, f"timm {row.family}", build, row.blocks, row.refused, inputs)
