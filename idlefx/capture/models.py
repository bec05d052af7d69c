"""Models by name, for the shell."""

import importlib
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import nn

from idlefx.errors import InputError


def load_model(
    name: str, *, pretrained: bool = False, checkpoint: str | Path | None = None, img_size: int | None = None
) -> nn.Module:
    """Make a model, in evaluation mode.

    Args:
        name: A timm name (`deit_small_patch16_224`), or `package.module:callable` that returns a module.
        pretrained: Whether timm fetches its weights.
        checkpoint: Weights to load, safetensors.
        img_size: Side of the images, where it is not the model's own.

    Raises:
        InputError: There is no such model, weight or file, or they do not fit together.
    """
    if ":" not in name:
        model = _from_timm(name, pretrained, img_size)
    elif pretrained or img_size:
        raise InputError(f"model: {name} is yours; let it choose its weights and image size itself")
    else:
        model = _from_callable(name)
    if checkpoint is not None:
        load_weights(model, Path(checkpoint))
    return model.eval()


def _from_timm(name: str, pretrained: bool, img_size: int | None) -> nn.Module:
    import timm

    if not timm.is_model(name):
        close = get_close_matches(name, timm.list_models(), 3, 0.4)
        raise InputError(
            f"model: timm has no {name}; close to it: {', '.join(close) or 'nothing'}; "
            "a model of your own is named package.module:callable"
        )
    options: dict[str, Any] = {} if img_size is None else {"img_size": img_size}
    try:
        model: nn.Module = timm.create_model(name, pretrained=pretrained, **options)
    except (OSError, RuntimeError, TypeError, ValueError, AssertionError) as error:
        hint = "; idlefx.models:glyph_vit is a small model that comes with its weights" if pretrained else ""
        raise InputError(f"model: timm cannot make {name}: {error}{hint}") from error
    return model


def _from_callable(name: str) -> nn.Module:
    module, _, attribute = name.partition(":")
    try:
        model = getattr(importlib.import_module(module), attribute)()
    except (ImportError, AttributeError, TypeError) as error:
        raise InputError(f"model: cannot make {name}: {error}") from error
    if not isinstance(model, nn.Module):
        raise InputError(f"model: {name} returned a {type(model).__name__}, expected a torch.nn.Module")
    return model


def load_weights(model: nn.Module, checkpoint: Path) -> None:
    """Load weights, safetensors, that must be those of the model and no others.

    Raises:
        InputError: The file cannot be read, or does not fit.
    """
    try:
        missing, unexpected = safetensors.torch.load_model(model, checkpoint, strict=False)
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        first = " ".join(str(error).split("\n")[:2])  # torch lists every weight that differs
        raise InputError(f"checkpoint: cannot load {checkpoint}: {first}") from error
    if missing or unexpected:
        names = ", ".join(sorted([*missing, *unexpected])[:5])
        raise InputError(
            f"checkpoint: {checkpoint} does not fit the model: {len(missing)} weights missing, "
            f"{len(unexpected)} unexpected ({names}, …)"
        )
