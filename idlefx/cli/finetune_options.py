"""The options of `python -m idlefx.finetune`."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

from idlefx.cli.arguments import add_model, add_plan, add_version, plan_options
from idlefx.cli.parser import Parser, add_switch, flag
from idlefx.training.config import GLYPHS, TRAINED, Settings

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
    elif options.model is None or (options.layers is None and options.plan is None):
        parser.error("--data needs --model and --layers or --plan")
    return parser.parse_args(arguments)


def stored(options: argparse.Namespace) -> dict[str, Any]:
    """The options as a resumed run needs them."""
    left_out = ("resume", "out", "plan", "plan_defaults")
    told = {key: value for key, value in vars(options).items() if key not in left_out}
    if options.plan is not None:
        plan = plan_options(options).to_dict()
        told |= plan | {"keep": plan["keep"] if isinstance(plan["keep"], list) else [plan["keep"]]}
    return told


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m idlefx.finetune",
        description="Fine-tune a model for idling, on pictures with labels or without; without arguments a small one "
        "on an embedded data set, with settings of its own.",
    )
    add_version(parser)
    add_model(parser.add_argument_group("model"), required=False)
    add_plan(parser.add_argument_group("plan"), layers={"required": False})

    data = parser.add_argument_group("data")
    data.add_argument(
        "--data", default=GLYPHS, metavar="PATH",
        help="a folder with pictures in any arrangement, or a data set as timm names it: hfds/…, wds/…",
    )  # fmt: skip
    data.add_argument("--data-root", metavar="PATH", help="where a named data set lies or is cached")
    data.add_argument("--train-split", default="train", help="the folder or split to train on")
    data.add_argument("--val-split", default="validation", help="the folder or split to evaluate on")
    data.add_argument(
        "--val-share", type=float, default=0.1, metavar="SHARE",
        help="share of the pictures that is held out where there is no folder for that",
    )  # fmt: skip
    data.add_argument(
        "--val-most",
        type=int,
        default=128,
        metavar="NUMBER",
        help="pictures held out there at the most, without labels",
    )
    data.add_argument(
        "--augment", help="timm's policy, crop, or none (default: rand-m9-mstd0.5-inc1 with labels, crop without)"
    )
    data.add_argument(
        "--erase", type=float, metavar="SHARE",
        help="share of the images of which a part is erased (default: 0.25 with labels, 0 without)",
    )  # fmt: skip
    data.add_argument(
        "--batch-size", type=int, metavar="NUMBER",
        help="images in a batch of one process (default: 64 with labels, 16 without)",
    )  # fmt: skip
    data.add_argument("--workers", type=int, default=4, help="processes that read images, for each that trains")

    training = parser.add_argument_group("training")
    for each in fields(Settings):
        _setting(training, each)

    run = parser.add_argument_group("run")
    run.add_argument("--out", type=Path, metavar="DIR", help="where the files go; by default a new one in runs/")
    run.add_argument("--resume", type=Path, metavar="DIR", help="continue the run there as if it had not ended")
    run.add_argument("--device", help="cpu or cuda; a GPU by default, if there is one")
    add_switch(run, "tensorboard", False, "write for TensorBoard too")
    return parser


def _setting(group: Any, setting: Field[Any]) -> None:
    name, default, text = setting.name, setting.default, setting.metadata["help"]
    kind: Any = setting.type if default is None else type(default)
    if default is MISSING:
        group.add_argument(
            flag(name), action=Named, type=NAMED[name], default={}, nargs="+", metavar="NAME=…", help=text
        )
    elif isinstance(default, bool):
        add_switch(group, name, default, text)
    elif kind is str:
        group.add_argument(flag(name), choices=TRAINED, default=default, help=text)
    else:
        group.add_argument(flag(name), type=kind, default=default, metavar="NUMBER", help=text)


class Named(argparse.Action):
    """An option that takes `NAME=VALUE`, once or several times, and collects them."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, *_: Any) -> None:
        """Add what was named to what was named before."""
        setattr(namespace, self.dest, {**getattr(namespace, self.dest), **dict(values)})


def _pair(kind: Callable[[str], Any]) -> Callable[[str], tuple[str, Any]]:
    def read(text: str) -> tuple[str, Any]:
        name, equals, value = text.rpartition("=")
        try:
            if not name or not equals:
                raise ValueError
            return name, kind(value)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME=VALUE") from None

    return read


NAMED: Mapping[str, Callable[[str], tuple[str, Any]]] = {"distance": _pair(str), "weight": _pair(float)}
