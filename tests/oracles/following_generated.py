"""Tokens that follow in the models of `tests.models.generated`."""

from collections.abc import Sequence
from unittest.mock import patch

import torch
from torch import Tensor

from idlefx.zoo.reference.first_norm import first_norm
from idlefx.zoo.reference.groups import Groups, Passage, Result, Stage, class_attention, group, join
from tests.models.generated.attention import Attention
from tests.models.generated.vit import ViT
from tests.oracles import generated_reference

Context = tuple[Tensor | None, ...]


def run(model: ViT, plan: Sequence[Stage], inputs: tuple[Tensor, ...], *, gradients: bool = False) -> Result:
    """Run the model with these stages; the others of its blocks run on all tokens.

    Raises:
        ValueError: Something writes the stream inside a stage, which should have ended there.
    """
    config = model.config
    groups: dict[int, Groups] = {}
    passages: list[Passage] = []  # the one under way is the last
    stage_of = {index: stage for stage in plan for index in range(stage.first, stage.end)}

    def images_first(x: Tensor) -> Tensor:
        return x.transpose(0, 1) if config.tokens_first else x

    def through(index: int, x: Tensor, context: Context) -> Tensor:
        block, stage = model.blocks[index], stage_of.get(index)
        if stage is None or stage.kept == config.image_tokens:
            return block(x, *context)
        if index == stage.first:
            before = passages[-1] if stage.joins else None
            entry = x if before is None else images_first(before.stream)
            groups[index] = _grouped(model, index, stage.kept, entry, context, before)
            passages.append(Passage(groups[index], images_first(x)))

        def worked(stream: Tensor, sizes: Tensor) -> Tensor:
            out, *_ = generated_reference.run_block(block, images_first(stream), context, sizes > 0, sizes)
            return images_first(out)

        return images_first(passages[-1].through(images_first(x), worked))

    with patch.object(model, "through", through), torch.set_grad_enabled(gradients):
        output = model(*inputs)
    return Result(output, groups)


@torch.no_grad()
def _grouped(model: ViT, index: int, kept: int, x: Tensor, context: Context, before: Passage | None = None) -> Groups:
    """The grouping at a block that begins with x (B, N, C) or (N, B, C): all tokens, or the workers there are."""
    config, block = model.config, model.blocks[index]
    normalised = first_norm(x, lambda: block(x.clone(), *context))
    likeness = x if normalised is None else normalised
    likeness = likeness.transpose(0, 1) if config.tokens_first else likeness
    everyone = torch.ones(likeness.shape[:2], dtype=torch.bool)
    _, q, k = generated_reference.run_block(block, x, context, everyone)
    attentions = [*block.attentions]
    if config.block == "branches":
        attentions.reverse()  # the block calls its second one first
    cores = len(attentions)
    scaled = zip(q.chunk(cores, 1), k.chunk(cores, 1), map(scale_of, attentions), strict=True)
    received = class_attention(scaled, config.class_at(index))
    evidence = (likeness, received, kept, config.prefix_at(index))
    return group(*evidence) if before is None else join(before.groups, *evidence)


def scale_of(attention: Attention) -> Tensor | float:
    """What products of raw queries and keys are multiplied by, a number or (H, 1, 1)."""
    return attention.temperature.exp() if attention.config.scale.startswith("learned") else attention.scale
