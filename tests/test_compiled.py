"""What `torch.compile` made of a converted model is as good as the model itself; and checking it changes nothing."""

import copy
import warnings

import pytest
import torch
from torch import nn

import idlefx
from idlefx.deploy.program import make_program
from idlefx.runtime.selections import selections
from tests.models.small import build, images
from tests.support.messages import refusal, says


def converted(model, **options):
    return idlefx.convert(model, layers=[1], keep=0.5, **options)


@pytest.fixture(scope="module")
def idle():
    return converted(build("vit", depth=2))


def compiled(module):
    return torch.compile(module, backend="eager")


def test_a_compiled_model_is_taken_for_the_converted_one(idle, tmp_path):
    fast, x = compiled(idle), images(build("vit"), 2)
    assert str(idlefx.report(fast)) == str(idlefx.report(idle))
    assert all(torch.equal(a, selections(idle, x)[block]) for block, a in selections(fast, x).items())
    assert idlefx.draw(fast, x, tmp_path / "tokens.png").exists()
    output, loss = idlefx.with_cut_loss(fast)(x)
    assert torch.equal(output, idle(x)) and loss.requires_grad
    again = idlefx.compile(fast, backend="eager")
    assert again._orig_mod is idle and torch.equal(again(x), idle(x))
    assert torch.equal(make_program(fast).module(x)[0], idle(x))
    assert says(refusal(idlefx.report, compiled(nn.Linear(2, 2))), "OptimizedModule was not converted")


class Counting(nn.Module):
    """A ViT that counts its calls and averages its images."""

    def __init__(self):
        super().__init__()
        self.vit = build("vit", depth=2)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, x):
        self.calls.add_(1)
        self.mean.mul_(0.5).add_(x.mean((0, 2, 3)), alpha=0.5)
        return self.vit(x) + self.mean.mean()


def test_compiling_leaves_buffers_as_they_were():
    model = Counting()
    idle = converted(model, example_inputs=images(model.vit, 2))
    fast = idlefx.compile(idle, backend="eager")
    assert int(idle.get_buffer("calls")) == 0 and not idle.get_buffer("mean").any()
    fast(images(model.vit, 2))
    assert int(idle.get_buffer("calls")) == 1
    program = make_program(idle)
    assert int(program.module.get_buffer("calls")) == 1, "packaging runs the model"


def test_a_model_that_draws_random_numbers_cannot_be_checked():
    model = build("vit", depth=2, drop_rate=0.5)
    model.head_drop.train()
    with pytest.warns(UserWarning, match="`head_drop` in train mode"):
        idle = converted(model)
    with pytest.warns(UserWarning, match="compiled model cannot be checked.*draws random numbers"):
        idlefx.compile(idle, backend="eager")


class Stamped(nn.Linear):
    """A layer whose state says more than its tensors do."""

    def get_extra_state(self):
        return torch.tensor(3)

    def set_extra_state(self, state):
        assert int(state) == 3


def test_state_that_is_no_tensor_is_named():
    model = build("vit", depth=2)
    head = Stamped(48, 10)
    head.load_state_dict(model.head.state_dict(), strict=False)
    model.head = head
    with pytest.warns(UserWarning, match="^`head`: extra state and hooks of state_dict are not taken over"):
        idle = converted(model)
    state = idle.state_dict()
    assert not any("extra" in name for name in state)
    copy.deepcopy(idle).load_state_dict(state)
    model.load_state_dict(state, strict=False)

    model = build("vit", depth=2)
    model.register_state_dict_post_hook(lambda module, state, prefix, metadata: state.update(version=1))
    model.blocks[0].register_load_state_dict_pre_hook(lambda *_: None)
    with pytest.warns(UserWarning, match="^the model itself, `blocks.0`: extra state"):
        converted(model)


def test_hooks_with_which_torch_reads_older_checkpoints_are_not_named():
    model = build("vit", depth=2)
    model.head = nn.utils.parametrizations.weight_norm(model.head)
    from idlefx.graph.state import keeps_more

    assert keeps_more(model) == []


def test_patch_dropout_is_announced_as_it_is():
    model = build("vit", depth=2, patch_drop_rate=0.5, proj_drop_rate=0.3)
    x = images(model, 2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        idle = converted(model)
    words = [str(warning.message) for warning in caught]
    assert len(words) == 1
    assert says(
        words[0], "19 tokens instead of 37", r"after `\.train\(\)`.*eval mode, with no dropout", "patch_drop_rate=0"
    )
    assert torch.equal(idle.train()(x), idle.eval()(x))
