"""Numpy arrays among the inputs, such as the lengths of packed images: their numbers are built in."""

import copy
import io
from dataclasses import replace
from types import MethodType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import idlefx
from idlefx.deploy import inductor
from idlefx.runtime.module import conversion_of
from tests.models.packed import PATCH, tower
from tests.support.messages import refusal, says

pytestmark = pytest.mark.filterwarnings("ignore:`lengths`. the numbers of arrays are built in")

X, SHIFT = torch.randn(16, PATCH), torch.randn(16, 5)
LENGTHS = np.array([6, 10])


class Told(nn.Module):
    """A tower that is told with each call how long its segments are."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = tower((6, 10), depth=2)

    def of(self, x: Tensor, lengths: Any) -> Tensor:
        for block in self.tower.blocks:
            block.lengths = tuple(int(length) for length in lengths)
        return self.tower(x)

    def forward(self, x: Tensor, lengths: Any, shift: Tensor | None = None) -> Tensor:
        return self.of(x, lengths) + (0 if shift is None else shift)


class ByName(Told):
    def forward(self, x: Tensor, *, lengths: Any) -> Tensor:
        return self.of(x, lengths)


class AnyName(Told):
    def forward(self, x: Tensor, **told: Any) -> Tensor:
        return self.of(x, told["lengths"])


class Rest(Told):
    def forward(self, x: Tensor, *told: Any) -> Tensor:
        return self.of(x, told[0])


class PositionOnly(Told):
    def forward(self, x: Tensor, lengths: Any, /) -> Tensor:
        return self.of(x, lengths)


class Within(Told):
    def forward(self, x: Tensor, told: dict[str, Any]) -> Tensor:
        return self.of(x, told["lengths"])


class Writes(Told):
    """Writes into the array it is given."""

    def forward(self, x: Tensor, lengths: Any) -> Tensor:
        out = self.of(x, lengths)
        lengths += 1
        return out


def convert(model: nn.Module, example: Any, keep: float = 0.5, **options: Any) -> idlefx.IdleModule:
    return idlefx.convert(model, [0], keep, example_inputs=example, **options)


@pytest.fixture(scope="module")
def told() -> tuple[nn.Module, idlefx.IdleModule]:
    model = Told().eval()
    with pytest.warns(UserWarning, match=r"`lengths`: the numbers of arrays are built in, and with them all sizes"):
        return model, convert(model, (X, LENGTHS))


def test_an_array_is_built_in_and_given_with_each_call(told):
    model, idle = told
    wanted = idlefx.convert(model.tower, [0], 0.5, example_inputs=X)(X)
    assert torch.equal(idle(X, LENGTHS), wanted) and torch.equal(idle(X, lengths=LENGTHS.astype(np.int32)), wanted)
    assert [step.kept_by_segment for step in idle.plan] == [(3, 5), (3, 5)]


def test_a_batch_of_one_sequence_stays_one(told):
    idle = convert(told[0], (X[None], LENGTHS))
    assert torch.allclose(idle(X[None], LENGTHS), told[1](X, LENGTHS)[None], atol=1e-6)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ((X, np.array([8, 8])), [r"`lengths` was the array \[6, 10\]", r"cannot be \[8, 8\]"]),
        ((X, torch.tensor([6, 10])), [r"cannot be a tensor of shape \(2\)"]),
        ((X, [6, 10]), [r"cannot be the list \[6, 10\]"]),
        ((X,), ["lengths"]),
        ((torch.randn(18, PATCH), LENGTHS), [r"`x` has shape \(18, 12\)"]),
    ],
)
def test_a_call_with_something_else_is_refused(told, given, words):
    with pytest.raises((idlefx.InputError, TypeError)) as caught:
        told[1](*given)
    assert says(str(caught.value), *words)


def test_numbers_that_change_after_the_conversion_are_others():
    lengths = np.array([6, 10])
    idle = convert(Told().eval(), (X, lengths))
    lengths[:] = [8, 8]
    assert "cannot be [8, 8]" in refusal(idle, X, lengths)


@pytest.mark.parametrize("kind", [ByName, AnyName])
def test_an_array_by_name_alone_is_built_in(kind):
    model = kind().eval()
    assert torch.equal(convert(model, {"x": X, "lengths": LENGTHS}, 1.0)(X, lengths=LENGTHS), model(X, lengths=LENGTHS))


@pytest.mark.parametrize("example", [(X, LENGTHS, SHIFT), {"x": X, "lengths": LENGTHS, "shift": SHIFT}])
def test_what_stands_behind_an_array_keeps_its_argument(told, example):
    idle = convert(told[0], example, 1.0)
    wanted = told[0](X, LENGTHS, SHIFT)
    assert torch.equal(idle(X, LENGTHS, SHIFT), wanted) and torch.equal(idle(X, LENGTHS, shift=SHIFT), wanted)


@pytest.mark.parametrize(
    ("kind", "example"),
    [(Within, (X, {"lengths": LENGTHS})), (Rest, (X, LENGTHS)), (PositionOnly, (X, LENGTHS))],
)
def test_an_array_without_an_argument_of_its_own_is_refused(kind, example):
    assert "has no argument of its own; give it by name" in refusal(convert, kind().eval(), example)


def test_a_model_that_writes_into_an_array_is_traced_with_the_numbers_of_the_example():
    idle, lengths = convert(Writes().eval(), (X, LENGTHS)), np.array([6, 10])
    assert LENGTHS.tolist() == [6, 10] and idle(X, lengths).shape == (16, 5)


def test_the_users_model_has_its_own_forward_back():
    model = Told().eval()
    convert(model, (X, LENGTHS), copy=False)
    assert "forward" not in vars(model)
    assert "fails on example inputs" in refusal(convert, model, (X, np.array([3, 3])), copy=False)
    assert "forward" not in vars(model)
    own = model.forward = MethodType(lambda self, x, lengths: 2 * self.of(x, lengths), model)
    idle = convert(model, (X, LENGTHS), 1.0, copy=False)
    assert model.forward is own
    assert torch.equal(idle(X, LENGTHS), 2 * Told.forward(model, X, LENGTHS))


def test_arrays_are_remembered_by_copies_and_files(told):
    idle, file = told[1], io.BytesIO()
    torch.save(idle, file)
    file.seek(0)
    for other in (copy.deepcopy(idle), torch.load(file, weights_only=False)):
        assert torch.equal(other(X, LENGTHS), idle(X, LENGTHS))
        assert "cannot be [8, 8]" in refusal(other, X, np.array([8, 8]))


def test_a_model_in_train_mode_is_trained_with_arrays():
    idle = convert(Told().train(), (X, LENGTHS))
    idle(X, LENGTHS).sum().backward()
    assert idle.training and all(parameter.grad is not None for parameter in idle.parameters())


def test_a_script_that_tunes_cannot_give_arrays(told, tmp_path):
    assert "cannot give the model arrays" in refusal(idlefx.emit, told[1], tmp_path / "out", model="timm:deit_tiny")


def test_labels_go_on_where_a_compiled_model_keeps_the_arrays_back(told, monkeypatch):
    with_loss = replace(conversion_of(told[1]), loss=lambda *given: given)
    monkeypatch.setattr(inductor, "conversion_of", lambda compiled: with_loss)
    args, kwargs = inductor._check_inputs(told[1], (X, LENGTHS), {"labels": SHIFT})
    assert args == () and kwargs.keys() == {"labels", "x"} and kwargs["labels"] is SHIFT


@pytest.mark.slow
def test_compiled_and_packaged_models_take_the_array_and_no_other(told, tmp_path):
    idle = told[1]
    wanted, compiled = idle(X, LENGTHS), idlefx.compile(idle)
    assert torch.allclose(compiled(X, LENGTHS), wanted, atol=1e-5)
    assert "cannot be [8, 8]" in refusal(compiled, X, np.array([8, 8]))
    idlefx.package(idle, tmp_path / "told.pt2")
    assert torch.allclose(idlefx.load(tmp_path / "told.pt2")(X), wanted, atol=1e-5)
