"""The loss of a Hugging Face model that was traced without labels, for calls with them.

Such a model computes its loss outside of its layers, by a function of labels, logits and its configuration.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

Loss = Callable[..., Any]

LABELS = "labels"


def with_loss(forward: Callable[..., Any], loss: Loss | None) -> Callable[..., Any]:
    """A forward that takes labels too, by keyword, and adds the loss to its output where it is given some.

    Args:
        forward: Of a converted model, which takes none.
        loss: Computes the loss of labels, logits and configuration; None if the model has no such function.
    """
    if loss is None:
        return forward

    @functools.wraps(forward)
    def forward_with_loss(self: Any, *args: Any, **kwargs: Any) -> Any:
        labels, output = kwargs.get(LABELS), forward(self, *args, **without_labels(kwargs, loss))
        return output if labels is None else joined(loss(labels, logits_of(output), self.config), output)

    return forward_with_loss


def without_labels(kwargs: Mapping[str, Any], loss: Loss | None) -> Mapping[str, Any]:
    """What of the inputs by keyword is for the graph."""
    return kwargs if loss is None else {name: value for name, value in kwargs.items() if name != LABELS}


def logits_of(output: Any) -> Any:
    """The logits in what a Hugging Face model returns without labels, a tuple or an output with names."""
    return output[0] if isinstance(output, tuple) else output.logits


def joined(loss: Any, output: Any) -> Any:
    """What such a model returns with labels."""
    return (loss, *output) if isinstance(output, tuple) else type(output)(loss=loss, **output)
