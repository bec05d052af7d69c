"""Towers of vision-language models, which take patches of several images of any size as one sequence.

What they compute of the sizes of the images must be told them, and of that the lengths as numpy arrays.
"""

from collections.abc import Iterator
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import nn

from idlefx.zoo.entry import DEPTH, Entry, Inputs, Options

PATCH, MERGED, WINDOW = 4, 2, 16
Grids = tuple[tuple[int, int, int], ...]  # frames, rows and columns of patches of each image or film
ONE: Grids = ((1, 8, 8),)
TWO: Grids = ((1, 8, 12), (1, 6, 6))
FILM: Grids = ((2, 8, 8),)

SIZES = {
    "depth": DEPTH, "hidden_size": 48, "num_heads": 4, "intermediate_size": 96, "patch_size": PATCH,
    "temporal_patch_size": 2, "spatial_merge_size": MERGED, "out_hidden_size": 32,
}  # fmt: skip
WINDOWED = {"window_size": WINDOW, "fullatt_block_indexes": [1]}
QWEN_2 = {"embed_dim": 48, "hidden_size": 32, "mlp_ratio": 2}
QWEN_3 = {"num_position_embeddings": 64}
TOWERS: tuple[tuple[str, str, str, Options, str], ...] = (  # label, file, class, sizes, what the tower is told
    ("Qwen2-VL", "qwen2_vl", "Qwen2VisionTransformerPretrainedModel", QWEN_2, "positions"),
    ("Qwen2.5-VL", "qwen2_5_vl", "Qwen2_5_VisionTransformerPretrainedModel", WINDOWED, "positions windows"),
    ("Qwen3-VL", "qwen3_vl", "Qwen3VLVisionModel", {**QWEN_3, "deepstack_visual_indexes": [1]}, "positions taps"),
    ("Qwen3.5", "qwen3_5", "Qwen3_5VisionModel", QWEN_3, "positions taps"),
)


def tower(file: str, name: str, sizes: Options, attention: str) -> nn.Module:
    """A tower of that class."""
    kind = getattr(import_module(f"transformers.models.{file}.modeling_{file}"), name)
    model: nn.Module = kind(kind.config_class(**{**SIZES, **sizes}, attn_implementation=attention))
    return model


def patches(grids: Grids, told: str, batch: int) -> Inputs:
    """Patches of images of these grids, and what a tower would compute of the grids; the batch is always this one."""
    from transformers import vision_utils

    del batch
    grid = torch.tensor(grids)
    counts = [frames * rows * columns for frames, rows, columns in grids]
    colours = torch.cat([torch.randn(1, 3, 1).expand(count, -1, 2 * PATCH**2) for count in counts])
    inputs: dict[str, Any] = {
        "hidden_states": (colours + torch.randn(colours.shape)).flatten(1),
        "grid_thw": grid,
        "cu_seqlens": vision_utils.get_vision_cu_seqlens(grid).numpy(),
        "position_ids": vision_utils.get_vision_position_ids(grid, MERGED),
    }
    if "windows" in told:
        index, lengths = vision_utils.get_vision_window_index(grid, MERGED, WINDOW, PATCH)
        inputs |= {"window_index": index, "cu_window_seqlens": lengths.numpy()}
    if "taps" in told:
        side = int(QWEN_3["num_position_embeddings"] ** 0.5)
        taps = vision_utils.get_vision_interpolation_indices_and_weights(
            grid, num_grid_per_side=side, mode="bilinear", align_corners=True, spatial_merge_size=MERGED
        )
        inputs |= dict(zip(("interp_indices", "interp_weights"), taps, strict=True))
    return inputs


def packed_entries() -> Iterator[Entry]:
    """The rows: one image, two of different sizes, and a film, of which each frame is a segment."""
    for label, file, name, sizes, told in TOWERS:
        for what, grids, attention in (("one image", ONE, "sdpa"), ("packed", TWO, "sdpa"), ("film", FILM, "eager")):
            build, inputs = partial(tower, file, name, sizes, attention), partial(patches, grids, told)
            yield Entry(f"{label} tower, {what}, {attention}", f"transformers {name}", build, inputs=inputs)
