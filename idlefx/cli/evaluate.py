"""`python -m idlefx evaluate`: top-1 of a classifier before and after conversion, on labelled pictures."""

import argparse
from contextlib import nullcontext

import torch

from idlefx.cli.exit_codes import REFUSED
from idlefx.cli.ways import Example, Load, converted, plans_of, to_json
from idlefx.training.evaluation import evaluate
from idlefx.utils.devices import check_dtype, present
from idlefx.utils.files import whole_file


def evaluate_models(options: argparse.Namespace, load: Load, example_of: Example) -> int:
    """Convert, evaluate, print and write.

    Args:
        options: Of the command line.
        load: Makes the model.
        example_of: Makes its example inputs.

    Returns:
        0, or 2 if one of several ways of idling was refused; it is named, and the rest is evaluated.

    Raises:
        IdleFxError: The only way was refused, or there are no such pictures or classes.
    """
    plans = plans_of(options)
    device, dtype = present(options.device), getattr(torch, options.dtype)
    check_dtype(device, dtype)
    with whole_file(options.json) if options.json else nullcontext() as partial:
        model = load(options).to(device, dtype)
        idle = converted(model, example_of(options, model), plans)
        found = evaluate(
            model, idle, options.data, batch_size=options.batch_size, limit=options.limit, split=options.val_split,
            root=options.data_root, workers=options.workers,
        )  # fmt: skip
        print(found)
        if partial:
            partial.write_text(to_json(options.model, plans, found.to_dict()))
    return 0 if len(idle) == len(plans) else REFUSED
