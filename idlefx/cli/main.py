"""The shell: `python -m idlefx inspect | convert | bench | draw | zoo`."""

import argparse
import sys
from collections.abc import Sequence
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
from idlefx.cli.arguments import add_model, add_plan, choice_of
from idlefx.cli.bench import Campaign, add_options
from idlefx.demo.glyphs import Glyphs
from idlefx.deploy.artifacts import check_path
from idlefx.deploy.bundle import check_directory
from idlefx.errors import IdleFxError, InputError
from idlefx.runtime.module import IdleModule, conversion_of
from idlefx.utils.devices import DTYPES
from idlefx.utils.files import whole_file
from idlefx.zoo import survey

SCENES = 5


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns 0 if it succeeded, 1 if `zoo` found a failure, 2 if the command was refused."""
    options = _parser().parse_args(arguments)
    try:
        status: int = options.command(options) or 0
    except IdleFxError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return status


def _inspect(options: argparse.Namespace) -> None:
    model = _model(options)
    print(idlefx.inspect(model, _example(options, model)))


def _convert(options: argparse.Namespace) -> None:
    given = {"device": options.device, "dtype": options.dtype, "batch": options.batch}
    packaged = {key: value for key, value in given.items() if value is not None}
    if packaged and not (options.package or options.emit):
        raise InputError(f"convert: no artifact is written for --{' and --'.join(packaged)}; add --package or --emit")
    if options.package:
        check_path(options.package)
    if options.emit:
        check_directory(options.emit)
    with whole_file(options.save) if options.save else nullcontext() as partial:
        model = _model(options)
        example = _example(options, model)
        idle = _idle(options, model, example)
        print(idle.plan, idlefx.report(idle, options.times), sep="\n\n")
        same = _largest_difference(model, _idle(options, model, example, keep=1.0), example)
        print(f"\nKeeping all tokens gives the dense model's output, largest difference {same:.2g}.")
        if partial:
            safetensors.torch.save_model(idle, str(partial))
    if options.dtype:
        packaged["dtype"] = getattr(torch, options.dtype)
    if options.package:
        print(idlefx.package(idle, options.package, **packaged))
    if options.emit:
        print(idlefx.emit(idle, options.emit, model=options.model, **packaged))


def _bench(options: argparse.Namespace) -> int:
    return Campaign(options, _model, _example).run()


def _draw(options: argparse.Namespace) -> None:
    model = _model(options)
    idle = _idle(options, model, _example(options, model))
    print(idlefx.draw(idle, options.images or _scenes(idle), options.out))


def _scenes(idle: IdleModule) -> list[Image.Image]:
    """What to draw where no photographs are named."""
    side = conversion_of(idle).facts.image_size[-1]
    scenes = Glyphs("test", size=SCENES, image_size=side)
    return [scenes.scene(number).image for number in range(SCENES)]


def _zoo(options: argparse.Namespace) -> int:
    with whole_file(options.markdown) if options.markdown else nullcontext() as partial:
        rows = survey.survey(survey.find(options.only, quick=options.quick))
        print(survey.render(rows))
        if partial:
            partial.write_text(survey.render(rows, "github"))
    return int(any(row.failure for row in rows))


def _model(options: argparse.Namespace, name: str | None = None) -> nn.Module:
    return load_model(
        name or options.model, pretrained=options.pretrained, checkpoint=options.checkpoint, img_size=options.img_size
    )


def _example(options: argparse.Namespace, model: nn.Module) -> Any:
    if options.example_shape is None:
        return guess_inputs(model)[0]
    weight = next(model.parameters())
    return torch.randn(options.example_shape).to(weight.device, weight.dtype)


def _idle(options: argparse.Namespace, model: nn.Module, example: Any, keep: float | None = None) -> IdleModule:
    given = options.keep if len(options.keep) > 1 else options.keep[0]
    return idlefx.convert(
        model,
        options.layers,
        given if keep is None else keep,
        example_inputs=example,
        **choice_of(options),
    )


@torch.inference_mode()
def _largest_difference(model: nn.Module, idle: nn.Module, example: Any) -> float:
    pairs = zip(tree_leaves(call(model, example)), tree_leaves(call(idle, example)), strict=True)
    return max(float((a - b).abs().max()) for a, b in pairs if isinstance(a, Tensor))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m idlefx", description="Vision Transformers whose tokens may idle.")
    commands = parser.add_subparsers(required=True, metavar="inspect | convert | bench | draw | zoo")

    inspect = commands.add_parser("inspect", help="which blocks there are and which can idle")
    add_model(inspect, required=True)
    inspect.set_defaults(command=_inspect)

    convert = commands.add_parser("convert", help="plan and report of a conversion, checked")
    add_model(convert, required=True)
    add_plan(convert, required=True)
    convert.add_argument("--save", metavar="FILE", help="write the weights, safetensors")
    convert.add_argument("--times", metavar="FILE", help="predict times from what `bench --table` wrote")
    convert.add_argument("--package", metavar="FILE", help="write an artifact, .pt2 or .onnx, and print its path")
    convert.add_argument("--emit", metavar="DIR", help="write artifact, weights, plan, report and a fine-tuning script")
    convert.add_argument("--device", help="where the artifact is to run, if not where the model is")
    convert.add_argument("--dtype", choices=DTYPES, help="number type of the artifact, if not the model's")
    convert.add_argument("--batch", type=int, nargs=2, metavar=("MIN", "MAX"), help="images of a call; 1 to 1024")
    convert.set_defaults(command=_convert)

    timing = commands.add_parser("bench", help="time dense against idling")
    add_options(timing)
    timing.set_defaults(command=_bench)

    draw = commands.add_parser("draw", help="picture of working and idle patches")
    add_model(draw, required=True)
    add_plan(draw, required=True)
    draw.add_argument(
        "images", nargs="*", metavar="IMAGE", help="photographs, named before the options; drawn scenes if none"
    )
    draw.add_argument("--out", required=True, metavar="FILE", help="a png, pdf or svg")
    draw.set_defaults(command=_draw)

    table = commands.add_parser("zoo", help="the compatibility table: small models of every library, each checked")
    table.add_argument("--only", default="", metavar="PATTERN", help="models or families that match")
    table.add_argument("--quick", action="store_true", help="one model for each way of building them")
    table.add_argument("--markdown", metavar="FILE", help="write the table as Markdown too")
    table.set_defaults(command=_zoo)
    return parser


if __name__ == "__main__":
    sys.exit(main())
