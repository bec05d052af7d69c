"""The program inside an artifact, run as it was traced: whatever goes in and comes out, and in another number type."""

import dataclasses
from typing import NamedTuple

import pytest
import torch
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

import idlefx
from idlefx.deploy.artifacts import Artifact
from idlefx.deploy.io_schema import structure_of
from idlefx.deploy.manifest import manifest_of
from idlefx.deploy.program import make_program
from tests.models.small import build, images


class Pair(NamedTuple):
    mean: torch.Tensor
    spread: torch.Tensor


class Rich(nn.Module):
    """Takes and returns more than a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.vit = build("vit", depth=2)

    def forward(self, x, gains=None, double=False):
        features = self.vit.forward_features(x * gains["all"])
        return {
            "logits": self.vit.forward_head(features),
            "parts": [features.mean(1), (features[:, 0],)],
            "pair": Pair(features.mean((1, 2)), features.std()),
            "doubled": double,
            "nothing": None,
        }


class FixedBatch(nn.Module):
    """Its own code counts the images."""

    def __init__(self) -> None:
        super().__init__()
        self.vit = build("vit", depth=2)

    def forward(self, x):
        return torch.cat([self.vit(part) for part in x.split([2, len(x) - 2])]) if int(x.shape[0]) == 4 else self.vit(x)


def artifact(idle, **options):
    """What `load` gives, but for the compiled code: the traced program runs instead."""
    portable = make_program(idle, **options)
    return Artifact(manifest_of(portable), lambda tensors: portable.module(*tensors))


@torch.no_grad()
def test_hugging_face_outputs_come_back_by_name():
    config = ViTConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=96, image_size=48, patch_size=8,
        id2label={0: "cat", 1: "dog", 2: "owl"}, output_hidden_states=True,
    )  # fmt: skip
    idle = idlefx.convert(ViTForImageClassification(config).eval(), [1], 0.5)
    run, x = artifact(idle), torch.randn(3, 3, 48, 48)
    wanted, found = idle(pixel_values=x), run(pixel_values=x)
    assert list(found) == list(wanted) and torch.equal(found.logits, wanted.logits)
    assert all(torch.equal(a, b) for a, b in zip(found["hidden_states"], wanted.hidden_states, strict=True))
    assert run.metadata["classes"] == ["cat", "dog", "owl"]
    assert [label["name"] for label in run.metadata["outputs"]][:2] == ["logits", "hidden_states.0"]
    with pytest.raises(AttributeError, match="there is no loss; there are logits, hidden_states"):
        found.loss  # noqa: B018


@torch.no_grad()
def test_nested_inputs_and_outputs_keep_their_structure():
    x, gains = torch.randn(2, 3, 48, 48), {"all": torch.tensor(1.5)}
    idle = idlefx.convert(Rich().eval(), [1], 0.5, example_inputs=(x, gains, True))
    run = artifact(idle)
    x = torch.randn(5, 3, 48, 48)
    wanted, found = idle(x, gains, True), run(x, gains=gains, double=True)
    assert torch.equal(found.logits, wanted["logits"]) and torch.equal(found.parts[1][0], wanted["parts"][1][0])
    assert torch.equal(found.pair.spread, wanted["pair"].spread)
    assert (found.doubled, found.nothing, type(found.parts)) == (True, None, list)
    for wrong, words in [
        ((x, gains, False), "`inputs.double` was True when the model was packaged and cannot be False"),
        ((x, {"one": x}, True), r"`inputs.gains` must hold \['all'\], got \['one'\]"),
        ((x, {"all": x}, True), r"`gains.all` has shape \(5, 3, 48, 48\), the artifact takes \(\)"),
    ]:
        with pytest.raises(idlefx.InputError, match=words):
            run(*wrong)


def test_what_is_not_plain_is_refused():
    @dataclasses.dataclass
    class Odd:
        what: object

    with pytest.raises(idlefx.InputError, match=r"`output\.odd\.what` is a object; only tensors"):
        structure_of({"odd": Odd(object())}, "output")


class Counting(torch.nn.Module):
    """Tells how many images there were."""

    def __init__(self):
        super().__init__()
        self.vit = build("vit", depth=2)

    def forward(self, x):
        return self.vit(x), x.shape[0]


def test_a_number_that_follows_the_batch_is_refused():
    idle = idlefx.convert(Counting().eval(), [1], 0.5, example_inputs=torch.randn(2, 3, 48, 48))
    with pytest.raises(idlefx.InputError, match="a number that follows the batch; wrap the model"):
        artifact(idle)


@torch.no_grad()
@pytest.mark.parametrize("name", ["vit", "registers_map", "hand_written_gap"])
def test_a_moved_copy_computes_in_its_type_and_leaves_the_model_alone(name):
    idle = idlefx.convert(build(name), [1, 3], 0.5, schedule="blocks").train()
    run, x = artifact(idle, dtype=torch.bfloat16), images(build(name), 8)
    assert run.metadata["dtype"] == "bfloat16" and idle.training
    assert {p.dtype for p in idle.parameters()} == {torch.float32}
    wanted, found = idle.eval()(x), run(x.bfloat16())
    assert found.dtype == torch.bfloat16
    errors = (found.float() - wanted).norm(dim=1) / wanted.norm(dim=1)
    assert errors.median() < 2e-2  # a token that scores as another one does may be exchanged for it


def test_batch_that_the_model_fixes_is_declared():
    with pytest.warns(UserWarning, match="fixes the batch"):
        idle = idlefx.convert(FixedBatch().eval(), [1], 0.5, example_inputs=torch.randn(4, 3, 48, 48))
    run = artifact(idle)
    assert run.metadata["batch"] == [4, 4] and run.metadata["inputs"][0]["shape"] == [4, 3, 48, 48]
    with pytest.raises(idlefx.InputError, match=r"has shape \(5, 3, 48, 48\), the artifact takes \(4, 3, 48, 48\)"):
        run(torch.randn(5, 3, 48, 48))


def test_one_batch_size_is_a_range_too():
    run = artifact(idlefx.convert(build("vit", depth=2), [1], 0.5), batch=(3, 3))
    assert run(torch.randn(3, 3, 48, 48)).shape == (3, 10)
    with pytest.raises(idlefx.InputError, match="the artifact takes"):
        run(torch.randn(2, 3, 48, 48))
