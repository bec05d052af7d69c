"""Dense heads on converted encoders: masks, segments and boxes where windows and tokens of the encoder idle.

No token is ever dropped, so a converted encoder gives a head the maps that it expects, of the sizes that it expects:
`idlefx.convert` the encoder, and put it where the encoder was. For each model of examples/dense_models.py this shows
that keeping all changes nothing, that idling is what masks in the dense model's own code give, all the way through
the head, and how much of the answer stays. The weights are random, so the latter tells nothing of trained models.

`python -m examples.dense` draws too which tokens worked.
"""

import argparse
from collections import Counter
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from PIL import Image
from tabulate import tabulate
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torchvision.transforms.v2.functional import normalize

import idlefx
from examples.dense_models import SIDE, SUBJECTS, Subject
from idlefx.data import Glyphs
from idlefx.records import Plan
from idlefx.runtime.selections import selections
from idlefx.utils.files import whole_file
from idlefx.zoo import reference
from idlefx.zoo.comparisons import largest_difference

PICTURE = Path("dense.png")
KEEP = 0.7
HEAD = ["model", "what idles", "GMACs of the encoder", "keeping all", "to idling by masks", "same answer"]


def scenes(count: int) -> Tensor:
    """Drawn scenes (count, 3, SIDE, SIDE), normalised."""
    pixels = Glyphs("test", size=count, image_size=SIDE).draw().pixels / 255
    return normalize(pixels, list(IMAGENET_DEFAULT_MEAN), list(IMAGENET_DEFAULT_STD))


def taken(subject: Subject, images: Tensor) -> Tensor:
    """What the encoder takes when the whole model is called."""
    seen: list[Tensor] = []
    hook = subject.encoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    subject.call(subject.model, images)
    hook.remove()
    return seen[0]


def with_encoder(subject: Subject, encoder: nn.Module, images: Tensor) -> Any:
    """What the whole model returns with another encoder in the place of its own."""
    own = subject.encoder
    subject.model.set_submodule(subject.path, encoder)
    try:
        return subject.call(subject.model, images)
    finally:
        subject.model.set_submodule(subject.path, own)


def by_masks(subject: Subject, idle: idlefx.IdleModule, images: Tensor) -> Any:
    """What the whole model returns when masks in its own encoder do what idling does: eager, and nothing gathered."""
    table, x = idle.plan.blocks, taken(subject, images)
    steps = {table[step.block].path: step for step in idle.plan if step.idles}
    chosen = {table[block].path: positions for block, positions in selections(idle, x).items()}
    grids = {block.path: block.grid for block in table if block.grid}
    tokens = reference.look(subject.encoder, [block.path for block in table], lambda: subject.encoder(x), grids)
    units = {path: replace(tokens[path], unit=step.unit) for path, step in steps.items()}
    keeps = {path: step.keep for path, step in steps.items()}
    answer = reference.idle(subject.encoder, keeps, units, chosen, lambda: subject.call(subject.model, images))
    return answer.output


def idling(plan: Plan) -> str:
    """What idles in how many blocks."""
    words = {"": "tokens", "windows": "windows", "tokens": "tokens of each window"}
    counted = Counter(words[step.unit] for step in plan if step.idles)
    return ", ".join(f"{what} in {count}" for what, count in counted.items()) + f" of {len(plan.blocks)} blocks"


def measure(subject: Subject, images: Tensor) -> tuple[idlefx.IdleModule, dict[str, Any]]:
    """The converted encoder, and the line of the table."""
    dense, x = subject.call(subject.model, images), taken(subject, images)
    all_kept = idlefx.convert(subject.encoder, layers=subject.layers, keep=1.0, example_inputs=x)
    idle = idlefx.convert(subject.encoder, layers=subject.layers, keep=KEEP, example_inputs=x)
    answer, costs = with_encoder(subject, idle, images), idlefx.report(idle)
    return idle, {
        "name": subject.name,
        "idling": idling(idle.plan),
        "gmacs": (costs.dense_gmacs, costs.idle_gmacs),
        "keeping all": largest_difference(dense, with_encoder(subject, all_kept, images), relative=False),
        "by masks": largest_difference(by_masks(subject, idle, images), answer),
        "same": subject.same(dense, answer),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """One line for each model, in Markdown."""
    cells = [
        (
            row["name"], row["idling"], " → ".join(f"{gmacs:.3g}" for gmacs in row["gmacs"]),
            f"{row['keeping all']:g}", f"{row['by masks']:.0e}", f"{row['same']:.0%}",
        )
        for row in rows
    ]  # fmt: skip
    return tabulate(cells, HEAD, tablefmt="github", disable_numparse=True)


def draw(idles: list[idlefx.IdleModule], images: Tensor, path: Path) -> Path:
    """Which tokens work in each encoder, one below the other."""
    with TemporaryDirectory() as folder:
        drawn = [idlefx.draw(idle, images, Path(folder) / f"{number}.png") for number, idle in enumerate(idles)]
        parts = [Image.open(part).convert("RGB") for part in drawn]
    sheet = Image.new("RGB", (max(part.width for part in parts), sum(part.height for part in parts)), "white")
    for number, part in enumerate(parts):
        sheet.paste(part, (0, sum(above.height for above in parts[:number])))
    with whole_file(path) as partial:
        sheet.save(partial, "PNG")
    return path


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description="Put converted encoders into models for dense prediction.")
    parser.add_argument("--picture", type=Path, default=PICTURE, help="where to draw which tokens work, a PNG")
    options = parser.parse_args()
    images, idles, rows = scenes(2), [], []
    for build in SUBJECTS:
        idle, row = measure(build(), images)
        print(row["name"], idle.plan, sep="\n\n", end="\n\n", flush=True)
        idles.append(idle)
        rows.append(row)
    print(table(rows), draw(idles, images, options.picture), sep="\n\n")


if __name__ == "__main__":
    main()
