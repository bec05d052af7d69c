"""Guess example inputs for models whose library says what they eat."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from idlefx.errors import InputError
from idlefx.records import ModelFacts

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "crop_pct": 0.875}
MODES = {1: "L", 3: "RGB"}
EXAMPLE_BATCH = 2  # a batch of one would be traced as a constant


def guess_inputs(model: nn.Module) -> tuple[Any, ModelFacts]:
    """Example inputs for a timm, torchvision or Hugging Face model.

    Returns:
        The inputs (a tensor, or a dict of keyword inputs), and what is known of the model's images and classes.

    Raises:
        InputError: The model does not say which inputs it takes.
    """
    for guess in (_timm, _hugging_face, _torchvision):
        found = guess(model)
        if found is not None:
            size, keyword = found
            parameter = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))
            # A fixed seed of its own: tracing must not disturb the user's random state.
            noise = torch.randn(EXAMPLE_BATCH, *size, generator=torch.Generator().manual_seed(0))
            image = noise.to(parameter.device, parameter.dtype)
            return ({keyword: image} if keyword else image), known_facts(model, size)
    raise InputError(
        f"capture: cannot guess the inputs of {type(model).__name__}; pass example_inputs "
        "(a tensor, a tuple of positional or a dict of keyword inputs)"
    )


def known_facts(model: nn.Module, image_size: tuple[int, ...]) -> ModelFacts:
    """What a model's library knows of its images and classes.

    Args:
        model: Any module.
        image_size: Channels, height and width of its images.
    """
    data = None
    if _is_timm(model):
        from timm.data.config import resolve_model_data_config

        data = {**resolve_model_data_config(model), "input_size": image_size}
        config = model.pretrained_cfg
        names = config.get("label_names") if isinstance(config, dict) else getattr(config, "label_names", None)
    else:
        labels = getattr(getattr(model, "config", None), "id2label", None) or {}
        names = [labels[index] for index in sorted(labels)]
        if names == [f"LABEL_{index}" for index in range(len(names))]:  # what Hugging Face calls them if nobody did
            names = None
    return ModelFacts(image_size, data, tuple(map(str, names)) if names else None)


def _is_timm(model: nn.Module) -> bool:
    config = getattr(model, "pretrained_cfg", None)
    return isinstance(config, dict) or hasattr(config, "input_size")


def call(model: Callable[..., Any], inputs: Any) -> Any:
    """Call a model with a tensor, a tuple of positional or a dict of keyword inputs."""
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def _pair(size: Any) -> tuple[int, int]:
    return (int(size), int(size)) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _timm(model: nn.Module) -> tuple[tuple[int, int, int], str] | None:
    if not _is_timm(model):
        return None
    from timm.data.config import resolve_model_data_config

    channels, height, width = resolve_model_data_config(model)["input_size"]
    # Wherever it is: timm puts a model that returns features into another module.
    embeds = [module for name, module in model.named_modules() if name.rpartition(".")[2] == "patch_embed"]
    size = next((size for module in embeds if (size := getattr(module, "img_size", None))), None)
    if size is not None:
        height, width = _pair(size)
    channels = next((m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)), channels)
    return (channels, height, width), ""


def _hugging_face(model: nn.Module) -> tuple[tuple[int, int, int], str] | None:
    config = getattr(model, "config", None)
    config = getattr(config, "vision_config", None) or config
    if getattr(model, "main_input_name", None) != "pixel_values" or config is None or not hasattr(config, "image_size"):
        return None
    return (getattr(config, "num_channels", 3), *_pair(config.image_size)), "pixel_values"


def _torchvision(model: nn.Module) -> tuple[tuple[int, int, int], str] | None:
    size = getattr(model, "image_size", None)
    return ((3, size, size), "") if isinstance(size, int) else None
