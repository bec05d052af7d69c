"""What idling, following, pruning and merging tokens change in a real model on real pictures, before any training.

`python -m idlefx.demo fetch` gets both. Everything is compared with the dense model: the direction of the class token's
feature, the kind that a classifier on this feature names, the saliency of each pixel, and how well what is salient
meets the thing in the scene. Whole photographs, in which everything is a thing, have no masks. Every result is kept as
soon as it is there; an interrupted study goes on.
"""

import argparse
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn
from tqdm import tqdm

import idlefx
from examples import tome
from examples.kept_results import keep_results, read_results
from examples.real_study_shown import draw, picture, tables
from idlefx.bench.timer import time_in_turn
from idlefx.data import Scenes, scenes
from idlefx.demo.gallery import kept_gallery
from idlefx.models import saliency_vit
from idlefx.reporting.comparison.image_batches import find_images

HERE = Path(__file__).parent
THREE, SIX = [3, 6, 9], [1, 3, 5, 7, 9, 11]  # blocks that open a stage
KEEPS = {  # by image size: of three and of six stages, of about equal cost
    224: [(0.87, 0.93), (0.7, 0.85), (0.6, 0.8), (0.5, 0.75)],
    518: [(0.87, 0.93), (0.7, 0.85), (0.5, 0.75), (0.3, 0.65)],
}
BATCH = {224: 20, 518: 4}
TAUGHT = 450  # scenes of other things on other photographs that teach the classifier of kinds
RIDGE = 1e-3
SECONDS = 20  # of timing, for all methods of a row together
DENSE = "dense"
METHODS = ("rest", "pruned", "ToMe", "follow, 3 stages", "follow, 6 stages", "follow, 6 stages, joined")


class Model(NamedTuple):
    """A model that returns feature and saliency, the GMACs of its blocks, and how they were saved."""

    run: Callable[[Tensor], dict[str, Tensor]]
    gmacs: float
    saving: str


class MergingViT(nn.Module):
    """The real model with token merging in its blocks."""

    def __init__(self, dense: nn.Module, merged: list[int]) -> None:
        super().__init__()
        self.dense, self.merging = dense, tome.Merging(dense.backbone.blocks, merged)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        backbone = self.dense.backbone
        tokens = backbone.norm(self.merging(backbone._pos_embed(backbone.patch_embed(images))))
        patches = tokens[:, 1:].transpose(1, 2).unflatten(2, (self.dense.grid, self.dense.grid))
        logits = F.interpolate(self.dense.decoder(patches), images.shape[-2:], mode="bilinear", align_corners=False)
        return {"feature": tokens[:, 0], "saliency": logits.sigmoid()}


@cache
def dense_model(size: int) -> nn.Module:
    return saliency_vit(size)


def make(size: int, method: str, level: int) -> Model:
    """The dense model, or with tokens saved in one of the ways at one of the levels of `KEEPS`."""
    dense, (three, six) = dense_model(size), KEEPS[size][level]
    tokens, width = dense.backbone.pos_embed.shape[1:]
    depth = len(dense.backbone.blocks)
    if method == DENSE:
        return Model(dense, tome.gmacs([0] * depth, tokens, width), "")
    if method == "ToMe":  # it may cost what following costs
        budget = max(make(size, name, level).gmacs for name in METHODS if name.startswith("follow"))
        merged = tome.spread(budget, tokens, width, depth)
        return Model(
            MergingViT(dense, merged), tome.gmacs(merged, tokens, width), f"{max(merged)} merged in each block"
        )
    layers, keep = (SIX, six) if "6" in method else (THREE, three)
    if method.startswith("follow"):
        idle = idlefx.convert(dense, layers=layers, keep=keep, idle="follow", reselect="joined" not in method)
    else:
        idle = idlefx.convert(dense, layers=layers, keep=keep, reselect=method == "rest")
    gmacs = sum(block.idle_gmacs for block in idlefx.report(idle).blocks)
    return Model(idle, gmacs, f"layers {' '.join(map(str, layers))}, keep {keep}")


@torch.inference_mode()
def outputs(run: Callable[[Tensor], dict[str, Tensor]], images: Tensor) -> tuple[Tensor, Tensor]:
    """Features (count, C) and saliency (count, S, S) of all images."""
    batches = images.split(BATCH[images.shape[-1]])
    found = [run(images) for images in tqdm(batches, unit="batch", leave=False, disable=None)]
    return torch.cat([f["feature"] for f in found]), torch.cat([f["saliency"][:, 0] for f in found])


@cache
def seen(size: int, count: int) -> tuple[Scenes, Tensor, Tensor]:
    """The scenes, and what the dense model makes of them."""
    data = scenes(count, seed=0, size=size, split="test")
    return data, *outputs(dense_model(size), data.images)


@cache
def classifier() -> Tensor:
    """Weights (C + 1, kinds) of a linear classifier of kinds, fitted to the dense model's features."""
    data = scenes(TAUGHT, seed=1, split="train")
    features = with_one(outputs(dense_model(224), data.images)[0])
    wanted = F.one_hot(data.kinds).float()
    penalty = RIDGE * len(features) * torch.eye(features.shape[1])
    return torch.linalg.solve(features.mT @ features + penalty, features.mT @ wanted)


def with_one(features: Tensor) -> Tensor:
    return F.pad(F.normalize(features, dim=1), (0, 1), value=1.0)


def overlap(saliency: Tensor, masks: Tensor) -> float:
    """Mean intersection over union of what is salient and the thing in the scene."""
    salient = saliency > 0.5
    return ((salient & masks).sum((1, 2)) / (salient | masks).sum((1, 2))).mean().item()


@cache
def photographs(size: int, folder: Path | None) -> tuple[Tensor, Tensor, Tensor]:
    """Whole photographs, and what the dense model makes of them: features (count, C) and saliency (count, S, S)."""
    data = resolve_model_data_config(dense_model(size))
    transform = create_transform(**data)
    files = kept_gallery() if folder is None else find_images(folder)
    images = torch.stack([transform(Image.open(file).convert("RGB")) for file in files])
    return images, *outputs(dense_model(size), images)


def measure_photographs(size: int, folder: Path | None, model: Model, which: slice = slice(None)) -> dict[str, Any]:
    """How a model differs from the dense one on whole photographs, or on some of them."""
    images, dense_features, dense_saliency = (each[which] for each in photographs(size, folder))
    features, saliency = outputs(model.run, images)
    cosines = torch.cosine_similarity(features, dense_features)
    return {
        "photographs": len(images),
        "photographs' cosine": cosines.mean().item(),
        "photographs' worst cosine": cosines.min().item(),
        "photographs' difference": (saliency - dense_saliency).abs().mean().item(),
    }


def measure(size: int, count: int, model: Model) -> dict[str, Any]:
    """How a model differs from the dense one on scenes."""
    data, dense_features, dense_saliency = seen(size, count)
    features, saliency = outputs(model.run, data.images)
    kinds, dense_kinds = ((with_one(each) @ classifier()).argmax(1) for each in (features, dense_features))
    return {
        "size": size, "scenes": count, "gmacs": model.gmacs, "saving": model.saving,
        "cosine": torch.cosine_similarity(features, dense_features).mean().item(),
        "agreement": (kinds == dense_kinds).float().mean().item(),
        "accuracy": (kinds == data.kinds).float().mean().item(),
        "difference": (saliency - dense_saliency).abs().mean().item(),
        "iou": overlap(saliency, data.masks),
    }  # fmt: skip


@torch.inference_mode()
def times(size: int, models: dict[str, Model], batch: int) -> dict[str, float]:
    """Median milliseconds of each whole model, compiled, called in turn."""
    images = torch.randn(batch, 3, size, size)
    runs = []
    for model in models.values():
        idles = isinstance(model.run, idlefx.IdleModule)
        compiled = (
            idlefx.compile(model.run, verify=False, dynamic=False) if idles else torch.compile(model.run, dynamic=False)
        )
        for _ in range(3):
            compiled(images)
        runs.append(lambda compiled=compiled: compiled(images))
    samples: list[list[float]] = []
    time_in_turn(runs, images.device, samples, SECONDS)
    medians = torch.tensor(samples).median(0).values.tolist()
    return dict(zip(models, medians, strict=True))


def missing(results: list[dict[str, Any]], counts: dict[int, int]) -> Iterator[tuple[int, str, int]]:
    """What is still to be measured: size, method and level."""
    there = {(r["size"], r["scenes"], r["method"], r["level"]) for r in results}
    for size, count in counts.items():
        wanted = [(DENSE, 0), *((method, level) for level in range(len(KEEPS[size])) for method in METHODS)]
        yield from ((size, *each) for each in wanted if (size, count, *each) not in there)


def add_times(results: list[dict[str, Any]], size: int, level: int, batch: int) -> None:
    """Time all methods of one level beside the dense model, and note it in their results."""
    models = {method: make(size, method, level) for method in (DENSE, *METHODS)}
    ms = times(size, models, batch)
    for result in results:
        if (result["size"], result["level"]) == (size, level) and result["method"] in METHODS:
            result[f"ms at batch {batch}"] = ms[result["method"]], ms[DENSE]


def main() -> None:
    """Measure what is missing, keep the results, print the tables, and draw plot and picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=600, help="at 224 pixels")
    parser.add_argument("--large", type=int, default=48, help="scenes at 518 pixels; 0 for none")
    parser.add_argument("--photographs", type=Path, metavar="FOLDER", help="whole ones; the gallery if none")
    parser.add_argument("--time", type=int, nargs="*", default=[], metavar="BATCH", help="time the compiled models too")
    parser.add_argument(
        "--time-levels", type=int, nargs="+", default=range(4), metavar="LEVEL", help="0 is the dearest"
    )
    parser.add_argument("--results", type=Path, default=HERE / "results" / "real_study.json")
    parser.add_argument("--plot", type=Path, default=HERE.parent / "docs" / "real_study.png")
    parser.add_argument("--picture", type=Path, default=HERE.parent / "docs" / "real_scenes.png")
    args = parser.parse_args()
    counts = {size: count for size, count in ((224, args.scenes), (518, args.large)) if count}

    results = read_results(args.results)
    for size, method, level in (bar := tqdm([*missing(results, counts)], unit="model")):
        bar.set_postfix_str(f"{size} pixels, {method}")
        model = make(size, method, level)
        whole = measure_photographs(size, args.photographs, model)
        results.append({"method": method, "level": level, **measure(size, counts[size], model), **whole})
        keep_results(args.results, results)
    for size in counts:
        for level in args.time_levels:
            for batch in args.time:
                add_times(results, size, level, batch)
                keep_results(args.results, results)
    wanted = [result for result in results if result["scenes"] == counts.get(result["size"])]
    print(tables(wanted))
    draw(wanted, args.plot)
    picture(args.picture, dense_model(224), lambda method, level: make(224, method, level).run)


if __name__ == "__main__":
    main()
