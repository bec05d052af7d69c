"""`python -m idlefx compare`: one model converted in one or several ways, on the images in a folder."""

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from datetime import date
from typing import Any

import torch
from torch import nn

from idlefx.cli.arguments import plan_options, told_to_convert
from idlefx.cli.exit_codes import REFUSED
from idlefx.errors import IdleFxError
from idlefx.options import PlanOptions
from idlefx.pipeline import convert
from idlefx.reporting.comparison.compare import compare
from idlefx.reporting.comparison.image_batches import find_images
from idlefx.reporting.comparison.record import Comparison
from idlefx.runtime.module import IdleModule
from idlefx.utils.devices import check_dtype, present
from idlefx.utils.files import whole_file
from idlefx.utils.versions import versions

Load = Callable[[argparse.Namespace], nn.Module]
Example = Callable[[argparse.Namespace, nn.Module], Any]


def compare_models(options: argparse.Namespace, load: Load, example_of: Example) -> int:
    """Convert, compare, print and write.

    Args:
        options: Of the command line.
        load: Makes the model.
        example_of: Makes its example inputs.

    Returns:
        0, or 2 if one of several ways of idling was refused; it is named, and the rest is compared.

    Raises:
        IdleFxError: The only way was refused, or the images cannot be compared on.
    """
    plans = _plans(options)
    device, dtype = present(options.device), getattr(torch, options.dtype)
    check_dtype(device, dtype)
    find_images(options.data)  # before the model is made
    with whole_file(options.json) if options.json else nullcontext() as partial:
        model = load(options).to(device, dtype)
        idle = _converted(model, example_of(options, model), plans)
        found = compare(
            model, idle, options.data, batch_size=options.batch_size, limit=options.limit, logits=options.logits
        )
        print(found)
        if partial:
            partial.write_text(_to_json(options.model, plans, found))
    return 0 if len(idle) == len(plans) else REFUSED


def _plans(options: argparse.Namespace) -> dict[str, PlanOptions]:
    """By what idle tokens do."""
    if options.plan is not None:
        plan = plan_options(options)
        return {plan.idle: plan}
    return {word: plan_options(options, idle=word) for word in options.idle}


def _converted(model: nn.Module, example: Any, plans: Mapping[str, PlanOptions]) -> dict[str, IdleModule]:
    idle, refused = dict[str, IdleModule](), dict[str, IdleFxError]()
    for name, plan in plans.items():
        try:
            idle[name] = convert(model, example_inputs=example, **told_to_convert(plan))
        except IdleFxError as error:
            refused[name] = error
    if not idle:
        raise next(iter(refused.values()))
    for name, refusal in refused.items():
        print(f"error: {name}: {refusal}", file=sys.stderr)
    return idle


def _to_json(model: str, plans: Mapping[str, PlanOptions], found: Comparison) -> str:
    """The figures, when and with what they were taken, and of which plans."""
    asked = {"model": model, "plans": {name: plan.to_dict() for name, plan in plans.items()}}
    return json.dumps(
        {"measured": date.today().isoformat(), "versions": versions("timm"), **asked, **found.to_dict()}, indent=1
    )
