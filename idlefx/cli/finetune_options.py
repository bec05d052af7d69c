"""The options of `python -m idlefx.finetune`."""

import argparse
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from idlefx.cli.arguments import add_model, add_plan, add_version
from idlefx.cli.parser import Parser, add_switch, flag
from idlefx.training.config import GLYPHS, Settings

# The embedded example, as examples/study.py found it best: every scene is seen once, so nothing can be overfitted and
# no augmentation is needed; and so few steps do not suffice for attention to follow the token cut loss.
EXAMPLE = {
    "model": "idlefx.models:glyph_vit", "layers": [2, 4, 6], "keep": [0.5], "augment": "none", "erase": 0.0,
    "epochs": 1, "batch_size": 128, "lr": 2e-4, "w_cut": 0.0, "mixup": 0.0, "cutmix": 0.0, "smoothing": 0.0,
    "ema": 0.0, "workers": 0,
}  # fmt: skip


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Options from the command line; those that a resumed run or the embedded example decides are defaults.

    Raises:
        InputError: The run to be resumed is not there.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.resume is not None:
        from idlefx.training.checkpoints import read_plan

        parser.set_defaults(**read_plan(options.resume)["options"], resume=options.resume)
    elif options.data == GLYPHS:
        parser.set_defaults(**EXAMPLE)
    elif options.model is None or options.layers is None:
        parser.error("--data needs --model and --layers")
    return parser.parse_args(arguments)


def stored(options: argparse.Namespace) -> dict[str, Any]:
    """The options as a resumed run needs them."""
    left_out = ("resume", "out")
    return {key: value for key, value in vars(options).items() if key not in left_out}


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m idlefx.finetune",
        description="Fine-tune a model for idling; without arguments a small one on an embedded data set, with "
        "settings of its own.",
    )
    add_version(parser)
    add_model(parser.add_argument_group("model"), required=False)
    add_plan(parser.add_argument_group("plan"), layers={"required": False})

    data = parser.add_argument_group("data")
    data.add_argument(
        "--data", default=GLYPHS, metavar="PATH", help="a folder, or a data set as timm names it: hfds/…, wds/…"
    )
    data.add_argument("--data-root", metavar="PATH", help="where a named data set lies or is cached")
    data.add_argument("--train-split", default="train", help="the folder or split to train on")
    data.add_argument("--val-split", default="validation", help="the folder or split to evaluate on")
    data.add_argument("--augment", default="rand-m9-mstd0.5-inc1", help="timm's policy, or none")
    data.add_argument("--erase", type=float, default=0.25, help="share of the images of which a part is erased")
    data.add_argument("--batch-size", type=int, default=64, help="images in a batch of one process")
    data.add_argument("--workers", type=int, default=4, help="processes that read images, for each that trains")

    training = parser.add_argument_group("training")
    for each in fields(Settings):
        _setting(training, each.name, each.default, each.metadata["help"])

    run = parser.add_argument_group("run")
    run.add_argument("--out", type=Path, metavar="DIR", help="where the files go; by default a new one in runs/")
    run.add_argument("--resume", type=Path, metavar="DIR", help="continue the run there as if it had not ended")
    run.add_argument("--device", help="cpu or cuda; a GPU by default, if there is one")
    add_switch(run, "tensorboard", False, "write for TensorBoard too")
    return parser


def _setting(group: Any, name: str, default: Any, text: str) -> None:
    if isinstance(default, bool):
        add_switch(group, name, default, text)
    else:
        group.add_argument(flag(name), type=type(default), default=default, metavar="NUMBER", help=text)
