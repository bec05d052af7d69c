"""What a converted generated model does beside its outputs: gradients, buffers and modes, or what is said of them."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import idlefx
from tests.models.generated import Config, ViT, build, set_modes, wrap
from tests.support.cases import CLEAR_MARGIN, relative_error

IN_TRAINING = ("train", "frozen_blocks", "frozen_statistics")
OWN_GRADIENT = {
    "reversed": "the autograd function Reverse",
    "reversed_in_blocks": "the autograd function Reverse",
    "hooked": "a hook on a tensor",
    "module_hook": "a backward hook on a module",
}


def refusal_of(config: Config) -> str:
    """Why the whole model cannot be converted, as a pattern; empty if it can."""
    if config.region == "autocast_attention":
        return r"capture: the model switches autocast inside its forward \(at \S+generated/\w+\.py:\d+"
    if config.gradient != "plain" and config.modes in IN_TRAINING:
        return f"train: {OWN_GRADIENT[config.gradient]}.*has gradients of its own"
    return ""


def announcements_of(config: Config) -> list[str]:
    """What must be said when a model is converted, as patterns."""
    said = {
        "frozen_blocks": "`blocks` in eval mode, the model in train mode" if config.dropout else "",
        "frozen_statistics": "`statistics` in eval mode, the model in train mode",
        "sampling": "`sampling` in train mode, the model in eval mode",
    }.get(config.modes, "")
    own = OWN_GRADIENT.get(config.gradient, "")
    return [words for words in (said, own and f"{own}.*for inference only") if words]


@contextmanager
def announced(config: Config) -> Iterator[None]:
    """Hold what is said while a model is converted, each thing once for each conversion, to what must be said."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    messages = {str(warning.message) for warning in caught if warning.category is UserWarning}
    ours = [words for words in messages if "converted" in words or "inference" in words or "batch" in words]
    wanted = announcements_of(config)
    assert len(ours) == len(wanted), ours
    for words in wanted:
        with pytest.raises(AssertionError, match=words):
            raise AssertionError("\n".join(ours))


def given(config: Config) -> nn.Module:
    """The model as it is given to be converted: in its modes, and wrapped."""
    model = build(config)
    set_modes(model, config.modes)
    return wrap(model, config.wrapper)


def in_mode(config: Config, training: bool) -> ViT:
    """The model that a converted one must be like after `.train(training)`."""
    model = build(config).train(training)
    if training == (config.modes in IN_TRAINING):
        set_modes(model, config.modes)
    return model


def seeded(model: nn.Module, x: tuple[Any, ...]) -> Any:
    """What a model returns that draws always the same random numbers."""
    torch.manual_seed(0)
    return model(*x)


def check_flags(idle: nn.Module, config: Config, x: tuple[Any, ...]) -> None:
    """Another value of a flag is refused."""
    name, value = ("flipped", True) if config.flag != "switch" else ("flipped", False)
    image, *rest = x
    others = dict(zip(("other", "gain"), rest, strict=False))
    for other in ({"gain": 3.0}, {name: value}):
        with pytest.raises(idlefx.InputError, match=f"`{next(iter(other))}` was .* cannot be"):
            idle(image, **{**others, **other})


def check_calls(idle: Any, config: Config, reference: Callable[[ViT, bool], Any], x: tuple[Any, ...]) -> bool:
    """Two calls in each mode give the reference's outputs, gradients and buffers; False where rounding decides.

    The reference runs a model on x, with gradients or without; its result has an `output` and a `margin`.
    """
    own = config.gradient != "plain"
    if own:
        with pytest.raises(idlefx.InputError, match="gradients of its own"):
            idle.train()
        with pytest.raises(idlefx.InputError, match="gradients of its own"):
            _loss(idle(*x)).backward()
    modes = [training for training in (False, True) if config.is_deterministic(training) and not (own and training)]
    for training in modes:
        model = in_mode(config, training)
        start = model.state_dict()
        idle.load_state_dict({name: start[name.replace("_orig_mod.", "")] for name in idle.state_dict()})
        idle.train(training)
        for gradients in (False, not own):
            torch.manual_seed(0)
            expected = reference(model, gradients)
            if expected.margin <= CLEAR_MARGIN:
                return False
            with torch.set_grad_enabled(gradients):
                output = seeded(idle, x)
            for ours, theirs in zip(tree_leaves(output), tree_leaves(expected.output), strict=True):
                assert not isinstance(theirs, Tensor) or relative_error(ours, theirs) <= 1e-5
            if gradients:
                _check_gradients(idle, output, model, expected.output)
            theirs_by_name = dict(model.named_buffers())
            for name, ours in idle.named_buffers():
                theirs = theirs_by_name.pop(name.replace("_orig_mod.", ""), ours)  # or a constant of the trace
                assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-6, equal_nan=True), name
                assert ours.requires_grad == theirs.requires_grad, name
            assert not theirs_by_name.keys() & start.keys()
    return True


def _loss(output: Any) -> Tensor:
    return sum(leaf.square().mean() for leaf in tree_leaves(output) if isinstance(leaf, Tensor))


def _gradients(module: nn.Module, output: Any) -> dict[str, Tensor]:
    names, parameters = zip(*module.named_parameters(), strict=True)
    found = torch.autograd.grad(_loss(output), parameters, materialize_grads=True)
    return {name.replace("_orig_mod.", ""): gradient for name, gradient in zip(names, found, strict=True)}


def _check_gradients(idle: nn.Module, output: Any, model: nn.Module, wanted: Any) -> None:
    ours, theirs = _gradients(idle, output), _gradients(model, wanted)
    assert ours.keys() == theirs.keys()
    whole = torch.stack([gradient.norm() for gradient in theirs.values()]).norm()
    for name, gradient in theirs.items():
        assert (ours[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-6 * whole, name
