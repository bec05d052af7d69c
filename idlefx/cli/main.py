"""The shell: `python -m idlefx inspect | plan | convert | compare | evaluate | draw | bench | zoo | finetune`.

What a command needs is imported when it runs, so that help and errors of the arguments are there at once.
"""

import argparse
import sys
from collections.abc import Sequence

from idlefx.cli import finetune
from idlefx.cli.arguments import DTYPES, add_model, add_plan, add_version
from idlefx.cli.bench_options import add_options
from idlefx.cli.comparing_options import add_comparing_options, add_evaluating_options
from idlefx.cli.exit_codes import exit_code_of
from idlefx.cli.parser import Numbers, Parser, add_renamed
from idlefx.cli.planning_options import add_options as add_planning_options

FINETUNE = "finetune"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0 if it succeeded, 1 if `zoo` found a failure, 2 if the command was refused, 130 if it was interrupted.

    Raises:
        SystemExit: Help or version were asked for, with 0; or the arguments are wrong, with 2.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == [FINETUNE]:
        return finetune.main(words[1:])
    options = _parser().parse_args(words)
    return exit_code_of(lambda: _run(options))


def _run(options: argparse.Namespace) -> int:
    from idlefx.cli.commands import COMMANDS

    return COMMANDS[options.command](options) or 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m idlefx", description="Vision Transformers whose tokens may idle.")
    add_version(parser)
    commands = parser.add_subparsers(required=True, dest="command", metavar="COMMAND", title="commands")

    inspect = commands.add_parser("inspect", help="which blocks there are and which can idle")
    add_model(inspect, required=True)

    add_planning_options(commands.add_parser("plan", help="which plan for a model and a budget, chosen on your images"))

    convert = commands.add_parser("convert", help="plan and report of a conversion, checked")
    add_model(convert, required=True)
    add_plan(convert)
    add_renamed(
        convert, "--out", "--save", metavar="FILE",
        help="write the model's own weights, which a conversion does not change, and the options of the plan in the "
        "header of the file: safetensors",
    )  # fmt: skip
    convert.add_argument("--times", metavar="FILE", help="predict times from what `bench --table` wrote")
    convert.add_argument("--package", metavar="FILE", help="write an artifact, .pt2 or .onnx, and print its path")
    convert.add_argument("--emit", metavar="DIR", help="write artifact, weights, plan, report and a fine-tuning script")
    convert.add_argument("--device", help="where the artifact is to run, if not where the model is")
    convert.add_argument("--dtype", choices=DTYPES, help="number type of the artifact, if not the model's")
    convert.add_argument("--int8", action="store_true", help="multiply with weights in int8, in an .onnx file")
    add_renamed(
        convert, "--batch-size", "--batch", action=Numbers, metavar="IMAGES",
        help="fewest and most images of a call of the artifact; 1 1024 if not told",
    )  # fmt: skip

    add_comparing_options(
        commands.add_parser("compare", help="what a conversion changes on your images, without labels")
    )
    add_evaluating_options(commands.add_parser("evaluate", help="top-1 before and after, on images with labels"))

    draw = commands.add_parser("draw", help="picture of working and idle patches")
    add_model(draw, required=True)
    add_plan(draw)
    draw.add_argument(
        "images", nargs="*", action="extend", default=[], metavar="IMAGE", help="photographs; drawn scenes if none"
    )
    draw.add_argument("--out", required=True, metavar="FILE", help="a png, pdf or svg")

    add_options(commands.add_parser("bench", help="time dense against idling"))

    table = commands.add_parser("zoo", help="the compatibility table: small models of every library, each checked")
    table.add_argument("--only", default="", metavar="PATTERN", help="models or families that match")
    table.add_argument("--quick", action="store_true", help="one model for each way of building them")
    table.add_argument("--markdown", metavar="FILE", help="write the table as Markdown too")

    commands.add_parser(
        FINETUNE, add_help=False, help="fine-tune a converted model: the same as `python -m idlefx.finetune`"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
