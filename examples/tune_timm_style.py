"""Tune a converted model in a loop as timm's train.py has it: layer decay, averaged weights, channels_last, bfloat16.

`python -m examples.tune_timm_style path/to/pictures`
"""

import sys

import safetensors.torch
import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import nn
from torch.utils.data import DataLoader

import idlefx
from idlefx.finetune import Taught
from idlefx.models import saliency_vit
from idlefx.reporting.comparison.image_batches import find_images
from idlefx.reporting.images import read_photo


def open_pictures(folder: str, idle: idlefx.IdleModule, batch_size: int = 16) -> DataLoader:
    """Batches (B, C, H, W) of the pictures at any depth of a folder."""
    pictures = [read_photo(file, idle.conversion.facts) for file in find_images(folder)]
    return DataLoader(pictures, batch_size, shuffle=True)


def tune(dense: nn.Module, idle: idlefx.IdleModule, loader: DataLoader, epochs: int = 5, lr: float = 3e-6) -> nn.Module:
    """Train `idle` in place; returns the model whose weights are the moving average."""
    idle.to(memory_format=torch.channels_last)
    taught = Taught(dense, idle, next(iter(loader)))
    decay = {"layer_decay": 0.9} if hasattr(idle, "group_matcher") else {}  # which the models of timm have
    optimizer = create_optimizer_v2(idle, "adamw", lr, weight_decay=0.0, **decay)  # spares what no_weight_decay names
    steps = epochs * len(loader)
    schedule, _ = create_scheduler_v2(
        optimizer, "cosine", num_epochs=steps, warmup_epochs=steps // 3, warmup_lr=0.0, min_lr=0.0,
        step_on_epochs=False, updates_per_epoch=1,
    )  # fmt: skip
    ema, device, step = ModelEmaV3(idle, decay=0.99), next(idle.parameters()).device, 0
    for _ in range(epochs):
        for images in loader:
            schedule.step_update(step := step + 1)
            optimizer.zero_grad()
            with torch.autocast(device.type, torch.bfloat16):
                loss = taught(images.to(device, memory_format=torch.channels_last))["loss"]
            loss.backward()
            optimizer.step()
            ema.update(idle, step=step)
    return ema.module


if __name__ == "__main__":
    model = saliency_vit()
    idling = idlefx.convert(model, layers=[1, 3, 5, 7, 9, 11], keep=0.75, idle="follow")
    tuned = tune(model, idling, open_pictures(sys.argv[1], idling))
    print(idlefx.compare(model, {"averaged": tuned}, sys.argv[1], limit=64))
    safetensors.torch.save_model(tuned.cpu(), "tuned.safetensors")
