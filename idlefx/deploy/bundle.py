"""All that a converted model needs to be used, fine-tuned and judged, in one directory."""

import inspect
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from string import Template
from typing import Any

import safetensors.torch
import torch
from matplotlib import cbook
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from idlefx.analysis.image_input import takes_bytes
from idlefx.capture.inputs import EXAMPLE_BATCH, MODES, guess_inputs
from idlefx.capture.models import load_model
from idlefx.deploy.artifacts import package
from idlefx.deploy.parity import check_parity, example_of
from idlefx.errors import InputError, ParityError, first_line
from idlefx.graph.state import wrapper_kind
from idlefx.options import AUTO
from idlefx.pipeline import convert
from idlefx.planning.selectors import find_selector
from idlefx.reporting.cost_report import report
from idlefx.reporting.images import Photo
from idlefx.reporting.token_map import draw
from idlefx.runtime.conversion import Conversion
from idlefx.runtime.module import IdleModule, conversion_of, converted
from idlefx.utils.versions import VERSION, versions

ARTIFACT, PLAN, WEIGHTS, REPORT, PICTURE, SCRIPT = (
    "model.pt2", "plan.json", "weights.safetensors", "report.md", "tokens.png", "finetune.py",
)  # fmt: skip
TEMPLATE = Path(__file__).with_name("finetune.py.template")


def emit(
    idle: IdleModule,
    directory: str | Path,
    *,
    model: str | None = None,
    images: Photo | Sequence[Photo] | Tensor | None = None,
    **options: Any,
) -> Path:
    """Write a converted model with all that belongs to it; whole or not at all.

    The directory holds `model.pt2`, the artifact that `load` runs; `weights.safetensors`, under the original names;
    `plan.json`; `report.md` with its picture `tokens.png`; and `finetune.py`, a script that tunes this very model by
    this very plan and packages it again: only the line that names the data is to be changed.

    Args:
        idle: A converted model.
        directory: Where to; made, and refused if it holds files already.
        model: What makes the dense model again, as a timm name or `package.module:callable`; by default what the
            model says of itself. Its weights come from `weights.safetensors`.
        images: For the picture, as `draw` takes them; by default a portrait.
        **options: For `package`.

    Returns:
        The directory.

    Raises:
        InputError: The directory cannot be written or is not empty, the model cannot be made again, an option is wrong.
        ParityError: The artifact does not compute what the model does.
    """
    idle = converted(idle)
    conversion = conversion_of(idle)
    if takes_bytes(idle.graph):
        raise InputError(
            "emit: the model takes uint8 images and normalises them itself, but the script tunes on images that are "
            "normalised already; use package, or convert the part of the model that takes such images"
        )
    if conversion.calls.arrays:
        raise InputError(
            f"emit: the script cannot give the model arrays, and it takes {', '.join(conversion.calls.arrays)}; use "
            "package, or convert a module that holds them"
        )
    if kind := wrapper_kind(idle.parameters()):
        raise InputError(
            f"emit: weights of the model are {kind}, which no file of weights holds; emit the model before it is "
            "quantised, or package it alone"
        )
    with _whole_directory(Path(directory)) as partial:
        name = model or conversion.origin
        safetensors.torch.save_model(idle, str(partial / WEIGHTS))
        making = _made_again(name, partial / WEIGHTS, idle)
        package(idle, partial / ARTIFACT, **options)
        steps = [asdict(step) for step in conversion.plan]
        told = {"model": name, **conversion.options.to_dict(), "blocks": steps, "versions": versions()}
        (partial / PLAN).write_text(json.dumps(told, indent=2) + "\n")
        (partial / SCRIPT).write_text(_script(name, making, conversion, options))
        pictured = _draw(idle, images, partial / PICTURE)
        (partial / REPORT).write_text(_report(idle, name, pictured))
    return Path(directory)


def check_directory(path: str | Path) -> None:
    """Refuse what is there already.

    Raises:
        InputError: It is a file, or a directory with something in it.
    """
    target = Path(path).resolve()
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise InputError(f"emit: {target} is there already; name a directory that is not")


@contextmanager
def _whole_directory(target: Path) -> Iterator[Path]:
    """A directory to write into that takes the place of `target` once the block has succeeded."""
    check_directory(target)
    target = target.resolve()  # `.` has no name, and a link is none to be replaced
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        partial.replace(target)
    except OSError as error:
        raise InputError(f"emit: cannot write {target}: {error.strerror or error}; name another directory") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _made_again(name: str, weights: Path, idle: IdleModule) -> dict[str, Any]:
    """The options of `load_model` that make a model again that computes what this one did before it was converted."""
    conversion = conversion_of(idle)
    image_size = conversion.facts.image_size
    refusals = []
    if name.startswith("__main__:"):  # which will be the script
        raise InputError(
            f"emit: {name} is defined in the program itself; move it into a module, which the script can import, and "
            "name what makes it, model='package.module:callable'"
        )
    tries: list[dict[str, Any]] = [{}, {"img_size": image_size[-1]}] if ":" not in name else [{}]
    for options in tries:
        try:
            made = load_model(name, checkpoint=weights, **options)
            if conversion.inputs_guessed and guess_inputs(made)[1].image_size != image_size:
                refusals.append(f"its images are {guess_inputs(made)[1].image_size} instead of {image_size}")
            elif not _same(made, idle):
                refusals.append("with the same weights it computes something else")
            else:
                return options
        except InputError as error:
            refusals.append(str(error))
    raise InputError(
        f"emit: the script could not make this model again as {name}: {refusals[0]}; name what makes it, "
        "model='package.module:callable' (in the shell --model)"
    )


def _same(made: nn.Module, idle: IdleModule) -> bool:
    """Whether a model computes what another did before it was converted."""
    source = conversion_of(idle).evaluation.source
    args, kwargs = example_of(idle)
    image = max((leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)), key=Tensor.numel)
    dense = fx.GraphModule(idle, deepcopy(source))
    try:
        check_parity(dense, made.to(image.device, image.dtype), "other", (args, kwargs))
    except ParityError:
        return False
    except Exception as error:  # a model raises what it likes
        raise InputError(f"it does not run: {first_line(error)}") from error
    return True


def _script(name: str, making: dict[str, Any], conversion: Conversion, options: dict[str, Any]) -> str:
    selector = conversion.options.selector
    size = ", ".join(map(str, (EXAMPLE_BATCH, *conversion.facts.image_size)))
    imports = "" if selector == AUTO else _home_of(find_selector(selector).function)
    return Template(TEMPLATE.read_text()).substitute(
        model=name,
        version=VERSION,
        script=SCRIPT,
        imports=imports and f"\n        import {imports}  # registers the token score\n",
        model_name=repr(name),
        weights=WEIGHTS,
        img_size="".join(f", {key}={value!r}" for key, value in making.items()),
        example=None if conversion.inputs_guessed else f"torch.randn({size}, device=world.device)",
        call=_arguments(conversion.options.to_dict(), convert),
        options="".join(f", {each}" for each in [_arguments(options, package)] if each),
    )


def _arguments(given: Mapping[str, Any], function: Callable[..., Any]) -> str:
    """Keyword arguments as a script spells them, without those that are the default of the function."""
    defaults = {key: parameter.default for key, parameter in inspect.signature(function).parameters.items()}
    plain = {key: str(value) if isinstance(value, torch.device) else value for key, value in given.items()}
    return ", ".join(f"{key}={value!r}" for key, value in plain.items() if value != defaults.get(key))


def _home_of(score: Callable[..., Any]) -> str:
    """The module that a script has to import for a token score, if it is not built in."""
    if score.__module__ == "__main__":
        raise InputError(
            f"emit: the token score `{score.__name__}` is defined in the program itself; move it into a module, which "
            "the script can import"
        )
    return "" if score.__module__.startswith("idlefx.") else score.__module__


def _draw(idle: IdleModule, images: Photo | Sequence[Photo] | Tensor | None, path: Path) -> bool:
    """The picture, if there is anything to be seen on it."""
    if images is None:
        if conversion_of(idle).facts.image_size[0] not in MODES:
            return False
        images = cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)
    if not any(step.idles for step in conversion_of(idle).plan):
        return False
    draw(idle, images, path)
    return True


def _report(idle: IdleModule, name: str, pictured: bool) -> str:
    plan = conversion_of(idle).plan
    parts = [f"# {name}, idling", f"```\n{plan}\n```", f"```\n{report(idle)}\n```"]
    if pictured:
        idles = "in the mean colour of the patch that they follow" if plan.idle == "follow" else "faded"
        parts.append(f"![Working patches as they are, idle ones {idles}, block by block]({PICTURE})")
    parts.append(
        f"`idlefx.load({ARTIFACT!r})` runs the model; `python {SCRIPT}` tunes it, once its line `DATA` names the data. "
        f"Made with {', '.join(f'{package} {version}' for package, version in versions().items())}."
    )
    return "\n\n".join(parts) + "\n"
