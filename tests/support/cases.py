"""Conversions that several tests look at, made once, and what the reference says about them."""

import random
from functools import cache
from typing import Any, NamedTuple

import timm
import torch
from torch import nn

import idlefx
from tests.models.small import DEPTH, MODELS, build, image_tokens, images
from tests.oracles import reference
from tests.oracles.reference import Result

CLEAR_MARGIN = 3e-5


class Case(NamedTuple):
    """The arguments of a conversion."""

    layers: tuple[int, ...]
    keep: float | tuple[float, ...]
    schedule: str = "stages"
    selector: str = "auto"


def random_case(name: str, schedule: str) -> Case:
    """Some plan for that model, always the same one; stages leave at least two neighbouring blocks idling."""
    draw = random.Random(f"{name} {schedule}")
    if schedule == "stages":
        return Case(tuple(sorted(draw.sample(range(DEPTH - 1), 2))), round(draw.uniform(0.3, 0.9), 2))
    layers = tuple(sorted(draw.sample(range(DEPTH), draw.randint(1, DEPTH))))
    return Case(layers, tuple(round(draw.uniform(0.1, 0.9), 2) for _ in layers), "blocks")


def listed(keep: float | tuple[float, ...]) -> float | list[float]:
    return list(keep) if isinstance(keep, tuple) else keep


def convert(model: torch.nn.Module, case: Case, **options: Any) -> Any:
    if "example_inputs" not in options:
        options["example_inputs"] = images(model, 2, seed=99)
    with torch.enable_grad():
        return idlefx.convert(
            model,
            layers=list(case.layers),
            keep=listed(case.keep),
            schedule=case.schedule,
            selector=case.selector,
            **options,
        )


@cache
def converted(name: str, case: Case, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """The converted model; shared between tests, so copy it before changing it."""
    model = build(name).to(dtype)
    return convert(model, case, example_inputs=images(model, 2, seed=99).to(dtype), **options)


@cache
def deit_s() -> tuple[nn.Module, Any]:
    """DeiT-S with random weights and what becomes of it at the published plan; shared, so only read it."""
    torch.manual_seed(0)
    model = timm.create_model("deit_small_patch16_224").eval()
    return model, idlefx.convert(model, layers=[3, 6, 9], keep=0.7)


def wanted_plan(model: torch.nn.Module, case: Case) -> dict[int, int]:
    return reference.schedule_plan(
        case.layers, listed(case.keep), case.schedule, image_tokens(model), len(model.blocks)
    )


def wanted(model: torch.nn.Module, name: str, case: Case, x: torch.Tensor, score: Any = None) -> Result:
    """What the reference makes of the model, whose spec stands under that name."""
    _, prefix, class_position, *_ = MODELS[name]
    plan = wanted_plan(model, case)
    result = reference.run(model, plan, x, prefix=prefix, class_position=class_position, score=score)
    assert result.margin > CLEAR_MARGIN, "rounding decides what is kept here: take another seed"
    return result


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


def same_selections(actual: dict[int, torch.Tensor], expected: dict[int, torch.Tensor]) -> bool:
    return actual.keys() == expected.keys() and all(torch.equal(actual[b], expected[b]) for b in expected)
