"""`python -m idlefx.finetune`: convert a model, fine-tune it, and say what that won back."""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from idlefx.capture.models import load_model
from idlefx.cli.arguments import choice_of
from idlefx.cli.finetune_options import decisive, parse, settings_of, source_of, stored
from idlefx.errors import IdleFxError
from idlefx.pipeline import convert
from idlefx.training import checkpoints
from idlefx.training.datasets import open_loaders
from idlefx.training.distributed import World, interrupts, processes
from idlefx.training.loop import finetune

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
    train, val = open_loaders(
        source_of(options), idle, options.batch_size, seed=settings.seed, workers=options.workers, world=world
    )  # fmt: skip
    directory = options.resume or options.out or Path("runs", time.strftime("%Y-%m-%d-%H%M%S"))
    if world.leads:
        plan = checkpoints.plan_of_run(dense, idle, settings, decisive(options, train, val), stored(options))
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
