"""The commands of `python -m idlefx`, once their arguments are parsed."""

import argparse
import json
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import safetensors.torch
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import idlefx
from idlefx.capture.inputs import call, guess_inputs
from idlefx.capture.models import load_model
from idlefx.cli.arguments import plan_options, told_to_convert
from idlefx.cli.bench import Campaign
from idlefx.cli.compare import compare_models
from idlefx.cli.evaluate import evaluate_models
from idlefx.cli.exit_codes import FAILED, INTERRUPTED
from idlefx.demo.glyphs import Glyphs
from idlefx.deploy.artifacts import check_path
from idlefx.deploy.bundle import check_directory
from idlefx.errors import InputError
from idlefx.options import PlanOptions
from idlefx.reporting.comparison.image_batches import find_images
from idlefx.runtime.module import IdleModule, conversion_of
from idlefx.utils.devices import check_dtype, present
from idlefx.utils.files import whole_file
from idlefx.zoo import survey, table

SCENES = 5


def inspect(options: argparse.Namespace) -> None:
    """Print the table of blocks."""
    model = _model(options)
    print(idlefx.inspect(model, _example(options, model)))


def convert(options: argparse.Namespace) -> None:
    """Print plan and report, check that keeping all tokens changes nothing, and write what is asked for."""
    asked, artifact = plan_options(options), _artifact_options(options)
    if options.package:
        check_path(options.package, options.int8)
    if options.emit:
        check_directory(options.emit)
    with whole_file(options.out) if options.out else nullcontext() as partial:
        model = _model(options)
        example = _example(options, model)
        idle = _idle(model, example, asked)
        print(idle.plan, idlefx.report(idle, options.times), sep="\n\n")
        same = _largest_difference(model, _idle(model, example, plan_options(options, keep=[1.0])), example)
        print(f"\nKeeping all tokens gives the dense model's output, largest difference {same:.2g}.")
        if partial:
            header = {"plan": json.dumps(asked.to_dict())}
            safetensors.torch.save_model(idle, str(partial), metadata=header)
    if options.out:
        print(f"{options.out}: the model's own weights, which a conversion does not change; its header holds the plan")
    if options.package:
        print(idlefx.package(idle, options.package, int8=options.int8, **artifact))
    if options.emit:
        print(idlefx.emit(idle, options.emit, model=options.model, **artifact))


def plan(options: argparse.Namespace) -> int:
    """Choose a plan for a budget, print what it costs and changes, and write it; 130 if the search was interrupted."""
    device, dtype = present(options.device), getattr(torch, options.dtype)
    check_dtype(device, dtype)
    find_images(options.data)  # before the model is made
    model = _model(options).to(device, dtype)
    names = (
        "speedup", "gmacs", "ms", "max_change", "idle", "by", "times", "selector", "multiple_of", "prefix",
        "batch_size", "limit", "trials", "out", "resume", "plot",
    )  # fmt: skip
    told = {name: getattr(options, name) for name in names}
    found = idlefx.plan(model, options.data, example_inputs=_example(options, model), **told)
    print(found)
    for path in filter(None, (options.out, options.plot)):
        print(path)
    return INTERRUPTED if found.findings.interrupted else 0


def compare(options: argparse.Namespace) -> int:
    """Print what conversions change on the images in a folder."""
    return compare_models(options, _model, _example)


def evaluate(options: argparse.Namespace) -> int:
    """Print how often dense and converted models are right on labelled pictures."""
    return evaluate_models(options, _model, _example)


def bench(options: argparse.Namespace) -> int:
    """Time dense and idling models."""
    return Campaign(options, _model, _example).run()


def draw(options: argparse.Namespace) -> None:
    """Write a picture of working and idle patches, and print its path."""
    asked, model = plan_options(options), _model(options)
    idle = _idle(model, _example(options, model), asked)
    print(idlefx.draw(idle, options.images or _scenes(idle), options.out))


def zoo(options: argparse.Namespace) -> int:
    """Check the models of the compatibility table and print it; 1 if one of them fails."""
    with whole_file(options.markdown) if options.markdown else nullcontext() as partial:
        rows = survey.survey(survey.find(options.only, quick=options.quick))
        print(table.render(rows))
        if partial:
            partial.write_text(table.render(rows, "github"))
    return FAILED if any(row.failure for row in rows) else 0


COMMANDS: Mapping[str, Callable[[argparse.Namespace], int | None]] = {
    "inspect": inspect, "plan": plan, "convert": convert, "compare": compare, "evaluate": evaluate,
    "draw": draw, "bench": bench, "zoo": zoo,
}  # fmt: skip


def _artifact_options(options: argparse.Namespace) -> dict[str, Any]:
    """What is said of the artifact, as `package` takes it.

    Raises:
        InputError: Something is, but no such artifact is written.
    """
    told = {"--device": options.device, "--dtype": options.dtype, "--batch-size": options.batch_size}
    needless = [name for name, value in told.items() if value is not None]
    if needless and not (options.package or options.emit):
        raise InputError(f"convert: no artifact is written for {' and '.join(needless)}; add --package or --emit")
    if options.int8 and not options.package:
        raise InputError("convert: --int8 is of an ONNX file; add --package model.onnx")
    dtype = options.dtype and getattr(torch, options.dtype)
    values = {"device": options.device, "dtype": dtype, "batch": options.batch_size}
    return {name: value for name, value in values.items() if value is not None}


def _scenes(idle: IdleModule) -> list[Image.Image]:
    """What to draw where no photographs are named."""
    side = conversion_of(idle).facts.image_size[-1]
    scenes = Glyphs("test", size=SCENES, image_size=side)
    return [scenes.scene(number).image for number in range(SCENES)]


def _model(options: argparse.Namespace, name: str | None = None) -> nn.Module:
    return load_model(
        name or options.model, pretrained=options.pretrained, checkpoint=options.checkpoint, img_size=options.img_size
    )


def _example(options: argparse.Namespace, model: nn.Module) -> Any:
    if options.example_shape is None:
        return guess_inputs(model)[0]
    weight = next(model.parameters())
    return torch.randn(options.example_shape).to(weight.device, weight.dtype)


def _idle(model: nn.Module, example: Any, plan: PlanOptions) -> IdleModule:
    return idlefx.convert(model, example_inputs=example, **told_to_convert(plan))


@torch.inference_mode()
def _largest_difference(model: nn.Module, idle: nn.Module, example: Any) -> float:
    pairs = zip(tree_leaves(call(model, example)), tree_leaves(call(idle, example)), strict=True)
    return max(float((a - b).abs().max()) for a, b in pairs if isinstance(a, Tensor))
