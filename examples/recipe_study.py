"""Which recipe wins most back without labels: the real model on scenes, one setting changed at a time.

`python -m idlefx.demo fetch` gets model and photographs. `python -m examples.recipe_study --steps 100 --idle follow`
compares all recipes for one way of idling; `--recipes` names some. Every result is kept as soon as it is there.
"""

import argparse
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.utils.data import DataLoader

import idlefx
from examples.kept_results import keep_results, read_results
from idlefx.data import scenes
from idlefx.finetune import Settings, finetune
from idlefx.models import saliency_vit
from idlefx.training.config import UNLABELLED, UNLABELLED_LR

RESULTS = Path(__file__).parent / "results" / "recipe_study.json"
BATCH = 16
RECIPES: dict[str, dict[str, Any]] = {  # what is different from the defaults; "lr" is a factor
    "default": {},
    "bfloat16": {"amp": True},
    "a third of the learning rate": {"lr": 1 / 3},
    "three times the learning rate": {"lr": 3},
    "ten times the learning rate": {"lr": 10},
    "no warm-up": {"warmup": 0.0},
    "warm-up over a tenth": {"warmup": 0.1},
    "optimiser watches for a tenth": {"state_warmup": 0.1, "warmup": 0.0},
    "weight decay": {"weight_decay": 0.05},
    "averaged": {"ema": 0.99},
    "all parameters": {"parameters": "all"},
    "vectors no faster": {"vector_lr": 1.0},
    "norms and biases alone": {"parameters": "norms"},
    "feature by squares": {"distance": {"feature": "squared"}},
    "token cut loss": {"w_cut": 1.0},
    "keep lowered from 1": {"keep_from": 1.0},
}


class Run(NamedTuple):
    """One fine-tune."""

    recipe: str
    idle: str
    layers: tuple[int, ...]
    keep: float
    steps: int
    seed: int


@cache
def images(count: int, split: str) -> Tensor:
    """Scenes (count, 3, S, S); those of "test" show other things on other photographs than those of "train"."""
    return scenes(count, seed=0, split=split).images


@cache
def dense_model() -> nn.Module:
    return saliency_vit()


def settings_of(run: Run) -> Settings:
    """The settings of a recipe."""
    changes = dict(RECIPES[run.recipe])
    if "lr" in changes:
        rate = UNLABELLED_LR[run.idle] * changes["lr"]
        changes = {"vector_lr": UNLABELLED["vector_lr"]} | changes | {"lr": rate}
    return Settings(steps=run.steps, seed=run.seed, patience=0, looks=5, **changes)


def measure(run: Run, train: int, held_out: int) -> dict[str, Any]:
    """Tune, and say what was won."""
    idle = idlefx.convert(dense_model(), layers=list(run.layers), keep=run.keep, idle=run.idle)
    loader = DataLoader(images(train, "train"), BATCH, shuffle=True, drop_last=True)
    began = time.perf_counter()
    gain = finetune(dense_model(), idle, loader, images(held_out, "test"), settings_of(run), batch_size=BATCH)
    minutes = (time.perf_counter() - began) / 60
    cosines = {
        name: {when: changes[name].cosine for when, changes in (("untuned", gain.untuned), ("tuned", gain.tuned))}
        for name in gain.untuned
    }
    return {
        **run._asdict(), "layers": list(run.layers), "scenes": train, "held_out": held_out, "gmacs": gain.idle_gmacs,
        "cosines": cosines, "distance": gain.distance, "error": gain.error, "best_step": gain.best_step,
        "last": gain.looks[-1][1], "minutes": minutes, "torch": torch.__version__,
    }  # fmt: skip


def missing(results: list[dict[str, Any]], wanted: list[Run]) -> Iterator[Run]:
    """The runs that are not there yet."""
    there = {Run(*(tuple(v) if isinstance(v := r[name], list) else v for name in Run._fields)) for r in results}
    yield from (run for run in wanted if run not in there)


def table(results: list[dict[str, Any]]) -> str:
    """In Markdown, the best recipe of each kind first."""
    ordered = sorted(results, key=lambda r: (r["idle"], r["layers"], r["keep"], r["steps"], r["distance"]))
    names = sorted({name for result in results for name in result["cosines"]})
    head = ["idle", "layers", "keep", "steps", "seed", "recipe", "distance", "of the last", *names]
    body = [
        (
            r["idle"], " ".join(map(str, r["layers"])), r["keep"], r["steps"], r["seed"], r["recipe"],
            f"{r['distance']:.3f} ± {r['error']:.3f}", f"{r['last']:.3f}",
            *(f"{r['cosines'][name]['untuned']:.4f} → {r['cosines'][name]['tuned']:.4f}" for name in names),
        )
        for r in ordered
    ]  # fmt: skip
    return tabulate(body, head, tablefmt="github", disable_numparse=True)


def main() -> None:
    """Make the runs that are missing, keep their results, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES), metavar="RECIPE")
    parser.add_argument("--idle", choices=UNLABELLED_LR, default="follow")
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 3, 5, 7, 9, 11])
    parser.add_argument("--keep", type=float, nargs="+", default=[0.75])
    parser.add_argument("--steps", type=int, nargs="+", default=[100])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--scenes", type=int, default=1500, help="to train on")
    parser.add_argument("--held-out", type=int, default=128, help="scenes that are looked at")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    wanted = [
        Run(recipe, args.idle, tuple(args.layers), keep, steps, seed)
        for seed in range(args.seeds) for keep in args.keep for steps in args.steps for recipe in args.recipes
        if args.idle == "rest" or recipe != "token cut loss"
    ]  # fmt: skip
    results = read_results(args.results)
    for run in missing(results, wanted):
        results.append(measure(run, args.scenes, args.held_out))
        keep_results(args.results, results)
        print(table(results[-1:]), flush=True)
    print(table(results))


if __name__ == "__main__":
    main()
