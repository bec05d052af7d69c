"""The models of the compatibility table: every way a library builds a Vision Transformer, small and random."""

from idlefx.zoo.entry import Entry
from idlefx.zoo.hugging_face import hugging_face_entries
from idlefx.zoo.packed import packed_entries
from idlefx.zoo.timm_models import timm_entries
from idlefx.zoo.timm_windows import timm_window_entries
from idlefx.zoo.torchvision_models import torchvision_entries

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
    every = [
        *timm_entries(),
        *timm_window_entries(),
        *torchvision_entries(),
        *hugging_face_entries(),
        *packed_entries(),
    ]
    return [entry for entry in every if not quick or entry.label in QUICK]
