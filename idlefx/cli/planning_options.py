"""The options of `python -m idlefx plan`."""

from idlefx.cli.arguments import DTYPES, PLAN, add_model
from idlefx.cli.parser import Parser
from idlefx.search.budget import UNITS

BUDGETS = {
    "--speedup": ("TIMES", "how many times as fast as the dense model"),
    "--gmacs": ("GMACS", "billions of multiply-adds for one image, at most"),
    "--ms": ("MS", "predicted milliseconds of a call, at most"),
    "--max-change": ("CHANGE", "the most that outputs may change, as 1 − cosine: the cheapest plan within it"),
}


def add_options(parser: Parser) -> None:
    """What the command takes."""
    add_model(parser, required=True)
    budget = parser.add_mutually_exclusive_group(required=True)
    for name, (metavar, text) in BUDGETS.items():
        budget.add_argument(name, type=float, metavar=metavar, help=text)
    parser.add_argument("--data", required=True, metavar="FOLDER", help="photographs, at any depth; one of 4 judges")
    parser.add_argument("--idle", **{**PLAN["idle"], "default": "follow"})
    for name, default in (("selector", "auto"), ("multiple_of", 1), ("prefix", None)):
        parser.add_argument(f"--{name.replace('_', '-')}", **{**PLAN[name], "default": default})
    parser.add_argument("--by", choices=UNITS, default="ms", help="what a speed-up, or what is cheapest, is counted in")
    parser.add_argument("--times", metavar="FILE", help="what `bench --table` wrote here; measured if not given")
    parser.add_argument("--batch-size", type=int, default=16, metavar="IMAGES", help="images in a call")
    parser.add_argument("--limit", type=int, default=256, metavar="IMAGES", help="the most images to read")
    parser.add_argument("--trials", type=int, default=60, metavar="PLANS", help="plans to try besides even tapers")
    parser.add_argument("--out", metavar="FILE", help="write the plan, for --plan of other commands: plan.json")
    parser.add_argument("--resume", action="store_true", help="go on with the search that was to write --out")
    parser.add_argument("--plot", metavar="FILE", help="draw change over cost, and the worst image: a png, pdf or svg")
    parser.add_argument("--device", default="cpu", help="where to search, and for which to plan")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="number type of the model")
