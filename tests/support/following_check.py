"""Hold a model whose tokens follow against what the reference says."""

import torch

import idlefx
from idlefx.runtime.selections import groups
from idlefx.zoo.reference.groups import Stage
from tests.oracles import following
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
