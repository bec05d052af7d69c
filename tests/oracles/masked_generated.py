"""Training with masks, as `masked` does it, of the models of `tests.models.generated`."""

from unittest.mock import patch

import torch
from torch import Tensor

from tests.models import generated
from tests.oracles import generated_reference, masked


def run(model: generated.ViT, plan: dict[int, int], given: tuple[Tensor, ...]) -> masked.Result:
    """Run the model with the blocks of the plan keeping so many image tokens; with gradients."""
    config, found, selected = model.config, [], {}

    def through(index: int, x: Tensor, context: tuple[Tensor | None, ...]) -> Tensor:
        block, prefix, first = model.blocks[index], config.prefix_at(index), config.tokens_first
        if index not in plan:
            return block(x, *context)
        everyone = torch.ones(x.shape[:2][::-1] if first else x.shape[:2], dtype=torch.bool)
        _, q, k = generated_reference.run_block(block, x, context, everyone)
        scores = generated_reference.attention_scores(q, k, prefix, config.class_at(index))
        works, _ = generated_reference.choose(scores.detach(), plan[index], prefix)
        selected[index] = works.nonzero()[:, 1].view(len(works), -1)
        learned = config.scale.startswith("learned")
        scales = [a.temperature.exp() if learned else torch.tensor(a.scale, dtype=q.dtype) for a in block.attentions]
        scale = torch.cat([s.expand(config.heads, 1, 1) for s in scales])
        found.append(masked.token_cut_loss(scale * (q @ k.transpose(-2, -1)), works, prefix))
        worked, *_ = generated_reference.run_block(block, x, context, works)
        return torch.where((works.t() if first else works)[..., None], worked, x)

    with patch.object(model, "through", through):
        output = model(*given)
    return masked.Result(output, torch.stack(found).mean(), selected)
