"""The modules inside a converted model: what still works with them, and what speaks where it cannot."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

import idlefx
from tests.models.small import build, images

MODEL = build("vit")
X = images(MODEL, 2)
HOOKS = (
    "register_forward_pre_hook",
    "register_forward_hook",
    "register_full_backward_pre_hook",
    "register_full_backward_hook",
    "register_backward_hook",
)


@pytest.fixture(scope="module")
def converted():
    return idlefx.convert(MODEL, layers=[1], keep=0.5)


@pytest.fixture(params=[copy.deepcopy, lambda idle: pickle.loads(pickle.dumps(idle))], ids=["copy", "pickle"])
def idle(request, converted):
    return request.param(converted)


def test_blocks_can_be_frozen(idle):
    for block in idle.blocks[:2]:
        for parameter in block.parameters():
            parameter.requires_grad_(False)
    idle(X).sum().backward()
    assert isinstance(idle.blocks, nn.ModuleList) and len(idle.blocks) == len(MODEL.blocks)
    without = {name for name, parameter in idle.named_parameters() if parameter.grad is None}
    wanted = {name for name, _ in MODEL.named_parameters() if name.startswith(("blocks.0.", "blocks.1."))}
    assert without == wanted and len(wanted) == 24


@pytest.mark.parametrize("register", HOOKS)
def test_hooks_that_will_never_run_are_announced(converted, register):
    words = (
        r"^a hook on `blocks\.1\.attn` of a converted model will never run: the model is one graph.*backend=\"idlefx\""
    )
    with pytest.warns(UserWarning, match=words) as told:
        getattr(copy.deepcopy(converted).blocks[1].attn, register)(lambda *_: None)
    assert told[0].filename == __file__


def test_hooks_of_the_whole_model_run(idle):
    seen = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        idle.register_forward_hook(lambda *_: seen.append("forward"))
        idle.register_full_backward_hook(lambda *_: seen.append("backward"))
    idle(X.clone().requires_grad_()).sum().backward()
    assert seen == ["forward", "backward"]


def test_parts_cannot_be_called(idle):
    with pytest.raises(
        idlefx.InputError, match=r"^model: `blocks\.1\.mlp` of a converted model holds parameters alone"
    ):
        idle.blocks[1].mlp(X)


@torch.no_grad()
@pytest.mark.parametrize("head", [nn.Sequential(nn.Linear(48, 5), nn.Softmax(-1)), nn.Identity()], ids=["two", "none"])
def test_a_head_of_one_layer_may_become_anything(idle, head):
    idle.head = nn.Identity()
    features = idle(X)
    idle.head = head
    assert features.shape == (2, 48) and torch.equal(idle(X), head(features))
    with pytest.raises(idlefx.InputError, match=r"`head` of a converted model .* by NoneType, which the graph cannot"):
        idle.head = None


def test_what_would_not_be_called_is_refused_when_it_is_put_there(idle):
    class Twice(nn.Module):
        """An MLP that does more than its layers say."""

        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(48, 192), nn.Linear(192, 48)

    with pytest.raises(idlefx.InputError, match="cannot be replaced by Twice, whose forward would not be called"):
        idle.blocks[2].mlp = Twice()
    idle.blocks[2].mlp = idle.get_submodule("blocks.2.mlp")


def test_parts_of_parts_are_looked_at_too(idle):
    with pytest.raises(
        idlefx.InputError, match=r"`blocks\.2\.mlp` of a converted model cannot be .* `blocks.2.mlp.fc1"
    ):
        idle.blocks[2].mlp = nn.Identity()
    with pytest.raises(idlefx.InputError, match=r"`blocks\.2` of a converted model cannot be replaced by Identity"):
        idle.blocks[2] = nn.Identity()
    before = idle(X)
    idle.blocks[2].mlp.fc2 = nn.Linear(192, 48)
    idle.blocks[2].note = nn.Identity()  # which is new, and so in nobody's place
    assert not idle(X).allclose(before, rtol=1e-3)


class Tokens(nn.Module):
    """The part of a model that holds its blocks."""

    def __init__(self, vit: nn.Module) -> None:
        super().__init__()
        self.vit = vit

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.vit.forward_features(x)


class Head(Tokens):
    """What comes after it."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.vit.forward_head(tokens)


def test_a_part_that_was_converted_by_itself_has_hooks_and_any_head(converted):
    tokens = idlefx.convert(Tokens(MODEL), layers=[1], keep=0.5, example_inputs=X)
    whole = nn.Sequential(tokens, Head(MODEL))
    seen = {}
    tokens.register_forward_hook(lambda module, args, output: seen.update(tokens=output))
    logits = whole(X)
    assert logits.allclose(converted(X), atol=1e-6)
    (gradient,) = torch.autograd.grad(logits[:, 3].sum(), seen["tokens"])
    assert gradient.shape == (2, 37, 48) and gradient.abs().sum() > 0
    whole[1] = nn.Sequential(nn.Flatten(), nn.Linear(37 * 48, 5))
    assert whole(X).shape == (2, 5)
