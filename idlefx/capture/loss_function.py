"""The function by which a Hugging Face model computes its loss, if it does so outside of its layers."""

import copy
import inspect
import sys
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only

from idlefx.capture.observation import Args
from idlefx.graph.state import buffers_kept
from idlefx.runtime.labels import LABELS, Loss, joined, logits_of


def loss_function(model: nn.Module, inputs: Args) -> Loss | None:
    """What computes the loss, if the model returns with labels just what it returns without, and this loss.

    It is tried on the example, in the mode that the model is in; the model should draw no random numbers in it.

    Args:
        model: A model whose forward may take labels.
        inputs: Without labels.

    Returns:
        A function of labels, logits and configuration; None where the model has none, or does otherwise.
    """
    parameter = inspect.signature(model.forward).parameters.get(LABELS)
    if parameter is None or parameter.default is not None or not hasattr(type(model), "loss_function"):
        return None
    if not hasattr(getattr(model, "config", None), "problem_type"):
        return None
    loss: Any = getattr(model, "loss_function")  # noqa: B009  # which nn.Module does not have
    home = sys.modules.get(getattr(loss, "__module__", ""))
    by_name = getattr(home, getattr(loss, "__name__", ""), None) is loss  # else no file could name it
    return loss if by_name and _computes_the_loss(loss, model, inputs) else None


def _computes_the_loss(loss: Loss, model: Any, inputs: Args) -> bool:
    args, kwargs = tree_map_only(torch.Tensor, torch.clone, inputs)
    config, problem = copy.deepcopy(model.config), model.config.problem_type
    try:
        with torch.no_grad(), torch.random.fork_rng([]), buffers_kept(model):
            without = model(*args, **kwargs)
            logits = logits_of(without)
            classes = problem == "single_label_classification" or (problem is None and logits.shape[-1] > 1)
            labels = logits.argmax(-1) if classes else torch.zeros_like(logits)
            wanted = tree_leaves(model(*args, **kwargs, **{LABELS: labels}))
            computed = tree_leaves(joined(loss(labels, logits, config), without))
    except Exception:  # labels of another kind, or an output that is not of this form
        return False
    finally:
        model.config.problem_type = problem  # which such models write down when they see their first labels
    return len(wanted) == len(computed) and all(_same(a, b) for a, b in zip(wanted, computed, strict=True))


def _same(one: Any, other: Any) -> bool:
    return one.equal(other) if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor) else one is other
