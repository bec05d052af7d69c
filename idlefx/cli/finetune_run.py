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
from idlefx.cli.arguments import plan_options
from idlefx.cli.exit_codes import INTERRUPTED
from idlefx.cli.finetune_options import stored
from idlefx.pipeline import convert
from idlefx.training import checkpoints
from idlefx.training.config import Settings
from idlefx.training.datasets import Source, open_loaders
from idlefx.training.distributed import World, interrupts, processes
from idlefx.training.loader import ImageLoader
from idlefx.training.loop import finetune

DECISIVE = ("model", "batch_size", "augment", "erase")


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
    idle = convert(dense, example_inputs=example, **plan.to_dict())
    train, val = open_loaders(
        _source(options), idle, options.batch_size, seed=settings.seed, workers=options.workers, world=world
    )
    directory = options.resume or options.out or Path("runs", time.strftime("%Y-%m-%d-%H%M%S"))
    if world.leads:
        facts = checkpoints.plan_of_run(dense, idle, settings, _decisive(options, train, val), stored(options))
        checkpoints.start(directory, facts, resume=options.resume is not None)
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


def _source(options: argparse.Namespace) -> Source:
    """Where the options say the data is."""
    return Source(
        options.data, options.data_root, options.train_split, options.val_split, options.augment, options.erase
    )


def _decisive(options: argparse.Namespace, train: ImageLoader, val: ImageLoader) -> dict[str, Any]:
    """What must be the same for a run to go on exactly, besides plan and settings; where the images lie may change."""
    facts = {name: getattr(options, name) for name in DECISIVE}
    return {**facts, "images": [len(train.dataset), len(val.dataset)], "processes": train.world.size}
