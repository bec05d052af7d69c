"""The files of a run: its plan, its weights, and all that continues it exactly.

`plan.json` says what is trained and how; `best.safetensors` and `last.safetensors` are weights under the names of
the original model; `training.pt` holds what a continued run needs, in one file, so that it is whole or old.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from idlefx.errors import InputError, first_line
from idlefx.runtime.module import IdleModule, conversion_of
from idlefx.training.config import LABELLED, Settings
from idlefx.training.feature_taps import classes_of
from idlefx.utils.files import whole_file
from idlefx.utils.versions import versions

PLAN, STATE, BEST, LAST = "plan.json", "training.pt", "best.safetensors", "last.safetensors"


def fingerprint(model: nn.Module) -> str:
    """A short name for the weights of a model; other weights, another name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def plan_of_run(
    dense: nn.Module, idle: IdleModule, settings: Settings, facts: Mapping[str, Any], options: Mapping[str, Any]
) -> dict[str, Any]:
    """What `plan.json` says of a run.

    Args:
        dense: The model as it was.
        idle: The converted model.
        settings: How it is trained.
        facts: What else must be the same when the run is continued.
        options: What may be another then: the options of the shell, where the versions are told too.
    """
    conversion = conversion_of(idle)
    return {
        "plan": {
            **facts,
            **conversion.options.to_dict(),
            "dense_weights": fingerprint(dense),
            "image_size": list(conversion.facts.image_size),
            "classes": classes_of(idle),
            "blocks": [asdict(step) for step in conversion.plan],
            **asdict(settings),
        },
        "options": dict(options),
        "versions": versions("timm"),
    }


def start(directory: Path, plan: Mapping[str, Any], *, resume: bool = False) -> None:
    """Make the directory of a new run, or see that the run there is of the same plan.

    Raises:
        InputError: There is a run already, or one of another model or plan, or the directory cannot be written.
    """
    if resume:
        _check_same(directory, read_plan(directory)["plan"], json.loads(json.dumps(plan["plan"])))
        return
    if (directory / PLAN).exists():
        raise InputError(f"out: {directory} holds a run; continue it with --resume {directory}, or name another --out")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with whole_file(directory / PLAN) as partial:
            partial.write_text(json.dumps(plan, indent=2) + "\n")
    except OSError as error:
        raise InputError(f"out: cannot write into {directory}: {error.strerror}; name another --out") from error


def read_plan(directory: Path) -> dict[str, Any]:
    """The plan of a run.

    Raises:
        InputError: There is no run.
    """
    if not (directory / PLAN).is_file():
        raise InputError(f"resume: there is no run in {directory}; name the directory that holds {PLAN}")
    try:
        plan: dict[str, Any] = json.loads((directory / PLAN).read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"resume: cannot read {directory / PLAN}: {error}") from error
    return plan


def _check_same(directory: Path, there: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    since = {**asdict(Settings()), **LABELLED}  # what settings that a run of an older version does not name are
    differing = [key for key in now if there.get(key, since.get(key)) != now[key]]
    if differing:
        differing = [key for key in differing if key != "blocks"] or differing  # they follow from the others
        what = "; ".join(f"{key} is {_short(there.get(key))} there, {_short(now[key])} now" for key in differing)
        raise InputError(f"resume: {directory} is a run of another model or plan: {what}")


def _short(fact: Any) -> str:
    text = json.dumps(fact)
    return text if len(text) <= 60 else text[:57] + "…"


def save(directory: Path, state: Mapping[str, Any], weights: nn.Module, told: Mapping[str, Any], *, best: bool) -> None:
    """Write a checkpoint.

    Args:
        directory: Of the run.
        state: Tensors, numbers and containers of them: all that a continued run needs.
        weights: The model as it is to be used.
        told: What is worth telling of the weights; goes into the header of the file.
        best: Whether there were no better weights.

    Raises:
        InputError: The disk is full or gone; the last whole checkpoint is still there.
    """
    header = {key: str(value) for key, value in told.items()}
    with _refusing(directory):
        with whole_file(directory / STATE) as partial:
            torch.save(dict(state), partial)
        for name in (LAST, BEST) if best else (LAST,):
            with whole_file(directory / name) as partial:
                safetensors.torch.save_model(weights, str(partial), metadata=header)


def save_best(directory: Path, weights: Mapping[str, Tensor]) -> None:
    """Write the best weights alone.

    Raises:
        InputError: The disk is full or gone.
    """
    with _refusing(directory), whole_file(directory / BEST) as partial:
        whole = {name: value.contiguous() for name, value in weights.items()}
        safetensors.torch.save_file(whole, str(partial), metadata={"format": "pt"})


@contextmanager
def _refusing(directory: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError, safetensors.SafetensorError, InputError) as error:
        raise InputError(
            f"checkpoint: cannot write into {directory}: {first_line(error)}; the last whole checkpoint is still "
            f"there: make room, then --resume {directory}"
        ) from error


def load(directory: Path) -> dict[str, Any]:
    """The state of a run, in main memory.

    Raises:
        InputError: There is none, or it cannot be read.
    """
    path = directory / STATE
    if not path.is_file():
        raise InputError(f"resume: {directory} has no {STATE}: the run ended before its first checkpoint; start anew")
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        raise InputError(f"resume: cannot read {path}: {first_line(error)}") from error
    return state
