"""Hold a model whose tokens follow against what the reference says."""

import pytest
import torch
from torch import nn

import idlefx
from idlefx.runtime.selections import groups
from idlefx.zoo.reference.groups import Stage
from tests.models.generated import Config, inputs
from tests.oracles import following, following_generated
from tests.support import generated_habits as habits
from tests.support.generated_check import error_of

CLEAR = 1e-5  # a narrower choice is decided by rounding


def stages_of(idle: idlefx.IdleModule) -> list[Stage]:
    return [Stage(steps[0].block, steps[-1].block + 1, steps[0].kept, steps[0].joins) for steps in idle.plan.stages]


def groups_alike(idle: idlefx.IdleModule, x: tuple[torch.Tensor, ...], expected: following.Result) -> bool:
    """Hold the groups of a converted model against those of the reference; False where rounding decides."""
    if expected.margin <= CLEAR:
        return False
    with torch.no_grad():
        told = groups(idle, *x)
    for block, wanted in expected.groups.items():
        assert torch.equal(told[block], wanted.leaders)
    return True


def agrees(idle: idlefx.IdleModule, x: tuple[torch.Tensor, ...], expected: following.Result) -> bool:
    """Whether a converted model groups and computes as the reference does; False where rounding decides."""
    if not groups_alike(idle, x, expected):
        return False
    with torch.no_grad():
        assert error_of(idle(*x), expected.output) <= 1e-5
    return True


def check_following(config: Config, layers: list[int], keep: float | list[float], reselect: bool = True) -> bool:
    """Hold a conversion of a generated model against its reference; False where rounding decides."""
    plan = {"layers": layers, "keep": keep, "reselect": reselect, "idle": "follow"}
    plan["example_inputs"] = inputs(config, 2, seed=9)
    if words := habits.refusal_of(config):
        with pytest.raises(idlefx.IdleFxError, match=words):
            idlefx.convert(habits.given(config), **plan)
        return True
    with habits.announced(config):
        idle = idlefx.convert(habits.given(config), **plan)
    x, stages = inputs(config, 3, seed=1), stages_of(idle)

    def reference(model: nn.Module, gradients: bool) -> following.Result:
        return following_generated.run(model, stages, x, gradients=gradients)

    alike = groups_alike(idle.eval(), x, reference(habits.in_mode(config, False), False))
    return alike and habits.check_calls(idle, config, reference, x)
