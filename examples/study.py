"""What idling costs in accuracy and what a short fine-tune wins back, on the scenes that the package draws.

Idling is compared with pruning, where a token that idles once never returns, on the same budget; with and without the
token cut loss; and by token score. Every result is kept as soon as it is there; an interrupted study goes on.
One file, as it is read from top to bottom: runs, tables, plot.
"""

import argparse
import json
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from tabulate import tabulate
from timm.data import create_transform, resolve_data_config
from torch import Tensor, nn
from tqdm import tqdm

from idlefx import IdleModule, convert
from idlefx.demo.glyphs import Glyphs
from idlefx.demo.model import glyph_vit
from idlefx.runtime.selections import selections
from idlefx.training.config import Settings
from idlefx.training.loader import ImageLoader
from idlefx.training.loop import finetune
from idlefx.utils.files import whole_file

HERE = Path(__file__).parent
PUBLISHED, EARLY = (3, 6, 9), (2, 4, 6)  # blocks that open a stage: as in the paper, and where idling costs more
KEEPS, SEEDS = (0.9, 0.8, 0.7, 0.6, 0.5), (0, 1, 2)
BATCH, LOOKED_AT = 128, 480  # scenes of a step; scenes on which it is counted what is looked at
TUNING = {"epochs": 1, "lr": 2e-4, "mixup": 0.0, "cutmix": 0.0, "smoothing": 0.0, "ema": 0.0}
METHODS: dict[str, dict[str, Any]] = {
    "idle": {"w_cut": 0.0},
    "idle, cut loss": {},
    "pruned": {"w_cut": 0.0, "reselect": False},
}
WEIGHTS: dict[str, dict[str, Any]] = {
    "5": {"w_cut": 5.0},
    "20, rising": {"cut_warmup": 1.0},
}
DENSE = "dense"
OPTIONS = {**METHODS, **WEIGHTS, DENSE: {"w_cut": 0.0}}
SELECTORS, LOW = ("mean", "norm", "random"), 0.5
WEIGHED = ((EARLY, LOW), (PUBLISHED, 0.7))  # where weights of the cut loss are compared


@dataclass(frozen=True)
class Run:
    """One fine-tune of the study."""

    layers: tuple[int, ...]
    keep: float
    method: str
    selector: str
    seed: int
    steps: int
    scenes: int  # held-out ones that measure accuracy


def planned(args: argparse.Namespace) -> list[Run]:
    """All runs, those that tell most first; side questions are asked of one seed."""
    settings: list[tuple[tuple[int, ...], float]] = [
        (PUBLISHED, 0.5), (EARLY, 0.5), (PUBLISHED, 0.7), (EARLY, 0.7),
    ]  # fmt: skip
    main = [(layers, keep, method, "auto") for layers, keep in settings for method in METHODS]
    side = [(PUBLISHED, 1.0, DENSE, "auto")]
    side += [(PUBLISHED, keep, method, "auto") for keep in (0.9, 0.8, 0.6) for method in METHODS]
    side += [(*place, weight, "auto") for place in WEIGHED for weight in WEIGHTS]
    side += [(EARLY, LOW, "idle", selector) for selector in SELECTORS]
    what = [(each, seed) for each in main for seed in SEEDS[: args.seeds]]
    what += [(each, SEEDS[0]) for each in side]
    return [Run(*each, seed, args.steps, args.scenes) for each, seed in what]


@cache
def scenes(split: str, size: int, seed: int) -> Glyphs:
    transform = create_transform(**resolve_data_config({}, model=glyph_vit()))
    return Glyphs(split, size=size, seed=seed, transform=transform, in_memory=True)


def carry_out(run: Run) -> dict[str, Any]:
    """Convert, tune and measure."""
    torch.set_num_threads(1)
    torch.manual_seed(run.seed)
    options = dict(OPTIONS[run.method])
    reselect = options.pop("reselect", True)
    dense = glyph_vit()
    idle = convert(dense, run.layers, run.keep, selector=run.selector, reselect=reselect)
    train = ImageLoader(scenes("train", run.steps * BATCH, 1000 + run.seed), BATCH, training=True, seed=run.seed)
    test = ImageLoader(scenes("test", run.scenes, 0), 256)
    before = looked_at(idle)
    history = finetune(dense, idle, train, test, Settings(seed=run.seed, **TUNING, **options))
    return {
        **asdict(run), "dense": history.dense, "untuned": history.untuned, "tuned": history.tuned,
        "dense_gmacs": history.dense_gmacs, "idle_gmacs": history.idle_gmacs,
        "kept_before": before, "kept_after": looked_at(idle),
    }  # fmt: skip


@torch.no_grad()
def looked_at(idle: IdleModule) -> dict[int, tuple[float, float]]:
    """By block, the share of the tokens on the glyph that works, and of those off it."""
    data = scenes("val", LOOKED_AT, 0)
    images = torch.stack([data[i][0] for i in range(LOOKED_AT)])
    masks = torch.stack([torch.from_numpy(data.mask(i)) for i in range(LOOKED_AT)])
    side = round(idle.plan.blocks[0].image_tokens ** 0.5)
    on = nn.functional.adaptive_max_pool2d(masks[:, None].float(), side).flatten(1).bool()
    prefix = len(idle.plan.blocks[0].prefix)
    return {block: _shares(index[:, prefix:] - prefix, on) for block, index in selections(idle, images).items()}


def _shares(kept: Tensor, on: Tensor) -> tuple[float, float]:
    works = torch.zeros_like(on).scatter(1, kept, True)
    return works[on].float().mean().item(), works[~on].float().mean().item()


def told(values: Iterable[float]) -> str:
    """Mean and standard deviation."""
    values = list(values)
    return f"{mean(values):.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")


Results = list[dict[str, Any]]
STYLE: dict[str, Any] = {"tablefmt": "github", "disable_numparse": True}


def tables(results: Results) -> str:
    """Accuracy by keep ratio, by score and by weight of the cut loss, and what is looked at, as Markdown."""
    dense = f"Dense: {results[0]['dense']:.2f} %, {results[0]['dense_gmacs']:.4f} GMACs"
    if tuned := find(results, PUBLISHED, 1.0, DENSE):
        dense += f"; after the same fine-tune {told(r['tuned'] for r in tuned)} %"
    return "\n\n".join([f"{dense}.", ratios(results), scores(results), weights(results), looks(results)]) + "\n"


def find(results: Results, layers: tuple[int, ...], keep: float, method: str, selector: str = "auto") -> Results:
    """The runs that differ in their seed only."""
    wanted = (layers, keep, method, selector)
    return [r for r in results if (tuple(r["layers"]), r["keep"], r["method"], r["selector"]) == wanted]


def ratios(results: Results) -> str:
    """Accuracy by stages and keep ratio."""
    rows = []
    for layers in (PUBLISHED, EARLY):
        for keep in KEEPS:
            found = [find(results, layers, keep, method) for method in METHODS]
            if all(found):
                idle, _, pruned = found
                ratio = idle[0]["dense_gmacs"] / idle[0]["idle_gmacs"]
                untuned = [f"{each[0]['untuned']:.2f}" for each in (idle, pruned)]
                tuned = [told(r["tuned"] for r in each) for each in found]
                rows.append((" ".join(map(str, layers)), keep, f"{ratio:.2f}", *untuned, *tuned))
    head = [
        "layers", "keep", "GMAC ratio", "idle, untuned", "pruned, untuned", "idle, tuned", "with the cut loss",
        "pruned, tuned",
    ]  # fmt: skip
    return tabulate(rows, head, **STYLE)


def scores(results: Results) -> str:
    """Accuracy by token score."""
    rows = []
    for selector in ("auto", *SELECTORS):
        if found := find(results, EARLY, LOW, "idle", selector):
            name = "class attention" if selector == "auto" else selector
            rows.append((name, *(told(r[when] for r in found) for when in ("untuned", "tuned"))))
    return tabulate(rows, ["token score", "untuned", "tuned"], **STYLE)


def weights(results: Results) -> str:
    """Accuracy by the weight of the cut loss."""
    names = {"idle": "0", "5": "5", "idle, cut loss": "20", "20, rising": "20, rising over the run"}
    rows = []
    for method, name in names.items():
        found = [find(results, *place, method) for place in WEIGHED]
        if all(found):
            rows.append((name, *(told(r["tuned"] for r in each) for each in found)))
    places = [f"layers {' '.join(map(str, layers))}, keep {keep}" for layers, keep in WEIGHED]
    return tabulate(rows, ["weight of the cut loss", *places], **STYLE)


def looks(results: Results) -> str:
    """How many of the tokens on the glyph and off it work, in the first block of every stage."""
    rows = []
    for method in METHODS:
        if found := find(results, EARLY, LOW, method):
            for when in ("before", "after"):
                blocks = [[run[f"kept_{when}"][str(block)] for run in found] for block in EARLY]
                shares = [[mean(each) for each in zip(*block, strict=True)] for block in blocks]
                rows.append((f"{method}, {when}", *(f"{on:.0%} / {off:.0%}" for on, off in shares)))
    return tabulate(rows, ["on the glyph / off it", *(f"block {block}" for block in EARLY)], **STYLE)


def draw(results: Results, path: Path) -> None:
    """Accuracy over multiply-adds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.8, 3.8), layout="constrained")
    lines = {
        "idle, tuned": ("idle", "tuned", "C0o-"), "tuned with the cut loss": ("idle, cut loss", "tuned", "C2o-"),
        "pruned, tuned": ("pruned", "tuned", "C1o-"), "idle, untuned": ("idle", "untuned", "C0o--"),
        "pruned, untuned": ("pruned", "untuned", "C1o--"),
    }  # fmt: skip
    for axes, layers in zip(figure.subplots(1, 2), (PUBLISHED, EARLY), strict=True):
        for name, (method, when, style) in lines.items():
            points = [found for keep in KEEPS if (found := find(results, layers, keep, method))]
            values = [[run[when] for run in found] for found in points]
            spread = [stdev(each) if len(each) > 1 else 0.0 for each in values]
            gmacs = [found[0]["idle_gmacs"] * 1e3 for found in points]
            axes.errorbar(gmacs, [*map(mean, values)], spread, fmt=style, ms=4, capsize=3, label=name)
        axes.plot(results[0]["dense_gmacs"] * 1e3, results[0]["dense"], "k*", ms=10, label="dense")
        axes.set(xlabel="million multiply-adds per image", ylabel="top-1 accuracy, %")
        axes.set_title(f"stages open at blocks {', '.join(map(str, layers))}", size=9)
        axes.grid(alpha=0.3)
    axes.legend()
    with whole_file(path) as partial:
        figure.savefig(partial, dpi=150, format="png")


def run_of(result: dict[str, Any]) -> Run:
    """Whose result it is."""
    return Run(**{name: result[name] for name in Run.__dataclass_fields__} | {"layers": tuple(result["layers"])})


def main() -> None:
    """Carry out what is missing, keep the results, print the tables and draw the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=120, help=f"of {BATCH} scenes, for every fine-tune")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), choices=range(1, len(SEEDS) + 1))
    parser.add_argument("--scenes", type=int, default=6000, help="held-out ones that measure accuracy")
    parser.add_argument("--jobs", type=int, default=2, help="fine-tunes at once, of one thread each")
    parser.add_argument("--results", type=Path, default=HERE / "results" / "study.json")
    parser.add_argument("--plot", type=Path, default=HERE.parent / "docs" / "study.png")
    args = parser.parse_args()

    results = json.loads(args.results.read_text()) if args.results.exists() else []
    missing = [run for run in planned(args) if run not in map(run_of, results)]
    args.results.parent.mkdir(exist_ok=True)
    with ProcessPoolExecutor(args.jobs) as pool, tqdm(total=len(missing), unit="run", smoothing=0) as bar:
        for future in as_completed([pool.submit(carry_out, run) for run in missing]):
            results = json.loads(json.dumps([*results, future.result()]))
            with whole_file(args.results) as partial:
                partial.write_text(json.dumps(results, indent=1) + "\n")
            bar.update()
    wanted = set(planned(args))
    results = [result for result in results if run_of(result) in wanted]
    print(tables(results))
    draw(results, args.plot)


if __name__ == "__main__":
    main()
