"""Let tokens of a trained model follow one another, and see what that changes and what it saves.

The model is real where its weights can be downloaded, the small one that the package ships otherwise; whatever is
timed is packaged as for deployment, compiled into one file, and of a size that people use.
"""

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import timm
import torch
from PIL import Image
from tabulate import tabulate
from timm.data import create_transform, resolve_model_data_config
from torch import nn

import idlefx
from idlefx.bench.timer import time_in_turn
from idlefx.data import Glyphs
from idlefx.demo.cache import cache_folder
from idlefx.demo.maps import draw_maps
from idlefx.demo.samples import ABOUT as SAMPLES
from idlefx.demo.samples import fetch_samples, kept_samples
from idlefx.demo.weights import ABOUT as WEIGHTS
from idlefx.demo.weights import fetch_weights
from idlefx.models import glyph_vit, saliency_vit

PICTURE = Path("quickstart.png")
PLAN: dict[str, Any] = {"layers": [3, 6, 9], "keep": 0.7}
KEEP_ALL = PLAN | {"keep": 1.0}  # does what the dense model does
BATCHES = (1, 8)
SECONDS = 6.0  # of timing for each batch size


class Subject(NamedTuple):
    """A trained model, photographs for it, and a model of common size to be timed."""

    model: nn.Module
    photographs: Sequence[Path | Image.Image]
    timed: nn.Module


def subject() -> Subject:
    """The real model and photographs, which are downloaded once; where that fails, what the package ships."""
    try:
        for about, fetch in ((WEIGHTS, fetch_weights), (SAMPLES, fetch_samples)):
            print(f"fetching {about}", flush=True)
            fetch()
        model = saliency_vit()
    except idlefx.InputError as refusal:
        print(f"\n{refusal}\nSo this is the small model that idlefx ships; DeiT-S, with random weights, is timed.")
        scenes = Glyphs("test", size=5)
        return Subject(
            glyph_vit(),
            [scenes.scene(number).image for number in range(5)],
            timm.create_model("deit_small_patch16_224"),
        )
    print(f"both are in {cache_folder()}; the model is a DINOv2 ViT-S/14 with a decoder for saliency")
    return Subject(model, kept_samples(), model)


def title(text: str) -> None:
    print(f"\n{text}\n{'=' * len(text)}", flush=True)


@torch.inference_mode()
def times(dense: idlefx.IdleModule, follow: idlefx.IdleModule) -> str:
    """What a call takes of each model, packaged as one compiled file, in turn."""
    limit = (costs := idlefx.report(follow)).dense_gmacs / costs.idle_gmacs
    start, rows = time.perf_counter(), []
    with TemporaryDirectory() as folder:
        files = [
            idlefx.package(model, Path(folder) / name, batch=(min(BATCHES), max(BATCHES)))
            for name, model in (("dense.pt2", dense), ("follow.pt2", follow))
        ]
        served = [idlefx.load(file) for file in files]
        for batch in BATCHES:
            images, samples = torch.randn(batch, *follow.conversion.facts.image_size), []
            time_in_turn([partial(each, images) for each in served], images.device, samples, SECONDS)
            slow, fast = torch.tensor(samples).median(0).values.tolist()
            rows.append([batch, f"{slow:.0f}", f"{fast:.0f}", f"{slow / fast:.2f}×", f"{slow / fast / limit:.0%}"])
    head = ["batch", "dense, ms", "follow, ms", "speed-up", f"of the {limit:.2f}× that multiply-adds allow"]
    return f"{tabulate(rows, head)}\n(medians; {time.perf_counter() - start:.0f} s with packaging)"


@torch.inference_mode()
def main() -> None:
    model, photographs, timed = subject()

    title("What was found in the model")
    print(idlefx.inspect(model))

    title("Which tokens work")
    follow = idlefx.convert(model, **PLAN, idle="follow")
    print(follow.plan)

    title("What it saves")
    print(idlefx.report(follow))

    title("What it changes, without any training")
    rest = idlefx.convert(model, **PLAN, idle="rest")
    all_kept = idlefx.convert(model, **KEEP_ALL)
    changed = idlefx.compare(model, all_kept, photographs, progress=False).changes["idle"].values()
    print("keeping every token changes", max(change.relative_difference for change in changed) or "nothing")
    print(idlefx.compare(model, {"follow": follow, "rest": rest}, photographs, progress=False))

    title("What it takes")
    pair = (all_kept, follow)
    if timed is not model:
        pair = (idlefx.convert(timed, **KEEP_ALL), idlefx.convert(timed, **PLAN, idle="follow"))
    try:
        print(times(*pair))
    except idlefx.ArtifactError as error:
        print(f"not timed, as compiling failed (is there a C++ compiler?): {error}")

    title("What it sees")
    if timed is model:
        data = resolve_model_data_config(model)
        transform = create_transform(**data)
        images = torch.stack([transform(Image.open(path).convert("RGB")) for path in photographs])
        mean, std = (torch.tensor(data[key]).view(3, 1, 1) for key in ("mean", "std"))
        pixels = (images * std + mean).permute(0, 2, 3, 1).numpy()
        runs = {"dense": model, "follow": follow, "rest": rest}
        print(draw_maps(PICTURE, pixels, {name: run(images)["saliency"][:, 0].numpy() for name, run in runs.items()}))
    else:
        print(idlefx.draw(follow, photographs, PICTURE))


if __name__ == "__main__":
    main()
