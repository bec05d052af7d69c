"""The published objective: a student that idles learns from the labels and from the dense model."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from tqdm import tqdm

from idlefx.errors import InputError
from idlefx.runtime.cut_loss import wide
from idlefx.runtime.module import IdleModule
from idlefx.training.config import Settings
from idlefx.training.feature_taps import class_count, has_features, tap
from idlefx.training.history import History
from idlefx.training.loader import ImageLoader
from idlefx.training.losses import distillation, feature_distance

LOSSES = ("loss", "task", "cut", "kd", "feat")
Batch = tuple[Tensor, Tensor]


class Labelled:
    """Task, token cut loss, and the distances to the dense model's classes and class features; top-1 is measured.

    Args:
        student: Images to logits, class features and perhaps cut loss, tapped in train mode.
        teacher: The dense model, tapped in eval mode.
        settings: How to train.
        val: The images on which top-1 is measured.
        history: What is found there.
        batch_size: Training images of one batch of one process.

    Raises:
        InputError: Mixup and cutmix, which pair images, meet an odd batch.

    Source:
        IdleViT, arXiv:2310.05654.
    """

    losses, measures, leaves_out = LOSSES, ("top1",), False

    def __init__(
        self,
        student: fx.GraphModule,
        teacher: fx.GraphModule,
        settings: Settings,
        val: ImageLoader,
        history: History,
        batch_size: int,
    ) -> None:
        from timm.data import Mixup

        self.student, self.teacher, self.settings, self.val, self.history = student, teacher, settings, val, history
        self.mixup = None
        if settings.mixup or settings.cutmix:
            if batch_size % 2:
                raise InputError(f"settings: mixup and cutmix pair images, but a batch has {batch_size}; make it even")
            self.mixup = Mixup(
                settings.mixup, settings.cutmix, label_smoothing=settings.smoothing, num_classes=class_count(student)
            )
        self.taught = bool(settings.w_kd or settings.w_feat)
        self.compares_features = bool(settings.w_feat) and has_features(student) and has_features(teacher)

    def student_of(self, step: int, steps: int) -> nn.Module:
        """The student, in every step."""
        del step, steps
        return self.student

    def parts(self, model: nn.Module, batch: Batch, step: int, steps: int) -> list[Tensor]:
        """The weighted sum of all losses, and each of them, in the order of `LOSSES`."""
        settings, (images, labels) = self.settings, batch
        targets, smoothing = labels, settings.smoothing
        if self.mixup:
            images, targets = self.mixup(images, labels)
            smoothing = 0.0  # the mixed targets are smooth already
        nothing = torch.zeros((), device=images.device)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=settings.amp):
            logits, features, *cut = model(images)
            if self.taught:
                with torch.no_grad():
                    dense_logits, dense_features = self.teacher(images)
        parts = [
            F.cross_entropy(wide(logits), targets, label_smoothing=smoothing),
            cut[0] if cut else nothing,
            distillation(logits, dense_logits) if settings.w_kd else nothing,
            feature_distance(features, dense_features) if self.compares_features else nothing,
        ]
        weights = (1.0, settings.cut_weight(step, steps), settings.w_kd, settings.w_feat)
        total = torch.stack([weight * part for weight, part in zip(weights, parts, strict=True) if weight]).sum()
        return [total, *parts]

    def begin(self, untuned: IdleModule) -> None:
        """Measure the dense model and the converted one before the first step."""
        models = (self.teacher, tap(untuned))
        self.history.dense, self.history.untuned = (evaluate(m, self.val, amp=self.settings.amp) for m in models)
        self.history.best = self.history.untuned

    def look(self, model: IdleModule, step: int) -> tuple[dict[str, float], bool]:
        """Top-1 on the held-out images, and whether there was none better."""
        top1 = evaluate(tap(model), self.val, amp=self.settings.amp)
        return {"top1": top1}, self.history.note(top1, step)

    def compile(self) -> None:
        """Compile the teacher."""
        self.teacher.compile()

    def state(self) -> dict[str, Any]:
        """What was measured."""
        return self.history.state()

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        self.history.restore(state)


@torch.no_grad()
def evaluate(model: nn.Module, batches: ImageLoader, *, amp: bool = False) -> float:
    """Top-1 accuracy in percent, over all processes.

    Args:
        model: Images (B, C, H, W) to logits (B, classes), or to a tuple that begins with them.
        batches: The images and labels to look at.
        amp: Whether to compute in bfloat16 where that is safe.

    Raises:
        InputError: There is no image to look at.
    """
    right = torch.zeros(2, dtype=torch.long, device=batches.world.device)
    hidden = None if batches.world.leads else True
    for images, labels in tqdm(batches.epoch(), "evaluate", len(batches), leave=False, delay=3, disable=hidden):
        with torch.autocast(images.device.type, torch.bfloat16, enabled=amp):
            output = model(images)
        logits = output[0] if isinstance(output, tuple) else output
        right += torch.stack([(logits.argmax(1) == labels).sum(), torch.tensor(len(labels), device=labels.device)])
    batches.agree()
    found, seen = batches.world.total(right).tolist()
    if not seen:
        raise InputError("data: there are no images to evaluate on")
    return 100 * found / seen
