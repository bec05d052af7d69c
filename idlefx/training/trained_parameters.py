"""Which parameters are trained, and in which groups the optimiser takes them."""

from typing import Any

from torch import nn

from idlefx.errors import InputError
from idlefx.runtime.module import IdleModule, conversion_of
from idlefx.training.config import Settings
from idlefx.training.feature_taps import token_parameters


def trained_parameters(idle: IdleModule, settings: Settings) -> set[str]:
    """Names of the parameters that the settings train, of those that can be.

    Raises:
        InputError: There are none.
    """
    trained = {name: p for name, p in idle.named_parameters() if p.requires_grad}
    frozen = set[str]() if settings.train_all else token_parameters(idle)
    chosen = trained.keys() - frozen
    if settings.parameters == "norms":
        chosen = {name for name in chosen if trained[name].ndim <= 1}
    elif settings.parameters == "stages":
        paths = tuple(f"{step.path}." for step in conversion_of(idle).plan if step.idles and step.path)
        if paths:  # else the blocks are no modules of their own, and all is trained
            chosen = {name for name in chosen if name.startswith(paths)}
    if not chosen:
        raise InputError(
            f"settings: parameters={settings.parameters!r} leaves nothing to train in this model; take 'all', and see "
            "that its parameters require gradients"
        )
    return chosen


def parameter_groups(idle: IdleModule, student: nn.Module, settings: Settings) -> list[dict[str, Any]]:
    """Groups of an optimiser: with and without weight decay, by layer where the learning rates fall, vectors apart.

    Raises:
        InputError: They shall fall, but the model does not say which parameters belong to which layer.
    """
    from timm.optim import param_groups_layer_decay, param_groups_weight_decay

    undecayed: set[str] = getattr(idle, "no_weight_decay", set)()  # the student, a plain graph, cannot say
    options: dict[str, Any] = {"weight_decay": settings.weight_decay, "no_weight_decay_list": undecayed}
    if settings.layer_decay == 1.0:
        return _vectors_apart(param_groups_weight_decay(student, **options), settings.vector_lr)
    if not hasattr(idle, "group_matcher"):
        raise InputError(
            "settings: layer_decay is for models that say which parameters belong to which layer (group_matcher, as "
            "timm's do), and this one does not; leave it out"
        )
    groups = param_groups_layer_decay(idle, layer_decay=settings.layer_decay, **options)
    return _vectors_apart(groups, settings.vector_lr)


def _vectors_apart(groups: list[dict[str, Any]], factor: float) -> list[dict[str, Any]]:
    """The same groups, where vectors shall learn so much faster in groups of their own."""
    if factor == 1.0:
        return groups
    split = list[dict[str, Any]]()
    for group in groups:
        for vectors in (False, True):
            if chosen := [p for p in group["params"] if (p.ndim <= 1) == vectors]:
                scale = group.get("lr_scale", 1.0) * (factor if vectors else 1.0)
                split.append({**group, "params": chosen, "lr_scale": scale})
    return split
