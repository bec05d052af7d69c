"""Tune adapters of low rank alone, with peft, and merge them into the converted model: without labels, never worse.

`python -m examples.tune_with_lora path/to/pictures`
"""

import sys
from collections.abc import Iterable
from typing import Any

import safetensors.torch
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import idlefx
from idlefx.finetune import Settings, finetune
from idlefx.models import saliency_vit
from idlefx.reporting.comparison.image_batches import find_images
from idlefx.reporting.images import read_photo


def layers_to_adapt(idle: idlefx.IdleModule) -> list[str]:
    """The linear layers of the blocks in which tokens idle, without those by whose weights tokens are chosen."""
    blocks, layers = tuple(f"{step.path}." for step in idle.plan), idle.conversion.called
    free = idle.conversion.free_layers
    return [path for path in free if layers[path].kind == "Linear" and path.startswith(blocks)]


def tune(
    dense: nn.Module, idle: idlefx.IdleModule, train: Iterable[Any], val: Iterable[Any],
    *, steps: int = 100, rank: int = 8, lr: float = 1e-4,
) -> Any:  # fmt: skip
    """Train adapters in `idle`, and merge the best ones into its weights; returns what was gained."""
    trainable = [parameter for parameter in idle.parameters() if parameter.requires_grad]
    adapted = get_peft_model(idle, LoraConfig(r=rank, lora_alpha=rank, target_modules=layers_to_adapt(idle)))
    gain = finetune(dense, idle, train, val, Settings(steps=steps, lr=lr))
    adapted.merge_and_unload()
    for parameter in trainable:  # peft has frozen them
        parameter.requires_grad_(True)
    return gain


def main() -> None:
    """Convert, tune, and tell what was won."""
    dense = saliency_vit()
    idle = idlefx.convert(dense, layers=[3, 6, 9], keep=0.7)
    pictures = torch.stack([read_photo(file, idle.conversion.facts) for file in find_images(sys.argv[1])])
    held_out = len(pictures) // 8
    print(tune(dense, idle, pictures[held_out:].split(16), pictures[:held_out].split(16)))
    safetensors.torch.save_model(idle, "tuned.safetensors")


if __name__ == "__main__":
    main()
