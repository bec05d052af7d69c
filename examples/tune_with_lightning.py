"""Tune a converted model in Lightning's Trainer, without labels: the dense model is the teacher.

`python -m examples.tune_with_lightning path/to/pictures`
"""

import sys

import lightning
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import idlefx
from examples.tune_timm_style import open_pictures
from idlefx.finetune import Taught
from idlefx.models import saliency_vit


class Tuning(lightning.LightningModule):
    """One module that holds the student, and calls its teacher."""

    def __init__(self, dense: nn.Module, idle: idlefx.IdleModule, begin: Tensor, steps: int, lr: float = 3e-6) -> None:
        super().__init__()
        self.taught, self.steps, self.lr = Taught(dense, idle, begin), steps, lr

    def training_step(self, images: Tensor, _: int) -> Tensor:
        """The loss of a batch, which begins at 1."""
        loss = self.taught(images)["loss"]
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> dict:
        """AdamW with a long warm-up and nothing that pulls weights away."""
        optimizer = torch.optim.AdamW(self.taught.parameters(), self.lr, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, self.steps, pct_start=1 / 3)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def tune(dense: nn.Module, idle: idlefx.IdleModule, loader: DataLoader, steps: int = 200, **options: object) -> None:
    """Train `idle` in place; the options are those of Lightning's Trainer."""
    trainer = lightning.Trainer(max_steps=steps, **options)
    trainer.fit(Tuning(dense, idle, next(iter(loader)), steps), loader)


def main() -> None:
    """Convert, tune, and tell what was won."""
    folder, dense = sys.argv[1], saliency_vit()
    idle = idlefx.convert(dense, layers=[1, 3, 5, 7, 9, 11], keep=0.75, idle="follow")
    tune(dense, idle, open_pictures(folder, idle))
    print(idlefx.compare(dense, idle, folder, limit=64))
    safetensors.torch.save_model(idle.cpu(), "tuned.safetensors")


if __name__ == "__main__":
    main()
