"""Run the Triton kernels on a machine without a GPU, by Triton's interpreter, against what they stand for.

`python -m tests.support.interpreted`, with TRITON_INTERPRET=1 in its environment, which has to be there before
Triton is imported; so it is a process of its own. It prints, as JSON, the largest differences by kernel.
"""

import json
import random

import torch

from idlefx.runtime import following, nearest, ops, triton_ops

triton_ops.wrap_triton = lambda kernel: kernel  # it takes no interpreted ones before torch 2.15
KINDS = (torch.float32, torch.float16)  # the interpreter multiplies no bfloat16


def choices(rounds: int, sign: float = 1.0) -> int:
    """How many positions and places differ from those of the scores times the sign.

    There are ties, infinities, NaN, late prefixes and choices among some tokens only.
    """
    draw, wrong = random.Random(0), 0
    for _ in range(rounds):
        tokens, images = draw.randint(2, 90), draw.randint(1, 3)
        prefix = tuple(sorted(draw.sample(range(tokens), draw.randint(0, min(3, tokens - 1)))))
        if draw.random() < 0.5:
            prefix = tuple(range(len(prefix)))
        free = [p for p in range(tokens) if p not in prefix]
        some = sorted([*prefix, *draw.sample(free, draw.randint(1, len(free)))])
        among = torch.tensor([some] * images) if draw.random() < 0.5 else None
        kept = draw.randint(1, len(free) if among is None else len(some) - len(prefix))
        scores = torch.randn(images, tokens)
        special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-40, -1e-40])
        odd = torch.rand(images, tokens) < draw.choice([0, 0.5])
        scores = torch.where(odd, special[torch.randint(7, odd.shape)], scores.to(draw.choice(KINDS)).float())
        wanted = ops.choose_tokens(scores * sign, prefix, kept, among)
        found = ops.choose_tokens_in_one(scores, prefix, kept, among)
        wrong += sum(int((a != b).sum()) for a, b in zip(wanted, found, strict=True))
    return wrong


def queries(rounds: int, moved: int = 0) -> dict[str, float]:
    """The largest difference of a query by number type, of numbers about as large as 1, to that of a token beside."""
    draw, worst = random.Random(0), dict.fromkeys(map(str, KINDS), 0.0)
    for _ in range(rounds):
        kind, dim, images = draw.choice(KINDS), draw.choice([0, 1]), draw.randint(1, 40)
        width, outputs = draw.randint(8, 150), draw.randint(1, 80)
        norm_bias, bias = (torch.randn(n, dtype=kind) if draw.random() < 0.7 else None for n in (width, outputs))
        sizes = [(images, draw.randint(2, 5), width) for _ in range(draw.randint(1, 2))]
        addends = [torch.randn(size, dtype=kind).transpose(0, 1 - dim).contiguous() for size in sizes]
        weight = (torch.randn(3 * outputs, width) / width**0.5).to(kind)[outputs : 2 * outputs]
        position, scale = draw.randint(0, 1), torch.randn(width, dtype=kind)
        layers = (dim, scale, norm_bias, 1e-6, weight, bias)
        wanted = ops.norm_linear(addends, (position + moved) % 2, *layers)
        away = torch.ops.idlefx.norm_linear(addends, position, *layers) - wanted
        worst[str(kind)] = max(worst[str(kind)], away.abs().max().item())
    return worst


def groups(rounds: int, away: int = 0) -> dict[str, float]:
    """How many tokens find another worker, and the largest differences of cosines, means and sizes.

    Products are whole numbers, so that several workers are the nearest. With `away`, the first image token is taken for
    one of the prefix, and all follow the first worker.
    """
    draw, worst = random.Random(0), dict.fromkeys(("leaders", "places", "cosines", "means", "sizes"), 0.0)
    for _ in range(rounds):
        images, width, leading = draw.randint(1, 3), draw.randint(3, 150), draw.randint(0, 3)
        image_tokens = draw.randint(2, 90)
        kept, tokens = draw.randint(1, image_tokens - 1), leading + image_tokens
        x, unit = torch.randn(images, tokens, width), torch.randint(-2, 3, (images, tokens, width)).float()
        spread = nearest.anchors(image_tokens, kept)
        prefix, working = tuple(range(leading)), leading + kept
        image = torch.stack([torch.randperm(image_tokens) + leading for _ in range(images)])
        order = torch.cat([torch.arange(leading).expand(images, -1), image], 1)
        parts = order.split([working, tokens - working], 1)
        order = torch.cat([part.sort(1).values for part in parts], 1)
        leaders, place = nearest.nearest_workers(unit, order, working, prefix)
        x = x.to(draw.choice(KINDS))
        x = x if draw.random() < 0.5 else x.transpose(0, 1).contiguous().transpose(0, 1)
        stand_for = draw.choice([None, torch.randint(1, 9, (images, tokens)).float()])
        wanted = (
            leaders, place, nearest.likeness_to_anchors(unit, prefix, spread),
            *following.average_groups(x, order[:, :working], order, leaders, stand_for=stand_for),
        )  # fmt: skip
        _, bound, _, back, modulus = spread
        found = (
            *torch.ops.idlefx.nearest_workers(unit, order, working, leading + away),
            torch.ops.idlefx.likeness_to_anchors(unit, leading + away, bound, back, modulus),
            *torch.ops.idlefx.average_groups(x, order, leaders if not away else leaders * 0, stand_for),
        )
        for name, a, b in zip(worst, wanted, found, strict=True):
            apart = (a != b).sum() if name in ("leaders", "places") else (a.float() - b.float()).abs().max()
            worst[name] = max(worst[name], float(apart))
    return worst


if __name__ == "__main__":
    torch.manual_seed(0)
    right = {"choices": choices(120), "queries": queries(40), "groups": groups(40)}
    wrong = {"choices": choices(20, -1.0), "queries": queries(10, 1), "groups": groups(10, 1)}
    print(json.dumps({"right": right, "wrong": wrong}))
