"""`python -m idlefx compare`: one model converted in one or several ways, on the images in a folder."""

import argparse
from contextlib import nullcontext

import torch

from idlefx.cli.exit_codes import REFUSED
from idlefx.cli.ways import Example, Load, converted, plans_of, to_json
from idlefx.reporting.comparison.compare import compare
from idlefx.reporting.comparison.image_batches import find_images
from idlefx.utils.devices import check_dtype, present
from idlefx.utils.files import whole_file


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
    plans = plans_of(options)
    device, dtype = present(options.device), getattr(torch, options.dtype)
    check_dtype(device, dtype)
    find_images(options.data)  # before the model is made
    with whole_file(options.json) if options.json else nullcontext() as partial:
        model = load(options).to(device, dtype)
        idle = converted(model, example_of(options, model), plans)
        found = compare(
            model, idle, options.data, batch_size=options.batch_size, limit=options.limit, logits=options.logits
        )
        print(found)
        if partial:
            partial.write_text(to_json(options.model, plans, found.to_dict()))
    return 0 if len(idle) == len(plans) else REFUSED
