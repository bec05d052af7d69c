"""What a forward writes in place is written by the converted model too, or the block that it is in cannot idle."""

import pytest
import torch
from torch import nn

import idlefx
from idlefx.pipeline import inspect
from idlefx.runtime.selections import selections
from tests.models.small import build, images
from tests.support.messages import refusal, says


class Net(nn.Module):
    """A ViT that keeps a moving mean of its images."""

    def __init__(self):
        super().__init__()
        self.vit = build("vit", depth=2)
        self.register_buffer("mean", torch.zeros(3))

    def tokens(self, x):
        return self.vit._pos_embed(self.vit.patch_embed(x))

    def rest(self, x):
        return self.vit.head(self.vit.norm(self.vit.blocks(x))[:, 0])


class Chain(Net):
    def forward(self, x):
        self.mean.mul_(0.9).add_(x.detach().mean((0, 2, 3)), alpha=0.1)
        return self.vit(x)


class View(Net):
    def forward(self, x):
        self.mean.view(1, 3).mul_(0.9).add_(x.detach().mean((0, 2, 3)), alpha=0.1)
        self.mean[:1].detach().neg_().sub_(1)
        return self.vit(x)


class Input(Net):
    def forward(self, x):
        x.sub_(0.5).div_(0.25)
        return self.vit(x)


class Dropped(Net):
    """Writes into what its dropout returned, which in eval mode is what went in."""

    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        x = self.tokens(x)
        y = self.drop(x)
        y.mul_(2.0)
        return self.rest(x + y)


class Unread(Net):
    """Runs a batch norm for its statistics alone."""

    def __init__(self):
        super().__init__()
        self.statistics = nn.BatchNorm2d(3)

    def forward(self, x):
        self.statistics(x)
        return self.vit(x)


class Mixed(Net):
    """Adds numbers of more digits in place, which keeps the fewer."""

    def forward(self, x):
        y = (x * 1).half()
        y += x / 3
        return self.vit(y.float())


class Mask(Net):
    """Masks a token by writing into zeros through a view."""

    def forward(self, x):
        x = self.tokens(x)
        block = self.vit.blocks[0]
        q, k, v = block.attn.qkv(block.norm1(x)).unflatten(2, (3, 3, -1)).permute(2, 0, 3, 1, 4)
        mask = torch.zeros(x.shape[1], x.shape[1])
        mask[:, 5:9] = float("-inf")
        y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.rest(x + y.transpose(1, 2).flatten(2))


def outcome(model, training=False):
    """What two calls give, and what they leave behind in inputs and buffers."""
    model.train(training)
    x = images(build("vit"), 3)
    torch.manual_seed(0)
    outputs = [model(x).detach() for _ in range(2)]
    return [*outputs, x, *(value.clone() for value in model.state_dict().values())]


def same(a, b):
    return len(a) == len(b) and all(torch.allclose(x, y, rtol=1e-4, atol=1e-5) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("net", [Chain, View, Input, Dropped, Unread, Mixed, Mask])
@torch.no_grad()
def test_writes_do_what_they_did(net):
    model = net()
    x = images(model.vit, 3)
    before = [x.clone(), *(value.clone() for value in model.state_dict().values())]
    dense, half = (idlefx.convert(model, [1], keep, example_inputs=x) for keep in (1.0, 0.5))
    assert same([x, *half.state_dict().values()], before), "converting writes"
    for training in (True, False):
        wanted, whole, part = (outcome(m, training) for m in (model, dense, half))
        assert same(whole, wanted)
        assert same(part[2:], wanted[2:])
        assert not same(part[:2], wanted[:2]), "nothing idles"


@pytest.mark.parametrize("net", [Chain, View, Input])
def test_the_backend_writes_too(net, monkeypatch):
    from idlefx.deploy import torch_compile

    monkeypatch.setattr(torch_compile, "compile_graph", lambda module, _: module)
    torch._dynamo.reset()
    wanted = outcome(net())
    found = outcome(torch.compile(net(), backend="idlefx", options={"layers": [1], "keep": 0.5}))
    torch._dynamo.reset()
    assert same(found[2:], wanted[2:]) and not same(found[:2], wanted[:2])


class Replaced(Net):
    """Puts another tensor in the place of its buffer, and asks for the batch as Python's `len`."""

    def forward(self, x):
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean((0, 2, 3))
        x = self.vit.patch_embed(x - self.mean.view(3, 1, 1))
        return self.rest(self.vit._pos_embed(x.view(len(x), -1, x.shape[-1])))


@torch.no_grad()
def test_buffers_that_are_replaced_are_so_where_the_batch_is_asked_by_len():
    model = Replaced()
    x = images(model.vit, 2)
    with pytest.warns(UserWarning, match="fixes the batch size"):
        idle = idlefx.convert(model, [1], 0.5, example_inputs=x)
    for _ in range(2):
        model(x), idle(x)
        assert torch.allclose(idle.get_buffer("mean"), model.mean)
    assert model.mean.abs().max() > 1e-3


@torch.no_grad()
def test_to_look_at_selections_writes_nothing():
    model = Chain()
    x = images(model.vit, 2)
    idle = idlefx.convert(model, [1], 0.5, example_inputs=x)
    selections(idle, x)
    assert not idle.get_buffer("mean").any()


def test_onnx_refuses_what_it_cannot_keep(tmp_path):
    pytest.importorskip("onnxscript")
    idle = idlefx.convert(Chain(), [1], 0.5, example_inputs=images(build("vit"), 2))
    words = refusal(idlefx.package, idle, tmp_path / "model.onnx")
    assert says(words, "writes into a buffer", r"test_writes\.py:\d+: self\.mean\.mul_", r"\.pt2")


class Between(Net):
    """A block that is written into while it runs."""

    def __init__(self, where):
        super().__init__()
        self.where = where
        self.register_buffer("seen", torch.zeros(48))

    def forward(self, x):
        x = self.tokens(x)
        block = self.vit.blocks[0]
        h = block.norm1(x) + self.seen
        if self.where == "entry":
            x[:, 0] += 1
        elif self.where == "inside":
            h[:, 0] += 1
        elif self.where == "buffer":
            self.seen.add_(1)
        elif self.where == "after":
            return self.rest(x + block.attn(h)) + self.seen.add_(1).mean()
        return self.rest(x + block.attn(h))


@pytest.mark.parametrize("where", ["entry", "inside", "buffer"])
def test_a_block_that_is_written_into_cannot_idle(where):
    x = images(build("vit"), 2)
    table = inspect(Between(where), x)
    words = "is read outside of it" if where == "inside" else "writes into a tensor that is read elsewhere"
    assert says(table[0].refusal, words, r"test_writes.py:\d+")
    assert all(block.can_idle for block in table[1:])
    assert inspect(Between("after"), x)[0].can_idle


def test_what_is_written_into_the_class_token_is_of_the_image():
    class Averaging(Net):
        def forward(self, x):
            x = self.tokens(x)
            x[:, 0] = x[:, 1:].mean(1)
            return self.rest(x)

    assert says(inspect(Averaging(), images(build("vit"), 2))[0].refusal, "the head reads token 0 alone", "prefix=")
