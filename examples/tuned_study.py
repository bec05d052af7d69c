"""What tuning without labels wins back in the real model: resting, pruned and following, each for as many steps.

`python -m idlefx.demo fetch` gets model and pictures. Tuned is on scenes, the best weights are chosen on one half of
the gallery, and measured is on the other half and on scenes of other things on other photographs. Every result is kept
as soon as it is there; an interrupted study goes on.
"""

import argparse
import time
from pathlib import Path
from statistics import fmean, stdev
from typing import NamedTuple

import torch
from tabulate import tabulate
from torch.utils.data import DataLoader

from examples.kept_results import Result, keep_results, read_results
from examples.real_study import Model, dense_model, make, measure, measure_photographs, photographs
from idlefx.data import scenes
from idlefx.finetune import Settings, finetune

RESULTS = Path(__file__).parent / "results" / "tuned_study.json"
SIZE, BATCH = 224, 16
METHODS = ("rest", "pruned", "follow, 6 stages")
CHOSEN_ON, MEASURED_ON = slice(0, None, 2), slice(1, None, 2)  # of the gallery
FIGURES = ("cosine", "agreement", "iou", "photographs' cosine", "photographs' worst cosine")


class Run(NamedTuple):
    """One model: untuned if there are no steps."""

    method: str
    level: int
    steps: int
    seed: int
    train: int  # scenes to tune on
    scenes: int  # to measure on


def tuned(run: Run) -> tuple[Model, Result]:
    """A model tuned by the defaults in bfloat16, and what came of it."""
    model, dense = make(SIZE, run.method, run.level), dense_model(SIZE)
    loader = DataLoader(scenes(run.train, seed=run.seed, split="train").images, BATCH, shuffle=True, drop_last=True)
    held_out, settings = photographs(SIZE, None)[0][CHOSEN_ON], Settings(steps=run.steps, seed=run.seed, amp=True)
    began = time.perf_counter()
    gain = finetune(dense, model.run, loader, held_out, settings, batch_size=BATCH)
    minutes = (time.perf_counter() - began) / 60
    return model, {"best_step": gain.best_step, "distance": gain.distance, "error": gain.error, "minutes": minutes}


def measured(run: Run) -> Result:
    """What a model is like on pictures that nothing was tuned on and nothing chosen."""
    model, tuning = tuned(run) if run.steps else (make(SIZE, run.method, run.level), {})
    found = measure(SIZE, run.scenes, model) | measure_photographs(SIZE, None, model, MEASURED_ON)
    return {**run._asdict(), **tuning, **found, "torch": torch.__version__}


def table(results: list[Result]) -> str:
    """In Markdown: untuned, and mean ± standard deviation over the seeds."""
    body = []
    for method, level, steps in sorted({(r["method"], r["level"], r["steps"]) for r in results}):
        rows = [r for r in results if (r["method"], r["level"], r["steps"]) == (method, level, steps)]
        seeds, best = (len(rows), ", ".join(str(r["best_step"]) for r in rows)) if steps else ("", "")
        figures = (spread([r[name] for r in rows]) for name in FIGURES)
        body.append((method, rows[0]["saving"], f"{rows[0]['gmacs']:.2f}", steps, seeds, best, *figures))
    head = ["method", "how", "GMACs", "steps", "seeds", "best after", *FIGURES]
    return tabulate(body, head, tablefmt="github", disable_numparse=True)


def spread(values: list[float]) -> str:
    return f"{fmean(values):.4f}" + (f" ± {stdev(values):.4f}" if len(values) > 1 else "")


def main() -> None:
    """Tune and measure what is missing, keep the results, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, metavar="METHOD")
    parser.add_argument("--levels", type=int, nargs="+", default=[1], help="of GMACs: 0 the most, 3 the fewest")
    parser.add_argument("--steps", type=int, default=150, help=f"of {BATCH} scenes")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--train", type=int, default=1500, help="scenes to tune on")
    parser.add_argument("--scenes", type=int, default=600, help="to measure on")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    wanted = [
        Run(method, level, steps, seed, args.train if steps else 0, args.scenes)
        for steps, seeds in ((0, [0]), (args.steps, args.seeds)) for seed in seeds for level in args.levels
        for method in args.methods
    ]  # fmt: skip
    results = read_results(args.results)
    there = {Run(*(result[name] for name in Run._fields)) for result in results}
    for run in wanted:
        if run not in there:
            results.append(measured(run))
            keep_results(args.results, results)
            print(table(results[-1:]), flush=True)
    alike = [r for r in results if r["scenes"] == args.scenes and r["train"] in (0, args.train)]
    print(table(alike))


if __name__ == "__main__":
    main()
