"""Published token reduction from checkouts of the user, to be timed beside idling."""

import importlib
import sys
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from idlefx.capture.inputs import call
from idlefx.errors import InputError

CLOSE = 0.05  # relative difference of outputs with nothing merged, in the number type of the model
MOST = 1024  # tokens to merge in a block, at most


@dataclass(frozen=True)
class Baseline:
    """Another model to be timed in the same run: its name, itself, and its GMACs for one image."""

    name: str
    model: nn.Module
    gmacs: float


def open_baselines(given: Sequence[str]) -> dict[str, Callable[[nn.Module], None]]:
    """The functions that patch a model, by the name of the peer.

    Args:
        given: `tome=PATH` each, the path being a checkout of github.com/facebookresearch/ToMe. Its code is run.

    Raises:
        InputError: A peer is unknown, or its checkout cannot be used.
    """
    found = {}
    for entry in given:
        name, equals, path = entry.partition("=")
        if name not in KNOWN or not equals:
            raise InputError(
                f"peer: {entry} is neither first, rest nor follow, nor of the form NAME=PATH; "
                f"known are {', '.join(KNOWN)}"
            )
        found[name] = KNOWN[name](Path(path).expanduser().resolve())
    return found


def make_baseline(
    name: str, patch: Callable[[nn.Module], None], dense: nn.Module, example: Any, gmacs: float
) -> Baseline:
    """A patched copy of a model that merges so many tokens in every block that it costs about what idling costs.

    Args:
        name: What it is called.
        patch: From `open_baselines`; the patched model merges `model.r` tokens in every block.
        dense: The model, in evaluation mode.
        example: A tensor, a tuple of positional or a dict of keyword inputs.
        gmacs: What it should cost for one image, in units of 1e9.

    Raises:
        InputError: It fails on this model, changes its output before anything is merged, or saves nothing.
    """
    twin: Any = deepcopy(dense)
    try:
        patch(twin)
        with torch.inference_mode():
            twin.r = 0
            error, whole = _difference(call(dense, example), call(twin, example)), _gmacs(twin, example)
            merged = _fitting(twin, example, gmacs)
    except Exception as failure:
        first = str(failure).strip().partition("\n")[0]
        raise InputError(f"peer {name}: it fails on this model, {type(failure).__name__}: {first}") from failure
    if not error <= CLOSE:
        raise InputError(
            f"peer {name}: merging nothing it should compute what the model does, but differs by {error:.2g}; "
            "it does not know this kind of model"
        )
    cost = _gmacs(twin, example)
    if not cost < whole:
        raise InputError(f"peer {name}: merging {merged} tokens a block saves nothing; it does not know this model")
    return Baseline(name, twin, cost)


def _tome(path: Path) -> Callable[[nn.Module], None]:
    """`apply_patch` in tome/patch/timm.py of github.com/facebookresearch/ToMe (Bolya et al., arXiv:2210.09461)."""
    if not (path / "tome" / "patch" / "timm.py").is_file():
        raise InputError(
            f"peer tome: {path} has no tome/patch/timm.py; clone facebookresearch/ToMe and name its folder"
        )
    sys.path.insert(0, str(path))
    try:
        package = importlib.import_module("tome.patch")
        patch: Callable[[nn.Module], None] = package.timm
    except Exception as error:  # whatever code of others raises
        raise InputError(f"peer tome: {path} cannot be imported, {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(str(path))
    home = Path(str(package.__file__)).resolve()
    if path not in home.parents:
        raise InputError(f"peer tome: {home.parents[1]} was imported instead of {path}; name that one, or uninstall it")
    return patch


KNOWN = {"tome": _tome}


def _fitting(twin: Any, example: Any, gmacs: float) -> int:
    """Set r so that the GMACs come closest; they fall as r grows."""
    few, many = 0, 1
    while many < MOST and _cost(twin, example, many) > gmacs:
        few, many = many, 2 * many
    while many - few > 1:
        middle = (few + many) // 2
        few, many = (middle, many) if _cost(twin, example, middle) > gmacs else (few, middle)
    twin.r = min((few, many), key=lambda r: abs(_cost(twin, example, r) - gmacs))
    return int(twin.r)


def _cost(twin: Any, example: Any, merged: int) -> float:
    twin.r = merged
    return _gmacs(twin, example)


def _gmacs(model: nn.Module, example: Any) -> float:
    images = max(len(t) for t in tree_leaves(example) if isinstance(t, Tensor) and t.ndim)
    with FlopCounterMode(display=False) as counter:
        call(model, example)
    return counter.get_total_flops() / 2e9 / images


def _difference(wanted: Any, found: Any) -> float:
    pairs = zip(tree_leaves(wanted), tree_leaves(found), strict=True)
    return max(float((a - b).norm() / a.norm()) for a, b in pairs if isinstance(a, Tensor))
