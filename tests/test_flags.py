"""Settings, which are no tensors, are built into a converted model: another value is refused at each call."""

import copy
import inspect

import pytest
import torch
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

import idlefx
from idlefx.runtime.selections import selections
from tests.models.small import build, images


class Flags(nn.Module):
    """A model with all kinds of arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.vit = build("vit")

    def forward(self, x, scale=1.0, *more, flip: bool = False, offset: torch.Tensor | None = None, **others):
        x = x * scale if offset is None else x * scale + offset
        logits = self.vit(x.flip(-1) if flip else x)
        for each in (*more, *others.values()):
            logits = logits + each["by"] if isinstance(each, dict) else logits + each
        return logits


MODEL = Flags().eval()
X = images(MODEL.vit, 2)


def converted(*args, keep=1.0, **kwargs):
    example = args
    if kwargs:
        example = {**dict(zip(("x", "scale"), args, strict=False)), **kwargs}
    return idlefx.convert(MODEL, layers=[1], keep=keep, example_inputs=example)


@torch.no_grad()
@pytest.mark.parametrize("keep", [0.5, pytest.param(1.0, marks=pytest.mark.slow)])
def test_another_value_is_refused(keep):
    idle = converted(X, 2.0, keep=keep)
    words = "^input: `scale` was 2.0 when the model was traced and cannot be 0.5; convert the model with example_inputs"
    for form in (idle, copy.deepcopy(idle), idlefx.compile(idle, backend="eager")):
        with pytest.raises(idlefx.InputError, match=words):
            form(X, 0.5)
        with pytest.raises(idlefx.InputError, match=r"cannot be 1.0"):
            form(X)  # the default
        assert form(X, 2.0).equal(form(X, scale=2.0))
    if keep == 1.0:
        assert idle(X, 2.0).equal(MODEL(X, 2.0))


@torch.no_grad()
def test_what_was_not_given_has_its_default():
    idle = converted(X)
    assert idle(X, 1.0, flip=False, offset=None).equal(MODEL(X))
    for kwargs, told in (
        ({"scale": 0.5}, "0.5"),
        ({"flip": True}, "True"),
        ({"offset": X}, r"a tensor of shape \(2, 3, 48, 48\)"),
        ({"unheard": 1}, "1"),
    ):
        words = f"`{next(iter(kwargs))}` was not given when the model was traced and cannot be {told}; convert"
        with pytest.raises(idlefx.InputError, match=words):
            idle(X, **kwargs)
    with pytest.raises(idlefx.InputError, match="`more_0` was not given"):
        idle(X, 1.0, 2.0)


@torch.no_grad()
def test_what_was_given_may_be_left_out_where_it_is_the_default():
    idle = converted(X, 1.0, flip=False)
    assert idle(X).equal(MODEL(X))
    idle = converted(X, others={"by": torch.ones(())})
    with pytest.raises(idlefx.InputError, match="`others` was given when the model was traced; give it, or convert"):
        idle(X)


@torch.no_grad()
def test_containers_hold_what_they_held():
    idle = converted(X, nested={"by": torch.ones(())})
    assert idle(X, nested={"by": torch.ones(())}).equal(MODEL(X, nested={"by": torch.ones(())}))
    words = "`nested` must hold what it held when the model was traced, dict of by; got dict of by, and"
    with pytest.raises(idlefx.InputError, match=words):
        idle(X, nested={"by": torch.ones(()), "and": 2})
    with pytest.raises(idlefx.InputError, match=r"`nested.by` must be a tensor"):
        idle(X, nested={"by": 1.0})


@torch.no_grad()
def test_dicts_may_have_any_order():
    class Named(nn.Module):
        """A model that takes two images in one dict."""

        def __init__(self) -> None:
            super().__init__()
            self.vit = build("vit")

        def forward(self, pair: dict[str, torch.Tensor]) -> torch.Tensor:
            return self.vit(pair["image"] - 0.1 * pair["noise"])

    one, two = images(MODEL.vit, 2), images(MODEL.vit, 2, seed=1)
    model = Named().eval()
    idle = idlefx.convert(model, layers=[1], keep=0.5, example_inputs=({"image": one, "noise": two},))
    pairs = {"image": one, "noise": two}, {"noise": two, "image": one}
    assert idle(pairs[0]).equal(idle(pairs[1]))
    assert selections(idle, pairs[0])[1].equal(selections(idle, pairs[1])[1])


@torch.no_grad()
def test_signature_and_its_errors_are_the_models():
    idle = converted(X)
    names = list(inspect.signature(MODEL.forward).parameters)
    assert list(inspect.signature(idle.forward).parameters) == names
    assert inspect.signature(idle.forward).parameters["scale"].default == 1.0
    with pytest.raises(TypeError, match="missing a required argument: 'x'"):
        idle()
    with pytest.raises(TypeError, match="multiple values for argument 'x'"):
        idle(X, x=X)
    plain = idlefx.convert(nn.Sequential(build("vit")), layers=[1], keep=1.0, example_inputs=X)
    with pytest.raises(TypeError, match="unexpected keyword argument 'y'"):
        plain(X, y=1)


@torch.no_grad()
def test_flags_of_hugging_face():
    config = ViTConfig(hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96, image_size=64)
    model, x = ViTForImageClassification(config).eval(), torch.randn(2, 3, 64, 64)
    example = {"pixel_values": x, "output_hidden_states": False, "return_dict": True}
    idle = idlefx.convert(model, layers=[1], keep=1.0, example_inputs=example)
    assert idle(**example).logits.equal(model(**example).logits)
    with pytest.raises(idlefx.InputError, match=r"`output_hidden_states` was False when .* cannot be True"):
        idle(**{**example, "output_hidden_states": True})
    with pytest.raises(idlefx.InputError, match=r"`return_dict` was True when .* cannot be False"):
        idle(**{**example, "return_dict": False})
    plain = idlefx.convert(model, layers=[1], keep=1.0)
    with pytest.raises(idlefx.InputError, match=r"`output_hidden_states` was not given .* cannot be True"):
        plain(pixel_values=x, output_hidden_states=True)
