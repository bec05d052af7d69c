"""Train the small Vision Transformer that the package ships.

Every scene is new, so there is nothing to overfit. Over the first third the scenes fade in over white stencils of their
glyphs, and their clutter rises: a model this small does not leave chance on full scenes.
"""

import argparse
import json
import platform
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import safetensors.torch
import timm
import torch
from timm.layers import build_sincos2d_pos_embed
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import Tensor, nn
from tqdm import tqdm

from idlefx.demo.glyphs import DrawnScenes, Glyphs
from idlefx.demo.model import GLYPH_VIT, glyph_vit
from idlefx.utils.files import whole_file

ROUND = 100  # steps whose scenes are drawn at once


def normalised(pixels: Tensor, model: nn.Module) -> Tensor:
    """Images (B, 3, H, W) of pixels as the model takes them."""
    mean, std = (torch.tensor(model.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    return (pixels / 255 - mean) / std


@torch.inference_mode()
def accuracy(model: nn.Module, drawn: DrawnScenes) -> float:
    """The share of scenes whose glyph is named, in percent."""
    named = [model.eval()(normalised(batch, model)).argmax(1) for batch in drawn.pixels.split(256)]
    return 100 * (torch.cat(named) == drawn.labels).float().mean().item()


def train(args: argparse.Namespace) -> tuple[nn.Module, float]:
    """Train from the start, or exactly on from the checkpoint; returns the model and the seconds it took."""
    torch.manual_seed(0)
    model = glyph_vit(pretrained=False)
    model.pos_embed.data[:, 1:] = 0.5 * build_sincos2d_pos_embed(list(model.patch_embed.grid_size), model.embed_dim)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=args.lr, weight_decay=0.05, fused=True)
    schedule, _ = create_scheduler_v2(
        optimizer, num_epochs=args.rounds, warmup_epochs=1, warmup_lr=0.0, updates_per_epoch=ROUND, step_on_epochs=False
    )
    done, seconds = 0, 0.0
    if args.resume:
        state = torch.load(args.checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        done, seconds = state["rounds"], state["seconds"]

    held_out = Glyphs("val", size=args.scenes // 2).draw()
    print("round,clutter,loss,accuracy,seconds", flush=True)
    for number in range(done, args.rounds):
        begun, ease = time.perf_counter(), max(0.0, 1 - 3 * number / args.rounds)
        drawn = Glyphs("train", size=ROUND * args.batch, seed=number, clutter=1 - ease).draw()
        order = torch.randperm(len(drawn.labels), generator=torch.Generator().manual_seed(number)).split(args.batch)
        model.train()
        total = 0.0
        for step, chosen in enumerate(tqdm(order, f"round {number + 1} of {args.rounds}", leave=False, disable=None)):
            schedule.step_update(number * ROUND + step)
            images = (1 - ease) * drawn.pixels[chosen] + ease * 255 * drawn.masks[chosen].unsqueeze(1)
            loss = nn.functional.cross_entropy(model(normalised(images, model)), drawn.labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            total += loss.item()
        seconds += time.perf_counter() - begun
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "rounds": number + 1}
        with whole_file(args.checkpoint) as partial:
            torch.save(state | {"seconds": seconds}, partial)
        percent = accuracy(model, held_out)
        print(f"{number + 1},{1 - ease:.2f},{total / ROUND:.4f},{percent:.2f},{seconds:.0f}", flush=True)
    return model, seconds


def account(args: argparse.Namespace, seconds: float, percent: float, scenes: int) -> dict[str, Any]:
    """How the model was trained, for whoever finds its weights."""
    return {
        "command": f"python examples/train_glyphs.py --rounds {args.rounds} --batch {args.batch} --lr {args.lr}",
        "data": "idlefx.data.Glyphs('train', seed=round), new scenes in every round",
        "scenes_seen": args.rounds * ROUND * args.batch,
        "minutes": round(seconds / 60),
        "machine": f"{args.machine}, {torch.get_num_threads()} thread(s)",
        "date": datetime.now(timezone.utc).date().isoformat(),
        "accuracy_percent": round(percent, 2),
        "measured_on": f"idlefx.data.Glyphs('test', size={scenes}), never seen in training",
        "versions": {"python": platform.python_version()}
        | {library.__name__: library.__version__ for library in (torch, timm, np, PIL)},
        "note": args.note,
    }


def main() -> None:
    """Train, measure on scenes nobody has seen, and write the weights with their account."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=50, help=f"rounds of {ROUND} steps")
    parser.add_argument("--batch", type=int, default=128, help="scenes per step")
    parser.add_argument("--lr", type=float, default=1.5e-3, help="peak learning rate of AdamW; warm-up, then cosine")
    parser.add_argument("--checkpoint", type=Path, default=Path("train_glyphs.pt"), help="written after every round")
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint")
    parser.add_argument("--scenes", type=int, default=4800, help="held-out ones at the end; half as many in between")
    parser.add_argument("--machine", default=platform.machine(), help="what it runs on, for the account")
    parser.add_argument("--note", default="", help="what else the account should say")
    parser.add_argument("--output", type=Path, default=GLYPH_VIT, help="the weights; the account goes beside them")
    args = parser.parse_args()

    model, seconds = train(args)
    test = Glyphs("test", size=args.scenes).draw()
    told = account(args, seconds, accuracy(model, test), len(test.labels))
    with whole_file(args.output) as weights, whole_file(args.output.with_suffix(".json")) as text:
        header = {name: value if isinstance(value, str) else json.dumps(value) for name, value in told.items()}
        weights.write_bytes(safetensors.torch.save(model.state_dict(), metadata={"format": "pt", **header}))
        text.write_text(json.dumps(told, indent=2) + "\n")
    print(json.dumps(told, indent=2))


if __name__ == "__main__":
    main()
