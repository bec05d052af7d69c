"""The options of a plan: one record that goes everywhere and loses nothing on the way."""

import dataclasses
import json

import numpy as np
import pytest

import idlefx
from idlefx import PlanOptions
from tests.models.small import build

# Every value off its default in one of them: an option that is forgotten on some way comes back as something else.
ODD = PlanOptions([1, 3], [0.5, 0.3], "blocks", "norm", False, 8, (0, 2), unit="tokens")
FOLLOWING = PlanOptions([1, 3], 0.5, idle="follow")
CHANGES = {
    "layers": [2], "keep": 0.25, "schedule": "blocks", "selector": "random", "reselect": False, "multiple_of": 4,
    "prefix": 1, "idle": "follow", "unit": "windows",
}  # fmt: skip


def test_every_option_of_the_examples_is_off_its_default():
    defaults = {each.name: each.default for each in dataclasses.fields(PlanOptions)}
    for name, default in defaults.items():
        assert getattr(FOLLOWING if name == "idle" else ODD, name) != default
    assert CHANGES.keys() == defaults.keys()


@pytest.mark.parametrize("options", [ODD, FOLLOWING])
def test_options_survive_json(options):
    assert PlanOptions.from_dict(json.loads(json.dumps(options.to_dict()))) == options


@pytest.mark.parametrize("name", CHANGES)
def test_each_option_survives_json_alone(name):
    options = PlanOptions.from_dict({"layers": [1], "keep": 0.5, name: CHANGES[name]})
    assert options != PlanOptions([1], 0.5)
    assert PlanOptions.from_dict(json.loads(json.dumps(options.to_dict()))) == options


def test_numbers_and_lists_of_other_libraries_become_plain():
    plain = PlanOptions(range(1, 3), np.float32(0.5), prefix=np.arange(1))
    assert plain == PlanOptions((1, 2), 0.5, prefix=[0])
    assert json.loads(json.dumps(plain.to_dict()))["prefix"] == [0]


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ({"layers": [1]}, "options lack keep"),
        ({}, "options lack layers and keep"),
        ({"layers": [1], "keep": 0.5, "ratio": 1}, r"unknown options \['ratio'\]; known are layers, keep"),
        ({"layers": [1], "keep": 0.5, "reselect": "no"}, "reselect='no' is neither True nor False"),
        ({"layers": [1], "keep": 0.5, "prefix": True}, "prefix=True is neither"),
        ({"layers": [1], "keep": 0.5, "prefix": [0, False]}, r"prefix=\[0, False\] is neither"),
        ({"layers": [1], "keep": 0.5, "prefix": "x"}, "prefix='x' is neither"),
        ({"layers": [1], "keep": 0.5, "multiple_of": 2.0}, "multiple_of=2.0 is no whole number"),
        ({"layers": [1], "keep": 0.5, "selector": None}, "selector=None is no name"),
        ({"layers": [1], "keep": 0.5, "idle": "sleep"}, "unknown idle='sleep'; idle tokens either rest or follow"),
        ({"layers": [1], "keep": 0.5, "idle": "follow", "selector": "mean"}, "selector='mean' scores tokens that rest"),
    ],
)
def test_what_no_model_could_do_is_refused_without_one(told, words):
    with pytest.raises(idlefx.PlanError, match=words):
        PlanOptions.from_dict(told)


def test_convert_takes_what_the_record_tells():
    options = PlanOptions([1], 0.5, multiple_of=4)
    idle = idlefx.convert(build("vit"), **options.to_dict())
    assert idle.conversion.options == options
    assert idle.plan.multiple_of == 4
