"""Fine-tune a model for idling: `python -m idlefx.finetune`, or `torchrun --nproc-per-node 8 -m idlefx.finetune`.

Without arguments it shows on an embedded data set what idling costs, and what a short training wins back.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from idlefx import checkpoints
from idlefx.arguments import choice_of
from idlefx.batches import Batches
from idlefx.ends import has_features, tap
from idlefx.errors import IdleFxError, InputError
from idlefx.frontend import capture
from idlefx.history import History
from idlefx.metrics import Metrics
from idlefx.models import load_model
from idlefx.module import IdleModule
from idlefx.options import decisive, parse, settings_of, source_of, stored
from idlefx.pipeline import convert, spell, with_cut_loss
from idlefx.processes import World, interrupts, processes
from idlefx.settings import Settings
from idlefx.sources import open_batches
from idlefx.training import Batch, Training

INTERRUPTED = 130  # what shells know an interrupted program by


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns 0, 2 if it was refused, 130 if it was interrupted."""
    try:
        options = parse(arguments)
        with processes(options.device) as world, interrupts(world) as interrupted:
            return _run(options, world, interrupted)
    except IdleFxError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


def _run(options: argparse.Namespace, world: World, interrupted: Callable[[], bool]) -> int:
    settings = settings_of(options)
    torch.manual_seed(settings.seed)  # weights that are not loaded must be the same in every process
    dense = load_model(
        options.model, pretrained=options.pretrained, checkpoint=options.checkpoint, img_size=options.img_size
    ).to(world.device)
    example = torch.randn(options.example_shape, device=world.device) if options.example_shape else None
    idle = convert(
        dense,
        options.layers,
        options.keep if len(options.keep) > 1 else options.keep[0],
        example_inputs=example,
        **choice_of(options),
    )
    train, val = open_batches(
        source_of(options), idle, options.batch_size, seed=settings.seed, workers=options.workers, world=world
    )  # fmt: skip
    directory = options.resume or options.out or Path("runs", time.strftime("%Y-%m-%d-%H%M%S"))
    if world.leads:
        plan = checkpoints.describe(dense, idle, settings, decisive(options, train, val), stored(options))
        checkpoints.start(directory, plan, resume=options.resume is not None)
        print(idle.plan, end="\n\n")
    history = finetune(
        dense, idle, train, val, settings, directory=directory, resume=options.resume is not None,
        example_inputs=example, tensorboard=options.tensorboard, stop=interrupted,
    )  # fmt: skip
    unreadable = [part.name(index) for part in (train, val) for index in part.unreadable]
    if world.leads and unreadable:
        print(f"images that could not be read: {len(unreadable)} ({', '.join(unreadable)})")
    if world.leads and history.finished:
        print(history, f"Weights and metrics are in {directory}", sep="\n\n")
    elif world.leads:
        print(f"interrupted; continue with --resume {directory}", file=sys.stderr)
    return 0 if history.finished else INTERRUPTED


def finetune(
    dense: nn.Module,
    idle: IdleModule,
    train: Batches,
    val: Batches,
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
    student = tap((with_cut_loss(idle) if settings.w_cut else idle).train())
    if settings.w_feat and world.leads and not (has_features(teacher) and has_features(student)):
        print("no linear classifier was found, so w_feat is off")
    training = Training(
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
    metrics = Metrics(
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


def _steps(train: Batches, accumulate: int, done: int, steps: int) -> Iterator[tuple[int, list[Batch], bool]]:
    """For each step still to be made: its epoch, its batches, and whether the model is to be evaluated after it."""
    per_epoch = len(train) // accumulate
    while done < steps:
        epoch, place = divmod(done, per_epoch)
        batches = train.epoch(epoch, place * accumulate)
        for _ in range(min(per_epoch - place, steps - done)):
            done += 1
            yield epoch, list(islice(batches, accumulate)), done % per_epoch == 0 or done == steps


@torch.no_grad()
def evaluate(model: nn.Module, batches: Batches, *, amp: bool = False) -> float:
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


if __name__ == "__main__":
    sys.exit(main())
