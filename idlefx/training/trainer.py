"""One step of fine-tuning: a student that idles learns from the labels and from the dense model."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from types import TracebackType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.parallel import DistributedDataParallel

from idlefx.errors import InputError, TrainingError
from idlefx.runtime.cut_loss import wide
from idlefx.runtime.module import IdleModule
from idlefx.training.config import Settings
from idlefx.training.distributed import World
from idlefx.training.feature_taps import class_count, has_features, token_parameters
from idlefx.training.losses import distillation, feature_distance
from idlefx.training.seeding import seeded

LOSSES = ("loss", "task", "cut", "kd", "feat")
Batch = tuple[Tensor, Tensor]


class Trainer:
    """The student, its optimiser, and how far they are.

    Args:
        idle: The converted model; its parameters are trained in place.
        student: What is run in its place: images to logits, class features and cut loss, tapped in train mode.
        teacher: The dense model, tapped in eval mode.
        settings: How to train.
        steps: Steps of the whole run.
        batch_size: Images of one batch of one process.
        world: The processes that train together.

    Attributes:
        step: Steps made so far.
        images: Images of one step, over all processes.
        averaged: The model whose weights are the moving average, or `idle` itself without averaging.
    """

    def __init__(
        self,
        idle: IdleModule,
        student: fx.GraphModule,
        teacher: fx.GraphModule,
        settings: Settings,
        *,
        steps: int,
        batch_size: int,
        world: World,
    ) -> None:
        from timm.data import Mixup
        from timm.optim import create_optimizer_v2, param_groups_weight_decay
        from timm.scheduler import create_scheduler_v2
        from timm.utils import ModelEmaV3

        self.idle, self.teacher, self.settings, self.steps, self.world = idle, teacher, settings, steps, world
        self.step = 0
        frozen = set[str]() if settings.train_all else token_parameters(idle)
        self.frozen = [p for p in map(idle.get_parameter, sorted(frozen)) if p.requires_grad]
        for parameter in self.frozen:
            parameter.requires_grad_(False)
        self.parameters = [p for p in student.parameters() if p.requires_grad]
        self.images = batch_size * settings.accumulate * world.size
        rate = settings.rate(self.images)
        undecayed: set[str] = getattr(idle, "no_weight_decay", set)()  # the student, a plain graph, cannot say
        groups = param_groups_weight_decay(student, settings.weight_decay, no_weight_decay_list=undecayed)
        self.optimizer = create_optimizer_v2(groups, opt="adamw", lr=rate)
        lowest = min(settings.min_lr, rate)
        self.schedule, _ = create_scheduler_v2(
            self.optimizer, "cosine", num_epochs=steps, min_lr=lowest, warmup_lr=lowest,
            warmup_epochs=int(settings.warmup * steps), step_on_epochs=False, updates_per_epoch=1,
        )  # fmt: skip
        self.ema = ModelEmaV3(idle, decay=settings.ema, use_warmup=True) if settings.ema else None
        self.averaged: IdleModule = self.ema.module if self.ema else idle
        self.mixup = None
        if settings.mixup or settings.cutmix:
            if batch_size % 2:
                raise InputError(f"settings: mixup and cutmix pair images, but a batch has {batch_size}; make it even")
            self.mixup = Mixup(
                settings.mixup, settings.cutmix, label_smoothing=settings.smoothing, num_classes=class_count(student)
            )
        self.taught = bool(settings.w_kd or settings.w_feat)
        self.compares_features = bool(settings.w_feat) and has_features(student) and has_features(teacher)
        self.model: nn.Module = DistributedDataParallel(student) if world.size > 1 else student
        if settings.compile:
            self.model.compile()
            self.teacher.compile()

    def update(self, batches: Sequence[Batch]) -> dict[str, float]:
        """Make one step.

        Args:
            batches: Images (B, C, H, W) and labels (B,), whose gradients make the step.

        Returns:
            The losses, averaged over batches and processes, the norm of the gradients, and the learning rate.

        Raises:
            TrainingError: The loss or the gradients are no finite numbers; the weights are as before the step.
            InputError: There are no batches.
        """
        if not batches:
            raise InputError("data: the stream ended before it gave as many images as it said it had")
        self.schedule.step_update(self.step)
        self.optimizer.zero_grad()
        sums = torch.zeros(len(LOSSES), device=self.world.device)
        with seeded(self.settings.seed, self.step, self.world.rank, device=self.world.device):
            for place, (images, labels) in enumerate(batches):
                last = place + 1 == len(batches)
                with nullcontext() if last or self.world.size == 1 else self.model.no_sync():  # type: ignore[operator]
                    losses = self.losses(images, labels)
                    (losses[0] / len(batches)).backward()
                sums += torch.stack(losses).detach()
        norm = nn.utils.clip_grad_norm_(self.parameters, self.settings.clip or torch.inf)
        means = self.world.total(sums / (len(batches) * self.world.size))
        row = dict(zip((*LOSSES, "grad_norm"), torch.cat([means, norm.detach()[None]]).tolist(), strict=True))
        self.step += 1
        self._check(row)
        self.optimizer.step()
        if self.ema:
            self.ema.update(self.idle, step=self.step)
        return {"step": self.step, "lr": self.optimizer.param_groups[0]["lr"], **row}

    def losses(self, images: Tensor, labels: Tensor) -> list[Tensor]:
        """The weighted sum of all losses, and each of them, in the order of `LOSSES`."""
        settings = self.settings
        targets, smoothing = labels, settings.smoothing
        if self.mixup:
            images, targets = self.mixup(images, labels)
            smoothing = 0.0  # the mixed targets are smooth already
        nothing = torch.zeros((), device=images.device)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=settings.amp):
            logits, features, *cut = self.model(images)
            if self.taught:
                with torch.no_grad():
                    dense_logits, dense_features = self.teacher(images)
        parts = [
            F.cross_entropy(wide(logits), targets, label_smoothing=smoothing),
            cut[0] if cut else nothing,
            distillation(logits, dense_logits) if settings.w_kd else nothing,
            feature_distance(features, dense_features) if self.compares_features else nothing,
        ]
        weights = (1.0, settings.cut_weight(self.step, self.steps), settings.w_kd, settings.w_feat)
        total = torch.stack([weight * part for weight, part in zip(weights, parts, strict=True) if weight]).sum()
        return [total, *parts]

    def _check(self, row: Mapping[str, float]) -> None:
        strange = [name for name in (*LOSSES, "grad_norm") if not abs(row[name]) < torch.inf]
        if strange:
            told = ", ".join(f"{name} {row[name]}" for name in strange)
            raise TrainingError(
                f"finetune: step {self.step} gave {told}, so training stops; the last checkpoint is from before. A "
                "smaller --lr, a --clip, or leaving out --amp usually helps"
            )

    def state(self) -> dict[str, Any]:
        """All that a continued run needs; its random numbers follow from seed and step."""
        return {
            "step": self.step,
            "model": self.idle.state_dict(),
            "averaged": self.averaged.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        self.step = state["step"]
        self.idle.load_state_dict(state["model"])
        if self.ema:
            self.averaged.load_state_dict(state["averaged"])
        self.optimizer.load_state_dict(state["optimizer"])

    def __enter__(self) -> "Trainer":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Leave the parameters of `idle` trainable as they were, and the averaged weights in them if all went well."""
        for parameter in self.frozen:
            parameter.requires_grad_(True)
        if self.ema and error is None:
            self.idle.load_state_dict(self.averaged.state_dict())
