"""What `python -m idlefx.finetune` does: convert a model, fine-tune it, and say what that won back."""

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from idlefx.capture.models import load_model
from idlefx.cli.arguments import plan_options, told_to_convert
from idlefx.cli.exit_codes import INTERRUPTED
from idlefx.cli.finetune_options import stored
from idlefx.pipeline import convert
from idlefx.training import checkpoints
from idlefx.training.config import Settings
from idlefx.training.datasets import Source, open_loaders
from idlefx.training.distributed import World, interrupts, processes
from idlefx.training.gain import Gain
from idlefx.training.history import History
from idlefx.training.loader import ImageLoader
from idlefx.training.loop import finetune
from idlefx.training.metric_plot import draw_metrics


def run(options: argparse.Namespace) -> int:
    """Run the command in this process, which may be one of several.

    Returns:
        0, or 130 if the run was interrupted after a step.

    Raises:
        IdleFxError: The run is refused.
    """
    with processes(options.device) as world, interrupts(world) as interrupted:
        return _run(options, world, interrupted)


def _run(options: argparse.Namespace, world: World, interrupted: Callable[[], bool]) -> int:
    settings = Settings(**{each.name: getattr(options, each.name) for each in fields(Settings)})
    plan = plan_options(options)
    torch.manual_seed(settings.seed)  # weights that are not loaded must be the same in every process
    dense = load_model(
        options.model, pretrained=options.pretrained, checkpoint=options.checkpoint, img_size=options.img_size
    ).to(world.device)
    example = torch.randn(options.example_shape, device=world.device) if options.example_shape else None
    idle = convert(dense, example_inputs=example, **told_to_convert(plan))
    source = _source(options)
    train, val = open_loaders(
        source, idle, options.batch_size, seed=settings.seed, workers=options.workers, world=world
    )
    settings = settings.settled(labelled=train.labelled, idle=idle.plan.idle)
    directory = options.resume or options.out or Path("runs", time.strftime("%Y-%m-%d-%H%M%S"))
    if world.leads:
        decisive = _decisive(options.model, source.settled(labelled=train.labelled), train, val)
        facts = checkpoints.plan_of_run(dense, idle, settings, decisive, stored(options))
        checkpoints.start(directory, facts, resume=options.resume is not None)
        print(idle.plan, end="\n\n")
    outcome = finetune(
        dense, idle, train, val, settings, directory=directory, resume=options.resume is not None,
        example_inputs=example, tensorboard=options.tensorboard, stop=interrupted,
    )  # fmt: skip
    unreadable = [part.name(index) for part in (train, val) for index in part.unreadable]
    if world.leads and unreadable:
        print(f"images that could not be read: {len(unreadable)} ({', '.join(unreadable)})")
    if world.leads:
        _tell(outcome, directory)
    return 0 if outcome.finished else INTERRUPTED


def _tell(outcome: History | Gain, directory: Path) -> None:
    """Print what came of it, and draw it."""
    if outcome.finished or isinstance(outcome, Gain):
        print(outcome, end="\n\n")
    if outcome.finished:
        draw_metrics(directory)
        print(f"Weights and metrics are in {directory}")
    else:
        print(f"interrupted; continue with --resume {directory}", file=sys.stderr)


def _source(options: argparse.Namespace) -> Source:
    """Where the options say the data is."""
    return Source(
        options.data, options.data_root, options.train_split, options.val_split, options.augment, options.erase,
        options.val_share, options.val_most,
    )  # fmt: skip


def _decisive(model: str, source: Source, train: ImageLoader, val: ImageLoader) -> dict[str, Any]:
    """What must be the same for a run to go on exactly, besides plan and settings; where the images lie may change."""
    return {
        "model": model, "batch_size": train.batch_size, "augment": source.augment, "erase": source.erase,
        "images": [len(train.dataset), len(val.dataset)], "processes": train.world.size,
    }  # fmt: skip
