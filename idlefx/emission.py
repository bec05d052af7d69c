"""All that a converted model needs to be used, fine-tuned and judged, in one directory."""

import inspect
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from string import Template
from typing import Any

import safetensors.torch
from matplotlib import cbook
from torch import Tensor, nn

from idlefx.artifacts import package
from idlefx.errors import InputError
from idlefx.inputs import EXAMPLE_BATCH, guess_inputs
from idlefx.models import load_model
from idlefx.module import IdleModule
from idlefx.photos import MODES, Photo
from idlefx.picture import draw
from idlefx.pipeline import convert
from idlefx.report import report
from idlefx.selectors import find_selector
from idlefx.versions import VERSION, versions

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
        PassError: The artifact does not compute what the model does.
    """
    with _whole_directory(Path(directory)) as partial:
        facts = idle.meta["idlefx"]
        name = model or facts["origin"]
        safetensors.torch.save_model(idle, str(partial / WEIGHTS))
        making = _made_again(name, partial / WEIGHTS, facts)
        package(idle, partial / ARTIFACT, **options)
        told = {"model": name, **facts["call"], "blocks": [asdict(step) for step in idle.plan], "versions": versions()}
        (partial / PLAN).write_text(json.dumps(told, indent=2) + "\n")
        (partial / SCRIPT).write_text(_script(name, making, facts))
        pictured = _draw(idle, images, partial / PICTURE)
        (partial / REPORT).write_text(_report(idle, name, pictured))
    return Path(directory)


def check_directory(path: str | Path) -> None:
    """Refuse what is there already.

    Raises:
        InputError: It is a file, or a directory with something in it.
    """
    target = Path(path)
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise InputError(f"emit: {target} is there already; name a directory that is not")


@contextmanager
def _whole_directory(target: Path) -> Iterator[Path]:
    """A directory to write into that takes the place of `target` once the block has succeeded."""
    check_directory(target)
    partial = target.with_name(f".{target.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        partial.replace(target)
    except OSError as error:
        raise InputError(f"emit: cannot write {target}: {error.strerror or error}; name another directory") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _made_again(name: str, weights: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """The options of `load_model` that make a model of these weights and inputs again."""
    side = facts["image_size"][-1]
    refusals = []
    for options in ({}, {"img_size": side}) if ":" not in name else ({},):
        try:
            made = load_model(name, checkpoint=weights, **options)
            if not facts["guessed"] or _image_size(made) == tuple(facts["image_size"]):
                return options
            refusals.append(f"its images are {_image_size(made)} instead of {tuple(facts['image_size'])}")
        except InputError as error:
            refusals.append(str(error))
    raise InputError(
        f"emit: the script could not make this model again as {name}: {refusals[0]}; name what makes it, "
        "model='package.module:callable' (in the shell --model)"
    )


def _image_size(model: nn.Module) -> tuple[int, ...]:
    size: tuple[int, ...] = guess_inputs(model)[1]["image_size"]
    return size


def _script(name: str, making: dict[str, Any], facts: dict[str, Any]) -> str:
    defaults = {key: parameter.default for key, parameter in inspect.signature(convert).parameters.items()}
    call = {key: value for key, value in facts["call"].items() if value != defaults[key]}
    size = ", ".join(map(str, (EXAMPLE_BATCH, *facts["image_size"])))
    imports = _home_of(find_selector(call["selector"]).function) if "selector" in call else ""
    return Template(TEMPLATE.read_text()).substitute(
        model=name,
        version=VERSION,
        script=SCRIPT,
        imports=imports and f"\n        import {imports}  # registers the token score\n",
        model_name=repr(name),
        weights=WEIGHTS,
        img_size="".join(f", {key}={value!r}" for key, value in making.items()),
        example=None if facts["guessed"] else f"torch.randn({size}, device=world.device)",
        call=", ".join(f"{key}={value!r}" for key, value in call.items()),
    )


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
        if idle.meta["idlefx"]["image_size"][0] not in MODES:
            return False
        images = cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)
    if not any(step.idles for step in idle.plan):
        return False
    draw(idle, images, path)
    return True


def _report(idle: IdleModule, name: str, pictured: bool) -> str:
    parts = [f"# {name}, idling", f"```\n{idle.plan}\n```", f"```\n{report(idle)}\n```"]
    if pictured:
        parts.append(f"![Working patches in colour, idle ones faded, block by block]({PICTURE})")
    parts.append(
        f"`idlefx.load({ARTIFACT!r})` runs the model; `python {SCRIPT}` tunes it, once its line `DATA` names the data. "
        f"Made with {', '.join(f'{package} {version}' for package, version in versions().items())}."
    )
    return "\n\n".join(parts) + "\n"
