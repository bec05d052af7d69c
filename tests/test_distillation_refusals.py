"""What fine-tuning without labels refuses, in which words."""

from copy import deepcopy
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import nn

import idlefx
from idlefx.training.config import Settings
from idlefx.training.loader import ImageLoader
from idlefx.training.loop import finetune
from tests.models.colours import SIDE, Colours, vit
from tests.support.messages import refusal, says

IMAGES = torch.stack([Colours(24, 0.0)[index][0] for index in range(24)])
TRAIN, VAL = list(IMAGES[:16].split(8)), list(IMAGES[16:].split(8))
SHORT = Settings(steps=4, lr=3e-4)


class Wrapped(nn.Module):
    """A model whose answer is made of the features by a function."""

    def __init__(self, answer) -> None:
        super().__init__()
        self.vit, self.answer = vit(num_classes=0), answer

    def forward(self, x):
        return self.answer(self.vit.forward_features(x))


def feature(tokens):
    return tokens[:, 0]


@cache
def converted(answer):
    example = torch.randn(2, 3, SIDE, SIDE)
    return idlefx.convert(Wrapped(answer).eval(), layers=[1], keep=0.5, example_inputs=example)


def tuned(dense, train=TRAIN, val=VAL, settings=SHORT, answer=feature, trainable=True):
    """Fine-tune a converted model that gives such an answer, with another one as its teacher."""
    idle = deepcopy(converted(answer)).requires_grad_(trainable)
    return finetune(dense.eval(), idle, train, val, settings)


def test_outputs_that_are_no_tensors():
    message = refusal(tuned, Wrapped(lambda t: None))
    assert says(message, "finetune: the dense model returns a NoneType without tensors", "wrap it"), message


def test_outputs_whose_number_changes():
    calls = iter(range(100))

    class Moody(Wrapped):
        def forward(self, x):
            tokens = self.vit.forward_features(x)
            return (tokens[:, 0], tokens[:, 1]) if next(calls) > 3 else (tokens[:, 0],)

    message = refusal(tuned, Moody(None), answer=lambda t: (t[:, 0],))
    assert says(message, "dense model returned 0, 1, the converted one 0, and at first they returned 0"), message


def test_outputs_of_which_none_can_be_tuned():
    def highest(tokens):
        return tokens[:, 0].argmax(1)

    message = refusal(tuned, Wrapped(highest), answer=highest)
    assert says(message, "no output that can be tuned", "`output`: it holds whole numbers", "wrap it"), message


def test_no_number_in_one_output_is_named():
    dense = Wrapped(lambda t: {"feature": t[:, 0], "length": (t[:, 0].sum(1, keepdim=True)).sqrt()})
    message = refusal(tuned, dense)
    assert says(message, "finetune: output `length` of the dense model holds NaN, first for image"), message
    bad = [*TRAIN[:1], TRAIN[1] * torch.nan]
    message = refusal(tuned, Wrapped(feature), bad)
    assert says(message, r"step \d gave loss nan, output nan, grad_norm nan", "--lr"), message


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"distance": {"map": "cosine"}}, ["map is no output", "such are: output"]),
        ({"weight": {"map": 1.0}}, ["map is no output", "such are: output"]),
    ],
)
def test_outputs_that_are_not_there(settings, words):
    message = refusal(tuned, Wrapped(feature), settings=replace(SHORT, **settings))
    assert says(message, "settings: ", *words), message


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"distance": {"map": "euclid"}}, ["distance of map is 'euclid'", "cosine, squared, kl"]),
        ({"weight": {"map": -1.0}}, ["weight of map is -1.0"]),
        ({"parameters": "some"}, ["parameters is 'some'", "all, stages, norms"]),
    ],
)
def test_settings_out_of_range(settings, words):
    assert says(refusal(Settings, **settings), "settings: ", *words)


def test_labels_of_one_part_only():
    labelled = ImageLoader(Colours(8), 8)
    for train, val in ((labelled, VAL), (TRAIN, labelled)):
        assert says(refusal(tuned, Wrapped(feature), train, val), "must both have labels", "or neither of them")


def test_nothing_to_train_and_nothing_held_out():
    message = refusal(tuned, Wrapped(feature), trainable=False)
    assert says(message, "leaves nothing to train", "require gradients")
    assert says(refusal(tuned, Wrapped(feature), val=[]), "no held-out images")
