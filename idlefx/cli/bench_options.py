"""The options of `python -m idlefx bench`; several models and ratios, unlike in other commands."""

from idlefx.bench.results import MODES, OTHER_ENGINES
from idlefx.cli.arguments import DTYPES, add_plan, add_weights
from idlefx.cli.parser import NumberLists, Numbers, Parser, add_renamed


def add_options(parser: Parser) -> None:
    """What the command takes."""
    parser.add_argument("--model", nargs="+", required=True, help="timm names, or package.module:callable")
    add_weights(parser)
    add_plan(
        parser,
        layers={
            "required": False,
            "help": "blocks that open a stage, from 0; by default a quarter, half, three quarters in",
        },
        keep={
            "action": NumberLists, "default": [[0.7]],
            "help": "ratios to time: 0.7 0.5 are two runs, 0.7,0.5,0.3 is one run with a ratio for each layer",
        },
        idle={
            "nargs": "+", "default": ["rest"],
            "help": "what idle tokens do: rest, or follow the worker most like them; both are runs of their own",
        },
    )  # fmt: skip
    add_renamed(
        parser, "--batch-size", "--batch",
        action=Numbers, default=[1, 8, 16], metavar="IMAGES", help="images per call, one size after the other",
    )  # fmt: skip
    parser.add_argument("--device", default="cpu", help="where to time")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="for training, that of autocast")
    parser.add_argument("--modes", nargs="+", choices=MODES[1:], default=["default"], help="modes of torch.compile")
    parser.add_argument("--eager", action="store_true", help="do not time compiled models")
    parser.add_argument(
        "--runtime",
        nargs="+",
        choices=("torch", *OTHER_ENGINES),
        default=["torch"],
        help="what runs the models, in one table; for onnxruntime, dense and idle are packaged alike as ONNX, and for "
        "onnxruntime-int8 their products with weights are in int8",
    )
    parser.add_argument("--training", action="store_true", help="time a training step instead, with the token cut loss")
    parser.add_argument("--seconds", type=float, default=4.0, help="about how long to measure one pair in one mode")
    add_renamed(
        parser, "--baseline", "--peer",
        nargs="+", default=[], metavar="NAME",
        help="time too: first, which works on the first tokens and chooses none; rest or follow, the same plan "
        "with the other kind of idle tokens; tome=PATH, a checkout of ToMe",
    )  # fmt: skip
    parser.add_argument("--table", metavar="FILE", help="write block times by token count, for `convert --times`")
    parser.add_argument("--plot", metavar="FILE", help="draw speed-up over GMAC ratio: a png, pdf or svg")
    parser.add_argument("--json", metavar="FILE", help="write every sample, after every batch size")
