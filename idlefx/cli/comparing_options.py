"""The options of `python -m idlefx compare` and `evaluate`, which set converted models beside their dense one."""

from idlefx.cli.arguments import DTYPES, add_model, add_plan
from idlefx.cli.parser import Parser


def add_comparing_options(parser: Parser) -> None:
    """What `compare` takes."""
    _add_models(parser)
    parser.add_argument("--data", required=True, metavar="FOLDER", help="photographs, at any depth")
    parser.add_argument(
        "--logits", nargs="+", metavar="NAME", help="outputs that are logits of classes, if they are not found"
    )
    _add_run(parser, batch_size=16)


def add_evaluating_options(parser: Parser) -> None:
    """What `evaluate` takes."""
    _add_models(parser)
    parser.add_argument(
        "--data", required=True, metavar="PATH",
        help="a folder with one folder for each class, or with such for training and validation, or a data set as "
        "timm names it: hfds/…, wds/…",
    )  # fmt: skip
    parser.add_argument("--data-root", metavar="PATH", help="where a named data set lies or is cached")
    parser.add_argument("--val-split", default="validation", help="the folder or split to evaluate on")
    parser.add_argument("--workers", type=int, default=2, help="processes that read images")
    _add_run(parser, batch_size=64)


def _add_models(parser: Parser) -> None:
    add_model(parser, required=True)
    several = {"nargs": "+", "default": ["rest"], "help": "what idle tokens do meanwhile; of several, each has its row"}
    add_plan(parser, idle=several)


def _add_run(parser: Parser, batch_size: int) -> None:
    parser.add_argument("--batch-size", type=int, default=batch_size, metavar="IMAGES", help="images in a batch")
    parser.add_argument("--limit", type=int, metavar="IMAGES", help="the most images, spread evenly over the folder")
    parser.add_argument("--device", default="cpu", help="where to run")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="number type of the models")
    parser.add_argument("--json", metavar="FILE", help="write the figures too")
