"""Which parameters a fine-tune trains, and how fast."""

from copy import deepcopy

import pytest

import idlefx
from idlefx.training.config import Settings
from idlefx.training.trained_parameters import parameter_groups, trained_parameters
from tests.models.colours import vit


@pytest.fixture(scope="module")
def idle():
    return idlefx.convert(vit(num_classes=0), [1], 0.4)


def settled(**changes):
    return Settings(**changes).settled(labelled=False, idle="rest")


def test_without_labels_stages_are_trained_and_vectors_learn_faster(idle):
    idle, settings = deepcopy(idle), settled()
    chosen = trained_parameters(idle, settings)
    assert chosen and all(name.startswith("blocks.") and not name.startswith("blocks.0.") for name in chosen)
    groups = parameter_groups(idle, idle, settings)
    scales = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    for name, p in idle.named_parameters():
        assert scales[id(p)] == (settings.vector_lr if p.ndim <= 1 else 1.0), name
    assert len(scales) == sum(len(group["params"]) for group in groups) == len(list(idle.parameters()))


def test_layers_and_vectors_scale_the_learning_rate_together(idle):
    plain = parameter_groups(idle, idle, settled(layer_decay=0.5, vector_lr=1.0))
    scaled = parameter_groups(idle, idle, settled(layer_decay=0.5, vector_lr=3.0))
    before, after = ({id(p): g["lr_scale"] for g in groups for p in g["params"]} for groups in (plain, scaled))
    for p in idle.parameters():
        assert after[id(p)] == pytest.approx(before[id(p)] * (3.0 if p.ndim <= 1 else 1.0))


def test_a_learning_rate_that_is_named_is_that_of_all_unless_the_factor_is_named_too():
    assert settled(lr=1e-4).vector_lr == 1.0
    assert settled(lr=1e-4, vector_lr=5.0).vector_lr == 5.0
    labelled = Settings().settled(labelled=True, idle="rest")
    assert (labelled.vector_lr, labelled.parameters) == (1.0, "all")
