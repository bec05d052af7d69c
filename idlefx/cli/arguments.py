"""Arguments that several commands take: which model, and what plan for it."""

import argparse
from collections.abc import Mapping
from dataclasses import MISSING, fields, replace
from typing import Any

from idlefx.cli.parser import CountOrPositions, Numbers, Parser, flag
from idlefx.errors import InputError
from idlefx.options import IDLES, SCHEDULES, SELECTORS, UNITS, PlanOptions
from idlefx.planning.model_plan import ModelPlan, read_plan
from idlefx.utils.versions import VERSION

DTYPES = ("float32", "bfloat16", "float16")

# How each field of PlanOptions is told in a shell; its default is the record's own where it has one.
PLAN: Mapping[str, Mapping[str, Any]] = {
    "layers": {
        "action": Numbers, "metavar": "BLOCK",
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
    "unit": {
        "choices": UNITS,
        "help": "what idles where attention is over windows: whole windows, or tokens in each",
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
    """What share of the tokens works where, and how they are chosen; or a file that says all of it.

    Args:
        parser: Or a group of one.
        **changes: What is different in this command, by field of `PlanOptions`.
    """
    layers = {**PLAN["layers"], **changes.get("layers", {})}
    either = parser.add_mutually_exclusive_group(required=layers.pop("required", True))
    either.add_argument("--layers", **layers)
    either.add_argument(
        "--plan", action=PlanFile, metavar="FILE", help="the plan that `plan --out` wrote, in place of all its options"
    )
    for each in fields(PlanOptions):
        own = {} if each.default is MISSING else {"default": each.default}
        if each.name != "layers":
            parser.add_argument(flag(each.name), **{**own, **PLAN[each.name], **changes.get(each.name, {})})


class PlanFile(argparse.Action):
    """An option that names a file with a plan, and remembers by what to know whether options were told beside it."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, *_: Any) -> None:
        """Keep the path, and what the options of a plan are by default."""
        names = [each.name for each in fields(PlanOptions)]
        defaults = {action.dest: action.default for action in parser._actions if action.dest in names}
        namespace.plan, namespace.plan_defaults = values, defaults


def plan_options(options: argparse.Namespace, **instead: Any) -> PlanOptions:
    """The plan that the arguments of `add_plan` describe; one ratio is for all layers.

    Args:
        options: What was parsed.
        **instead: Values to take in place of those that were parsed.

    Raises:
        InputError: There is a file with a plan, and it cannot be read or options are told beside it.
        PlanError: A value is out of its range.
    """
    if options.plan is not None:
        return _of_file(options, instead)
    told = {each.name: getattr(options, each.name) for each in fields(PlanOptions)} | instead
    if len(told["keep"]) == 1:
        (told["keep"],) = told["keep"]
    return PlanOptions(**told)


def told_to_convert(plan: PlanOptions) -> dict[str, Any]:
    """How `convert` is told a plan: that of a file as a whole, as it knows for which model it was made."""
    return {"plan": plan} if isinstance(plan, ModelPlan) else plan.to_dict()


def _of_file(options: argparse.Namespace, instead: Mapping[str, Any]) -> PlanOptions:
    defaults: Mapping[str, Any] = options.plan_defaults
    beside = [name for name, default in defaults.items() if name != "layers" and getattr(options, name) != default]
    if beside:
        raise InputError(f"plan file: {options.plan} holds all options; leave {' and '.join(map(flag, beside))} out")
    keep = instead.get("keep")
    scalar = {"keep": keep[0]} if isinstance(keep, list) and len(keep) == 1 else {}
    return replace(read_plan(options.plan), **{**instead, **scalar})
