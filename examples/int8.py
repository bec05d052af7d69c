"""int8 without idling and on top of it: what a call takes on the CPU, and what changes in a real model.

`python -m examples.int8` times DeiT-B with random weights, and the real model, whose features and saliency on drawn
scenes are compared with those of the dense model in float32 too. `python -m idlefx.demo fetch` gets it. In onnxruntime
tokens are quantised together; with `--engine inductor` torchao, which must be installed, does it one by one.
"""

import argparse
import json
from collections.abc import Callable
from copy import deepcopy
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import timm
import torch
from tabulate import tabulate
from torch import Tensor

import idlefx
from idlefx.bench.results import ONNXRUNTIME, ONNXRUNTIME_INT8, speed_up
from idlefx.bench.timer import WARM_UP, time_in_turn
from idlefx.cli.onnx_sessions import open_sessions
from idlefx.data import scenes
from idlefx.models import saliency_vit
from idlefx.utils.devices import machine_in_words
from idlefx.utils.files import whole_file
from idlefx.utils.versions import versions

RESULTS = Path(__file__).parent / "results" / "int8.json"
REAL = "saliency_vit"
PLANS: dict[bool, dict[str, Any]] = {  # of the real model, and of others
    True: {"layers": [1, 3, 5, 7, 9, 11], "keep": 0.8, "idle": "follow"},
    False: {"layers": [3, 6, 9], "keep": 0.7, "idle": "rest"},
}
DENSE = "dense"
Run = Callable[[Tensor], dict[str, Tensor]]


def in_onnxruntime(model: Any, most: int) -> tuple[Run, Run]:
    """In float32 and in int8."""
    sessions = open_sessions(model, [ONNXRUNTIME, ONNXRUNTIME_INT8], most)
    return named(sessions[ONNXRUNTIME]), named(sessions[ONNXRUNTIME_INT8])


def in_inductor(model: Any, most: int) -> tuple[Run, Run]:
    """In float32 and in int8."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantised = deepcopy(model)
    quantize_(quantised, Int8DynamicActivationInt8WeightConfig())
    return torch.compile(model, dynamic=False), torch.compile(quantised, dynamic=False)


ENGINES = {"onnxruntime": in_onnxruntime, "inductor": in_inductor}


def named(session: Any) -> Run:
    """A session that returns its outputs by name, as the real model does."""
    names = [output.name for output in session.session.get_outputs()]
    return lambda images: dict(zip(names, map(torch.from_numpy, session(images)), strict=True))


def timed(runs: dict[str, Run], images: Tensor, seconds: float) -> dict[str, list[float]]:
    """Milliseconds of each call, by name; entry i of all of them comes from round i."""
    calls = [lambda run=run: run(images) for run in runs.values()]
    for once in calls * WARM_UP:
        once()
    samples: list[list[float]] = []
    time_in_turn(calls, images.device, samples, seconds)
    return {name: list(taken) for name, taken in zip(runs, zip(*samples, strict=True), strict=True)}


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Everything about one model: dense, dense in int8, idle and idle in int8, by these names."""
    dense, plan, most = (
        saliency_vit() if name == REAL else timm.create_model(name),
        PLANS[name == REAL],
        max(options.batch),
    )
    idle, runs = idlefx.convert(dense.eval(), **plan), {}
    for label, model in ((DENSE, idlefx.convert(dense, [0], 1.0)), ("idle", idle)):
        runs[label], runs[f"{label} int8"] = ENGINES[options.engine](model, most)
    report, size = idlefx.report(idle), idle.conversion.facts.image_size[-1]
    found: dict[str, Any] = {"model": name, "plan": plan, "gmacs": [report.dense_gmacs, report.idle_gmacs], "times": []}
    for batch in options.batch:
        images = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))
        found["times"].append({"batch": batch, "ms": timed(runs, images, options.seconds)})
    if name == REAL:  # random weights would tell nothing
        data = scenes(options.scenes, seed=0, size=size, split="test")
        found |= idlefx.compare(dense, runs, data.images, batch_size=most).to_dict()
    return found


def tables(results: list[dict[str, Any]]) -> str:
    """Times, and the cosine of every output to that of the dense model in float32."""
    shown = []
    for result in results:
        dense, idle = result["gmacs"]
        rows = []
        for entry in result["times"]:
            ms = entry["ms"]
            for name, taken in ms.items():
                changes = result.get("models", {}).get(name, {}).values()
                cosines = [f"{change['cosine']:.4f}" for change in changes]
                rows.append(
                    [entry["batch"], name, f"{median(taken):.4g}", f"{speed_up(ms[DENSE], taken):.2f}×", *cosines]
                )
        outputs = [f"cosine of {output}" for output in result.get("models", {}).get(DENSE, {})]
        table = tabulate(rows, ["batch", "model", "ms", "speed-up", *outputs], "github", disable_numparse=True)
        shown.append(f"{result['model']}, {result['plan']}, {dense:.3g} → {idle:.3g} GMACs\n\n{table}")
    return "\n\n".join(shown)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time int8 without and with idling, and see what changes.")
    parser.add_argument("--models", nargs="+", default=["deit_base_patch16_224", REAL], help=f"timm names, or {REAL}")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--seconds", type=float, default=20, help="about how long to time a model at a batch size")
    parser.add_argument("--scenes", type=int, default=64, help="to compare on, in batches of the largest size")
    parser.add_argument("--engine", choices=ENGINES, default="onnxruntime")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    libraries = versions("timm", {"inductor": "torchao"}.get(options.engine, options.engine))
    told = {"measured": date.today().isoformat(), "versions": libraries, "engine": options.engine}
    told["machine"] = machine_in_words(torch.empty(0))
    results: list[dict[str, Any]] = []
    with torch.no_grad():
        for name in options.models:
            results.append(measure(name, options))
            with whole_file(options.results) as partial:
                partial.write_text(json.dumps(told | {"results": results}, indent=1) + "\n")
    print(f"{options.engine}, {told['machine']}", tables(results), sep="\n\n")


if __name__ == "__main__":
    main()
