"""Converted models of Hugging Face in the hands of their library: labels, Trainer, pipeline, settings of a call."""

import copy
import pickle

import pytest
import torch
from PIL import Image
from transformers import (
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    ViTForMaskedImageModeling,
    ViTImageProcessor,
    pipeline,
)

import idlefx
from idlefx.capture.loss_function import loss_function
from idlefx.runtime.selections import selections

LARGE = 96


def make(kind=ViTForImageClassification, **settings):
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    return kind(ViTConfig(**sizes, image_size=64, num_labels=3, **settings)).eval()


X, Y = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 0])


@pytest.fixture(scope="module")
def model():
    return make()


@pytest.fixture(scope="module")
def idle(model):
    return idlefx.convert(model, layers=[1], keep=1.0)


def same(one, other):
    assert type(one) is type(other) and list(one) == list(other)
    assert all(one[name].equal(other[name]) for name in one)


def test_labels_may_be_given_or_not(model, idle):
    assert model.config.problem_type is None  # which no conversion may decide
    for form in (idle, copy.deepcopy(idle), pickle.loads(pickle.dumps(idle))):
        same(form(pixel_values=X), model(pixel_values=X))
        same(form(pixel_values=X, labels=None), model(pixel_values=X))
        same(form(pixel_values=X, labels=Y), copy.deepcopy(model)(pixel_values=X, labels=Y))


def test_labels_train_where_tokens_idle(model):
    idle = idlefx.convert(model, layers=[1], keep=0.5).train()
    output = idle(pixel_values=X, labels=Y)
    assert output.loss.equal(torch.nn.functional.cross_entropy(output.logits, Y))
    output.loss.backward()
    assert idle.get_parameter("classifier.weight").grad.abs().sum() > 0
    assert selections(idle, pixel_values=X, labels=Y)[1].shape == (4, 9)
    with pytest.raises(idlefx.InputError, match="`labels` was not given when the model was traced"):
        idlefx.with_cut_loss(idle)(pixel_values=X, labels=Y)


@pytest.mark.parametrize("problem", ["multi_label_classification", "regression"])
def test_the_loss_is_that_of_the_problem(problem):
    model = make(problem_type=problem)
    loss = loss_function(model, ((X,), {}))
    labels = torch.rand(4, 3)
    assert loss(labels, model(X).logits, model.config).equal(model(X, labels=labels).loss)


def test_a_loss_of_the_models_own_is_not_guessed(model):
    class Scaled(ViTForImageClassification):
        """A model that weighs its loss."""

        def forward(self, pixel_values=None, labels=None):
            output = super().forward(pixel_values, labels=labels)
            output.loss = None if labels is None else 2 * output.loss
            return output

    assert loss_function(model, ((X,), {})) is not None
    assert loss_function(make(Scaled), ((X,), {})) is None
    assert loss_function(make(ViTForMaskedImageModeling, encoder_stride=16), ((X,), {})) is None


def test_a_trace_with_labels_says_that_it_needs_them(model):
    idle = idlefx.convert(model, layers=[1], keep=1.0, example_inputs={"pixel_values": X, "labels": Y})
    assert idle(pixel_values=X, labels=Y).loss.equal(copy.deepcopy(model)(pixel_values=X, labels=Y).loss)
    for kwargs in ({}, {"labels": None}):
        with pytest.raises(
            idlefx.InputError, match="`labels` was given when the model was traced; give it, or convert"
        ):
            idle(pixel_values=X, **kwargs)


@pytest.mark.slow
def test_compiled_models_take_labels(idle):
    fast = idlefx.compile(idle)
    for kwargs in ({}, {"labels": Y}):
        torch.testing.assert_close(dict(fast(pixel_values=X, **kwargs)), dict(idle(pixel_values=X, **kwargs)))


def test_pipelines_run(idle):
    processor = ViTImageProcessor(size={"height": 64, "width": 64})
    photos = [Image.new("RGB", (80, 90), colour) for colour in ("red", "blue", "white")]
    for form in (idle, copy.deepcopy(idle).bfloat16()):
        assert form.dtype == form.get_parameter("classifier.weight").dtype and form.device == torch.device("cpu")
        classify = pipeline("image-classification", model=form, image_processor=processor)
        found = classify(photos, batch_size=2)
        pixels = processor(photos, return_tensors="pt")["pixel_values"].to(form.dtype)
        wanted = form(pixel_values=pixels).logits.softmax(-1).amax(-1).tolist()
        assert [labels[0]["score"] for labels in found] == pytest.approx(wanted, abs=1e-2)
    assert not idle.can_generate() and idle.config.num_labels == 3 and idle.main_input_name == "pixel_values"


class Photos(torch.utils.data.Dataset):
    """Images and labels, and what no model takes."""

    def __len__(self):
        return len(X)

    def __getitem__(self, index):
        return {"pixel_values": X[index], "labels": Y[index], "name": "a photo"}


def test_trainers_train(model, tmp_path):
    pytest.importorskip("accelerate")  # which Trainer needs
    idle = idlefx.convert(model, layers=[1], keep=0.5)
    before = copy.deepcopy(idle.state_dict())
    settings = TrainingArguments(
        tmp_path, max_steps=2, learning_rate=1e-2, save_steps=2, eval_strategy="steps", report_to=[], use_cpu=True,
        gradient_accumulation_steps=2, per_device_train_batch_size=2, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(idle, settings, train_dataset=Photos(), eval_dataset=Photos())
    trainer.train()
    loss = trainer.evaluate()["eval_loss"]
    assert loss == pytest.approx(idle.eval()(pixel_values=X, labels=Y).loss.item(), abs=1e-5)
    assert not any(value.equal(before[name]) for name, value in idle.state_dict().items())
    assert trainer.predict(Photos()).predictions.shape == (4, 3)
    assert any(tmp_path.rglob("model.safetensors"))


def test_what_a_trainer_asks_is_answered(idle):
    assert idle.accepts_loss_kwargs is False  # else it gives `num_items_in_batch`, which no trace has
    with pytest.raises(
        AttributeError, match="`gradient_checkpointing_enable` of ViTForImageClassification is not kept"
    ):
        idle.gradient_checkpointing_enable()


@pytest.mark.parametrize("settings", [{"output_attentions": True}, pytest.param({}, marks=pytest.mark.slow)])
def test_attention_maps_that_are_returned_are_named(settings):
    model = make(attn_implementation="eager", **settings)
    example = {"pixel_values": X, **({} if settings else {"output_attentions": True})}
    table = idlefx.inspect(model, example)
    assert all("inside the block is returned by the model, as an attention map may be (at" in b.refusal for b in table)


@torch.no_grad()
def test_positions_are_interpolated(model):
    x = torch.randn(3, 3, LARGE, LARGE)
    example = {"pixel_values": x[:2], "interpolate_pos_encoding": True}
    idle = idlefx.convert(model, layers=[1], keep=1.0, example_inputs=example)
    assert idle(pixel_values=x, interpolate_pos_encoding=True).logits.equal(
        model(x, interpolate_pos_encoding=True).logits
    )
    with pytest.raises(idlefx.InputError, match="`interpolate_pos_encoding` was True when the model was traced"):
        idle(pixel_values=x)
    with pytest.raises(
        idlefx.InputError, match=r"`pixel_values` has shape \(4, 3, 64, 64\), but the model was traced for"
    ):
        idle(pixel_values=X, interpolate_pos_encoding=True)
