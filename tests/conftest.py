"""Fixtures: every model by name; and which tests run on one worker, because they share what is slow to make."""

import os

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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With `--dist loadgroup`, tests of one model and otherwise those of one file stay together, unless they say so."""
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            model = item.callspec.params.get("name") if hasattr(item, "callspec") else None
            item.add_marker(pytest.mark.xdist_group(model if model in MODELS else item.path.stem))


@pytest.fixture(scope="session", params=list(MODELS))
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
