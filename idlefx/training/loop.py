"""Fine-tune a model for idling: `python -m idlefx.finetune`, or `torchrun --nproc-per-node 8 -m idlefx.finetune`.

Without arguments it shows on an embedded data set what idling costs, and what a short training wins back.
"""

import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from idlefx.capture.export import capture
from idlefx.errors import InputError
from idlefx.pipeline import spell, with_cut_loss
from idlefx.runtime.module import IdleModule, conversion_of
from idlefx.training import checkpoints
from idlefx.training.config import Settings
from idlefx.training.feature_taps import has_features, tap
from idlefx.training.history import History
from idlefx.training.loader import ImageLoader
from idlefx.training.metric_log import MetricLog
from idlefx.training.trainer import Batch, Trainer


def finetune(
    dense: nn.Module,
    idle: IdleModule,
    train: ImageLoader,
    val: ImageLoader,
    settings: Settings | None = None,
    *,
    directory: Path | None = None,
    resume: bool = False,
    example_inputs: Any = None,
    tensorboard: bool = False,
    stop: Callable[[], bool] = lambda: False,
) -> History:
    """Train a converted model in place, with the dense model as its teacher.

    Args:
        dense: The model as it was; it stays as it is, so convert a copy.
        idle: What `convert` made of it; it comes back in eval mode, with the averaged weights.
        train: Training batches; their processes train together.
        val: Validation batches.
        settings: How to train; by default as published.
        directory: Where checkpoints and metrics go; None for nowhere.
        resume: Whether to continue exactly from the last checkpoint there.
        example_inputs: As for `convert`.
        tensorboard: Whether to write for TensorBoard too.
        stop: Asked after each step; if it says so, a checkpoint is written and the run ends unfinished.

    Returns:
        Accuracy of dense, idle before and idle after, and the losses of every step.

    Raises:
        InputError: The model is no classifier, the data does not fit it, or a file cannot be written.
        TrainingError: The loss is no finite number.
    """
    settings, world = settings or Settings(), train.world
    per_epoch = len(train) // settings.accumulate
    if not per_epoch:
        raise InputError(f"settings: accumulate is {settings.accumulate}, but an epoch has {len(train)} batches only")
    steps = settings.steps or settings.epochs * per_epoch
    if {*map(id, dense.parameters())} & {*map(id, idle.parameters())}:
        raise InputError("finetune: the model shares its weights with its teacher; convert it with copy=True")

    teacher = tap(spell(capture(dense, example_inputs, copy_model=False).eval_graph))
    rests = conversion_of(idle).plan.idle == "rest"
    if settings.w_cut and not rests and train.world.leads:
        print("there is no token cut loss of tokens that follow, so w_cut is off")
    student = tap((with_cut_loss(idle) if settings.w_cut and rests else idle).train())
    if settings.w_feat and world.leads and not (has_features(teacher) and has_features(student)):
        print("no linear classifier was found, so w_feat is off")
    training = Trainer(
        idle.eval(), student, teacher, settings, steps=steps, batch_size=train.batch_size, world=world
    )  # fmt: skip
    averaged, history = tap(training.averaged), History.of(idle)
    if resume:
        assert directory is not None
        state = checkpoints.load(directory)
        training.restore(state["training"])
        history.restore(state["history"])
    else:
        history.dense, history.untuned = (evaluate(model, val, amp=settings.amp) for model in (teacher, averaged))

    writes = directory if world.leads else None
    metrics = MetricLog(
        writes, done=training.step, steps=steps, images=training.images, show=world.leads, tensorboard=tensorboard
    )  # fmt: skip
    with metrics, training:
        before = time.perf_counter()
        for epoch, batches, due in _steps(train, settings.accumulate, training.step, steps):
            row: dict[str, Any] = {"epoch": epoch, **training.update(batches)}
            row["images_per_s"] = training.images / (time.perf_counter() - before)
            best = False
            if due:
                train.agree()
                row["top1"] = evaluate(averaged, val, amp=settings.amp)
                best = history.note(row["top1"], training.step)
            stopped = world.any(stop())
            history.rows.append(row)
            metrics.write(row)
            if writes and (due or stopped):
                state = {"training": training.state(), "history": history.state()}
                told = {"step": training.step, "top1": row.get("top1", "")}
                checkpoints.save(writes, state, training.averaged, told, best=best)
            if stopped:
                break
            before = time.perf_counter()
    history.finished = training.step == steps
    return history


def _steps(train: ImageLoader, accumulate: int, done: int, steps: int) -> Iterator[tuple[int, list[Batch], bool]]:
    """For each step still to be made: its epoch, its batches, and whether the model is to be evaluated after it."""
    per_epoch = len(train) // accumulate
    while done < steps:
        epoch, place = divmod(done, per_epoch)
        batches = train.epoch(epoch, place * accumulate)
        for _ in range(min(per_epoch - place, steps - done)):
            done += 1
            yield epoch, list(islice(batches, accumulate)), done % per_epoch == 0 or done == steps


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
