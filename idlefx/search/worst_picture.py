"""The picture that suffers most: what goes into the models, and what the dense and the idling one make of it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from idlefx.reporting.comparison.image_batches import ImageBatch, Name
from idlefx.reporting.comparison.model_calls import evaluating, outputs_of


@dataclass(frozen=True)
class WorstPicture:
    """One picture and one output of it.

    Attributes:
        name: Of the picture: its file, or its place.
        image: As the models take it (channels, height, width).
        output: Name of the output.
        cosine: Of the two.
        dense: What the dense model returns, without its batch.
        idle: What the idling one returns.
    """

    name: Name
    image: Tensor
    output: str
    cosine: float
    dense: Tensor
    idle: Tensor


def take_outputs(
    models: tuple[nn.Module, nn.Module], batches: Sequence[ImageBatch], name: Name, output: str, cosine: float
) -> WorstPicture:
    """Run the dense and the idling model once more, on the batch that has the picture."""
    batch = next(batch for batch in batches if name in batch.names)
    place = list(batch.names).index(name)
    with evaluating(models), torch.no_grad():
        dense, idle = (outputs_of(model, batch, "the model")[output][place].cpu() for model in models)
    tensors = [leaf for leaf in tree_leaves(batch.inputs) if isinstance(leaf, Tensor)]
    image = max(tensors, key=torch.numel)[place].cpu()
    return WorstPicture(name, image, output, cosine, dense, idle)
