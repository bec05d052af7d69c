"""One step of fine-tuning: what the optimiser does with the losses of an objective."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from idlefx.errors import InputError, TrainingError
from idlefx.runtime.module import IdleModule
from idlefx.training.config import Settings
from idlefx.training.distributed import World
from idlefx.training.objective import Objective
from idlefx.training.seeding import seeded
from idlefx.training.trained_parameters import parameter_groups, trained_parameters


class Trainer:
    """The student, its optimiser, and how far they are.

    Args:
        idle: The converted model; its parameters are trained in place.
        objective: What is minimised, and what is run for it in the place of `idle`.
        settings: How to train.
        steps: Steps of the whole run.
        batch_size: Images of one batch of one process.
        world: The processes that train together.

    Attributes:
        step: Steps made so far.
        images: Images of one step, over all processes.
        averaged: The model whose weights are the moving average, or `idle` itself without averaging.
        best: The weights that `remember` took down, in main memory; those that `idle` has in the end, if there are any.
    """

    def __init__(
        self,
        idle: IdleModule,
        objective: Objective[Any],
        settings: Settings,
        *,
        steps: int,
        batch_size: int,
        world: World,
    ) -> None:
        from timm.optim import create_optimizer_v2
        from timm.scheduler import create_scheduler_v2
        from timm.utils import ModelEmaV3

        self.idle, self.objective, self.settings, self.steps, self.world = idle, objective, settings, steps, world
        self.step = 0
        chosen = trained_parameters(idle, settings)
        self.frozen = [p for name, p in idle.named_parameters() if name not in chosen and p.requires_grad]
        for parameter in self.frozen:
            parameter.requires_grad_(False)
        student = objective.student
        self.parameters = [p for p in student.parameters() if p.requires_grad]
        self.images = batch_size * settings.accumulate * world.size
        rate = settings.rate(self.images)
        self.optimizer = create_optimizer_v2(parameter_groups(idle, student, settings), opt="adamw", lr=rate)
        lowest = min(settings.min_lr, rate)
        self.schedule, _ = create_scheduler_v2(
            self.optimizer, "cosine", num_epochs=steps, min_lr=lowest, warmup_lr=lowest,
            warmup_epochs=int(settings.warmup * steps), step_on_epochs=False, updates_per_epoch=1,
        )  # fmt: skip
        self.ema = ModelEmaV3(idle, decay=settings.ema, use_warmup=True) if settings.ema else None
        self.averaged: IdleModule = self.ema.module if self.ema else idle
        self.best: dict[str, Tensor] | None = None
        self.running: nn.Module | None = None
        self.model: Any = None
        if settings.compile:
            objective.compile()

    def _run(self, student: nn.Module) -> None:
        """Make ready what is run from now on; what is made of it shares its parameters."""
        self.model = None  # two wrappers would both wait for the gradients of the same parameters
        self.running = self.model = student
        if self.world.size > 1:
            self.model = DistributedDataParallel(student, find_unused_parameters=self.objective.leaves_out)
        if self.settings.compile:
            self.model = torch.compile(self.model)  # the student itself, which may be `idle`, stays as it is

    def update(self, batches: Sequence[Any]) -> dict[str, float]:
        """Make one step.

        Args:
            batches: What the objective takes, whose gradients together make the step.

        Returns:
            The losses, averaged over batches and processes, the norm of the gradients, and the learning rate.

        Raises:
            TrainingError: The loss or the gradients are no finite numbers; the weights are as before the step.
            InputError: There are no batches.
        """
        if not batches:
            raise InputError("data: the stream ended before it gave as many images as it said it had")
        student = self.objective.student_of(self.step, self.steps)
        if student is not self.running:
            self._run(student)
        self.schedule.step_update(self.step)
        if self.step < int(self.settings.state_warmup * self.steps):
            for group in self.optimizer.param_groups:
                group["lr"] = 0.0
        self.optimizer.zero_grad()
        names = (*self.objective.losses, "grad_norm")
        sums = torch.zeros(len(self.objective.losses), device=self.world.device)
        with seeded(self.settings.seed, self.step, self.world.rank, device=self.world.device):
            for place, batch in enumerate(batches):
                last = place + 1 == len(batches)
                with nullcontext() if last or self.world.size == 1 else self.model.no_sync():
                    losses = self.objective.parts(self.model, batch, self.step, self.steps)
                    (losses[0] / len(batches)).backward()
                sums += torch.stack(losses).detach()
        norm = nn.utils.clip_grad_norm_(self.parameters, self.settings.clip or torch.inf)
        means = self.world.total(sums / (len(batches) * self.world.size))
        row = dict(zip(names, torch.cat([means, norm.detach()[None]]).tolist(), strict=True))
        self.step += 1
        self._check(row)
        self.optimizer.step()
        if self.ema:
            self.ema.update(self.idle, step=self.step)
        return {"step": self.step, "lr": self.optimizer.param_groups[0]["lr"], **row}

    def _check(self, row: Mapping[str, float]) -> None:
        strange = [name for name, value in row.items() if not abs(value) < torch.inf]
        if strange:
            told = ", ".join(f"{name} {row[name]}" for name in strange)
            raise TrainingError(
                f"finetune: step {self.step} gave {told}, so training stops; the last checkpoint is from before. A "
                "smaller --lr, a --clip, or leaving out --amp usually helps"
            )

    def remember(self) -> None:
        """Take down the averaged weights as the best so far."""
        self.best = {name: value.detach().cpu().clone() for name, value in self.averaged.state_dict().items()}

    def state(self) -> dict[str, Any]:
        """All that a continued run needs; its random numbers follow from seed and step."""
        return {
            "step": self.step,
            "model": self.idle.state_dict(),
            "averaged": self.averaged.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "best": self.best,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        self.step = state["step"]
        self.idle.load_state_dict(state["model"])
        if self.ema:
            self.averaged.load_state_dict(state["averaged"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.best = state.get("best")

    def __enter__(self) -> "Trainer":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Leave the parameters of `idle` trainable as they were, with the best weights that are known.

        Those are the remembered ones, whatever ended the training, or else the averaged ones if all went well.
        """
        self.optimizer.zero_grad()
        for parameter in self.frozen:
            parameter.requires_grad_(True)
        if self.best is not None:
            self.idle.load_state_dict(self.best)
        elif self.ema and error is None:
            self.idle.load_state_dict(self.averaged.state_dict())
