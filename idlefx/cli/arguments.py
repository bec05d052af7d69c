"""Arguments that several commands take: which model, and what plan for it."""

import argparse
from typing import Any


def add_weights(parser: Any) -> None:
    """How a model is loaded."""
    parser.add_argument("--pretrained", action="store_true", help="fetch timm's weights")
    parser.add_argument("--checkpoint", metavar="FILE", help="weights to load, safetensors")
    parser.add_argument("--img-size", type=int, metavar="PIXELS", help="side of the images, if not the model's own")
    parser.add_argument("--example-shape", type=_shape, metavar="2,3,224,224", help="shape of an input, if not known")


def add_model(parser: Any, *, required: bool) -> None:
    """Which model, and how it is loaded."""
    parser.add_argument("--model", required=required, help="a timm name, or package.module:callable")
    add_weights(parser)


def add_choice(parser: Any) -> None:
    """How tokens are chosen, whatever share of them works where."""
    parser.add_argument("--schedule", default="stages", help="stages (default), or blocks: only the listed blocks idle")
    parser.add_argument("--selector", default="auto", help="the token score")
    parser.add_argument("--multiple-of", type=int, default=1, help="raise tokens that work to a multiple, such as 8")
    parser.add_argument("--prefix", type=int, nargs="*", help="positions of the tokens that always work, if not found")
    add_switch(parser, "reselect", True, "let idle tokens be chosen again in later blocks")


def add_plan(parser: Any, *, required: bool) -> None:
    """What share of the tokens works where, and how they are chosen."""
    parser.add_argument("--layers", type=int, nargs="+", required=required, help="blocks that open a stage, from 0")
    parser.add_argument(
        "--keep", type=float, nargs="+", default=[0.7], help="share of tokens that work: one, or one per layer"
    )
    add_choice(parser)


def choice_of(options: argparse.Namespace) -> dict[str, Any]:
    """What `add_choice` adds, as `convert` takes it."""
    return {name: getattr(options, name) for name in ("schedule", "selector", "multiple_of", "prefix", "reselect")}


def add_switch(parser: Any, name: str, default: bool, text: str) -> None:
    """An option that is on or off."""
    parser.add_argument(flag(name), action=argparse.BooleanOptionalAction, default=default, help=text)


def flag(name: str) -> str:
    """How an option is spelled in a shell."""
    return "--" + name.replace("_", "-")


def _shape(text: str) -> tuple[int, ...]:
    return tuple(int(size) for size in text.split(","))
