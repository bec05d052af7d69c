"""One model converted in one or several ways, as `--idle rest follow` or a plan file says."""

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from datetime import date
from typing import Any

from torch import nn

from idlefx.cli.arguments import plan_options, told_to_convert
from idlefx.errors import IdleFxError
from idlefx.options import PlanOptions
from idlefx.pipeline import convert
from idlefx.runtime.module import IdleModule
from idlefx.utils.versions import versions

Load = Callable[[argparse.Namespace], nn.Module]
Example = Callable[[argparse.Namespace, nn.Module], Any]


def plans_of(options: argparse.Namespace) -> dict[str, PlanOptions]:
    """The plans that are asked for, by what idle tokens do."""
    if options.plan is not None:
        plan = plan_options(options)
        return {plan.idle: plan}
    return {word: plan_options(options, idle=word) for word in options.idle}


def converted(model: nn.Module, example: Any, plans: Mapping[str, PlanOptions]) -> dict[str, IdleModule]:
    """The model converted in each way; one of several that is refused is named on standard error and left out.

    Raises:
        IdleFxError: All of them were refused.
    """
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


def to_json(model: str, plans: Mapping[str, PlanOptions], found: Mapping[str, Any]) -> str:
    """The figures, when and with what they were taken, and of which plans."""
    asked = {"model": model, "plans": {name: plan.to_dict() for name, plan in plans.items()}}
    return json.dumps({"measured": date.today().isoformat(), "versions": versions("timm"), **asked, **found}, indent=1)
