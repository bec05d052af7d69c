"""Tune a converted model of Hugging Face in their Trainer, without labels: the dense model is the teacher.

`python -m examples.tune_with_trainer facebook/dinov2-small path/to/pictures`
"""

import sys
from pathlib import Path

import safetensors.torch
import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import AutoModel, Trainer, TrainingArguments

import idlefx
from idlefx.finetune import Taught
from idlefx.reporting.comparison.image_batches import find_images
from idlefx.reporting.images import read_photo

WARMUP = 1 / 3  # of the steps


class Pictures(Dataset):
    """What the model takes of each picture, by keyword."""

    def __init__(self, files: list[Path], idle: idlefx.IdleModule) -> None:
        self.files, self.facts = files, idle.conversion.facts

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": read_photo(self.files[index], self.facts)}


def tune(dense: nn.Module, idle: idlefx.IdleModule, pictures: Dataset, out: Path, steps: int = 200) -> None:
    """Train `idle` in place, and keep its weights in `out`."""
    begin = torch.stack([pictures[at]["pixel_values"] for at in range(min(16, len(pictures)))])
    arguments = TrainingArguments(
        str(out), max_steps=steps, per_device_train_batch_size=16, learning_rate=3e-6, weight_decay=0.0,
        warmup_steps=round(WARMUP * steps), lr_scheduler_type="cosine", save_steps=100, logging_steps=10,
        remove_unused_columns=False, dataloader_pin_memory=False, report_to=[],
    )  # fmt: skip
    Trainer(Taught(dense, idle, begin), arguments, train_dataset=pictures).train()
    safetensors.torch.save_model(idle.cpu(), str(out / "tuned.safetensors"))


def main() -> None:
    """Convert, tune, and tell what was won."""
    name, folder = sys.argv[1:]
    dense = AutoModel.from_pretrained(name).eval()
    idle = idlefx.convert(dense, layers=[1, 3, 5, 7, 9, 11], keep=0.75, idle="follow")
    untuned = idlefx.compare(dense, idle, folder, limit=64)
    tune(dense, idle, Pictures(find_images(folder), idle), Path("tuned"))
    print("untuned", untuned, "tuned", idlefx.compare(dense, idle, folder, limit=64), sep="\n")


if __name__ == "__main__":
    main()
