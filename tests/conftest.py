"""Fixtures: every model by name; and which tests run on one worker, because they share what is slow to make."""

import os
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from torch import nn

from tests.models.small import MODELS, Spec, build

SLOW = {
    "deadline": None,
    "suppress_health_check": list(HealthCheck),
    "phases": [phase for phase in Phase if phase is not Phase.explain],
}
settings.register_profile("ci", max_examples=25, derandomize=True, database=None, **SLOW)
settings.register_profile("thorough", max_examples=250, **SLOW)
settings.load_profile("ci")

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


def companions(nodeid: str) -> str:
    """What a test shares things with that are slow to make: those of its model, of DeiT-S, or else of its file.

    A part of random examples shares nothing.
    """
    file, _, test = nodeid.partition("::")
    if "[part" in test:
        return nodeid
    if "deit_s" in test:
        return "deit_s"
    parameters = test.partition("[")[2].removesuffix("]").split("-")
    return next((each for each in parameters if each in MODELS), file)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `-n`, keep companions on one worker; another `--dist` than the usual one has its way."""
    if config.getvalue("dist") != "load":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class ByCompanions(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return companions(nodeid)

    return ByCompanions(config, log)


# Variants of others, whose tests are slow ones: the first of each kind runs always.
VARIANTS = (
    "deit", "registers_map", "siglip", "qk_norm_gap", "parallel_fused", "average_pool", "hand_written_gap", "collision",
)  # fmt: skip


@pytest.fixture(
    scope="session", params=[pytest.param(name, marks=pytest.mark.slow if name in VARIANTS else ()) for name in MODELS]
)
def name(request: pytest.FixtureRequest) -> str:
    """The name of each model in turn."""
    return request.param


@pytest.fixture
def spec(name: str) -> Spec:
    """What is known of the model without looking at it."""
    return MODELS[name]


@pytest.fixture
def model(name: str) -> nn.Module:
    """Each model in turn, fresh, in evaluation mode."""
    return build(name)
