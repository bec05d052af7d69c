"""Parts in another mode than the model stay in it, and a warning says which; lost checkpoints are announced too."""

import cProfile
import warnings

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.utils.checkpoint import checkpoint

import idlefx
from idlefx.capture.modes import checkpoints_seen
from idlefx.deploy import torch_compile
from tests.models.small import build, images
from tests.support.messages import says


def vit(**options):
    return build("vit", depth=2, **options)


def converted(model, keep, x):
    """The converted model, and what was said of it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        idle = idlefx.convert(model, [1], keep, example_inputs=x)
    return idle, [words for warning in caught if "converted" in (words := str(warning.message))]


def same_dice(a, b, x):
    results = []
    for model in (a, b):
        torch.manual_seed(1)
        results.append(model(x))
    return torch.equal(*results)


def moves(model, x):
    """Whether two calls differ."""
    return not torch.equal(model(x), model(x))


@pytest.mark.parametrize("keep", [0.5, pytest.param(1.0, marks=pytest.mark.slow)])
@torch.no_grad()
def test_monte_carlo_dropout_stays_on(keep):
    model = vit(proj_drop_rate=0.3)
    x = images(model, 2)
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.train()
    idle, words = converted(model, keep, x)
    assert len(words) == 1
    assert says(words[0], r"`pos_drop`.*more in train mode, the model in eval mode", r"model\.eval\(\) first")
    assert not idle.training and moves(idle, x)
    assert moves(idle.train(), x) and moves(idle.eval(), x)
    if keep == 1.0:
        assert same_dice(idle.eval(), model, x) and same_dice(idle.train(), model.train(), x)

    with_loss = idlefx.with_cut_loss(idle.eval())
    assert not torch.equal(with_loss(x)[0], with_loss(x)[0])


@torch.no_grad()
def test_frozen_blocks_stay_in_eval_mode():
    model = vit(proj_drop_rate=0.3, drop_rate=0.5).train()
    x = images(model, 2)
    model.blocks.eval()
    idle, words = converted(model, 1.0, x)
    assert len(words) == 1 and says(words[0], "^`blocks` in eval mode, the model in train mode", r"model\.train\(\)")
    assert idle.training and same_dice(idle, model, x)
    assert moves(idle, x), "the head's dropout is on"
    model.head_drop.eval()
    idle, _ = converted(model, 1.0, x)
    assert not moves(idle, x) and not moves(idle.eval(), x) and not moves(idle.train(), x)


@torch.no_grad()
def test_frozen_batch_norm_keeps_its_statistics():
    model = vit().train()
    model.fc_norm = nn.BatchNorm1d(48).eval()
    x = images(model, 4)
    idle, words = converted(model, 0.5, x)
    assert len(words) == 1 and says(words[0], "^`fc_norm` in eval mode")
    before = idle.get_buffer("fc_norm.running_mean").clone()
    idle(x)
    assert torch.equal(idle.get_buffer("fc_norm.running_mean"), before)
    model.train()
    idle, words = converted(model, 0.5, x)
    idle(x)
    assert not words and not torch.equal(idle.get_buffer("fc_norm.running_mean"), before)


@torch.no_grad()
def test_what_the_model_freezes_by_itself_is_frozen_without_a_word():
    class Frozen(VisionTransformer):
        def train(self, mode=True):
            super().train(mode)
            self.blocks.eval()
            return self

    model = Frozen(img_size=48, patch_size=8, embed_dim=48, num_heads=3, depth=2, num_classes=4, proj_drop_rate=0.3)
    x = images(model, 2)
    for state in (model, model.train(), model.eval()):
        idle, words = converted(state, 1.0, x)
        assert not words and not moves(idle.train(), x) and not moves(idle.eval(), x)


@torch.no_grad()
def test_parts_whose_mode_does_not_matter_are_not_spoken_of():
    model = vit()
    model.blocks[0].train()
    assert not converted(model, 1.0, images(model, 2))[1]


@pytest.mark.parametrize("mode", [True, False])
def test_checkpointing_that_gets_lost_is_announced(mode):
    model = vit().train(mode)
    x = images(model, 2)
    model.set_grad_checkpointing()
    idle, words = converted(model, 1.0, x)
    assert len(words) == 1 and says(words[0], "checkpoints activations", r"timm/\S+\.py:\d+", "fewer images")
    assert torch.equal(idle(x), model(x))


class Own(nn.Module):
    """A ViT with checkpoints in its own forward, in train mode."""

    def __init__(self, reentrant):
        super().__init__()
        self.vit, self.reentrant = vit(), reentrant

    def forward(self, x):
        x = self.vit._pos_embed(self.vit.patch_embed(x))
        for block in self.vit.blocks:
            x = checkpoint(block, x, use_reentrant=self.reentrant) if self.training else block(x)
        return self.vit.head(self.vit.norm(x)[:, 0])


def test_the_line_of_the_checkpoint_is_the_users():
    model = Own(reentrant=False)
    _, words = converted(model, 0.5, images(model.vit, 2))
    assert len(words) == 1 and says(words[0], r"test_modes\.py:\d+\)")


def test_a_profiler_goes_on_while_checkpoints_are_looked_for():
    profiler = cProfile.Profile()
    profiler.enable()
    try:
        with checkpoints_seen():
            pass
        says("", "seen")
    finally:
        profiler.disable()
    assert any(says.__code__ is entry.code for entry in profiler.getstats())


@pytest.mark.parametrize("make", [lambda: Own(False), lambda: vit().train()], ids=["own", "timm"])
def test_the_backend_refuses_checkpoints_in_words(make, monkeypatch):
    monkeypatch.setattr(torch_compile, "compile_graph", lambda module, _: module)
    torch._dynamo.reset()
    model = make()
    if hasattr(model, "set_grad_checkpointing"):
        model.set_grad_checkpointing()
    fast = torch.compile(model, backend="idlefx", options={"layers": [1], "keep": 0.5})
    with pytest.raises(BackendCompilerFailed) as caught:
        fast(images(vit(), 2))
    refusal = caught.value.inner_exception
    assert isinstance(refusal, idlefx.errors.CaptureError)
    assert says(str(refusal), "checkpoints activations", r"\.py:\d+", "set_grad_checkpointing", "convert")
    assert len(str(refusal)) < 500
    torch._dynamo.reset()
