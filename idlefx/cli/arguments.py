"""Arguments that several commands take: which model, and what plan for it."""

import argparse
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

from idlefx.cli.parser import CountOrPositions, Numbers, Parser, flag
from idlefx.options import IDLES, SCHEDULES, SELECTORS, PlanOptions
from idlefx.utils.versions import VERSION

DTYPES = ("float32", "bfloat16", "float16")

# How each field of PlanOptions is told in a shell; its default is the record's own where it has one.
PLAN: Mapping[str, Mapping[str, Any]] = {
    "layers": {
        "action": Numbers, "required": True, "metavar": "BLOCK",
        "help": "blocks that open a stage, from 0: 3 6 9 or 3,6,9",
    },
    "keep": {
        "action": Numbers, "kind": float, "default": [0.7], "metavar": "RATIO",
        "help": "share of the image tokens that work: one, or one per layer",
    },
    "schedule": {
        "choices": SCHEDULES,
        "help": "stages: a listed block opens a stage that runs to the next; blocks: only the listed blocks idle",
    },
    "selector": {
        "metavar": "NAME",
        "help": f"the token score: {', '.join(SELECTORS)}, or one that the module of the model registers",
    },
    "reselect": {
        "action": argparse.BooleanOptionalAction,
        "help": "let idle tokens be chosen again in later blocks, or where they follow, be grouped anew",
    },
    "multiple_of": {
        "type": int, "metavar": "NUMBER",
        "help": "raise the number of tokens that work to a multiple, such as 8",
    },
    "prefix": {
        "action": CountOrPositions, "nargs": "*", "metavar": "NUMBER",
        "help": "tokens that always work, if they are not found: 2 for the first two, a list such as 0,2 (or 2,) for "
        "those at these positions, nothing for none",
    },
    "idle": {
        "choices": IDLES,
        "help": "what idle tokens do: rest, unchanged (wants fine-tuning), or follow the worker most like them",
    },
}  # fmt: skip


def add_version(parser: Parser) -> None:
    """`--version`."""
    parser.add_argument("--version", action="version", version=f"idlefx {VERSION}")


def add_weights(parser: Any) -> None:
    """How a model is loaded."""
    parser.add_argument("--pretrained", action="store_true", help="fetch timm's weights")
    parser.add_argument("--checkpoint", metavar="FILE", help="weights to load, safetensors")
    parser.add_argument("--img-size", type=int, metavar="PIXELS", help="side of the images, if not the model's own")
    parser.add_argument(
        "--example-shape", action=Numbers, metavar="SIZE", help="shape of an input, if not known: 2 3 224 224"
    )


def add_model(parser: Any, *, required: bool) -> None:
    """Which model, and how it is loaded."""
    parser.add_argument("--model", required=required, help="a timm name, or package.module:callable")
    add_weights(parser)


def add_plan(parser: Any, **changes: Mapping[str, Any]) -> None:
    """What share of the tokens works where, and how they are chosen.

    Args:
        parser: Or a group of one.
        **changes: What is different in this command, by field of `PlanOptions`.
    """
    for each in fields(PlanOptions):
        own = {} if each.default is MISSING else {"default": each.default}
        parser.add_argument(flag(each.name), **{**own, **PLAN[each.name], **changes.get(each.name, {})})


def plan_options(options: argparse.Namespace, **instead: Any) -> PlanOptions:
    """The plan that the arguments of `add_plan` describe; one ratio is for all layers.

    Args:
        options: What was parsed.
        **instead: Values to take in place of those that were parsed.

    Raises:
        PlanError: A value is out of its range.
    """
    told = {each.name: getattr(options, each.name) for each in fields(PlanOptions)} | instead
    if len(told["keep"]) == 1:
        (told["keep"],) = told["keep"]
    return PlanOptions(**told)
