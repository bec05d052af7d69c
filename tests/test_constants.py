"""Zeros and ones made `like` a tensor of the image hold nothing of the image; unless it is written into them."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.swin_transformer import SwinTransformer

import idlefx
from tests.models.small import build, images, randomise

TOKENS = 37


class MaskMade(nn.Module):
    """A mask that is made anew in every forward."""

    def forward(self, x: Tensor) -> Tensor:
        mask = x.new_zeros(TOKENS, TOKENS)
        mask[3:9, ::2] = -2.0
        mask[:, 20:] += x.new_full((1,), 0.5)
        return mask


class MaskKept(nn.Module):
    """The same mask, kept as a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", MaskMade()(torch.zeros(1)))

    def forward(self, x: Tensor) -> Tensor:
        return self.mask


class Masked(nn.Module):
    """The attention of a block, with a mask."""

    def __init__(self, attention: nn.Module, mask: nn.Module) -> None:
        super().__init__()
        self.qkv, self.proj, self.mask = attention.qkv, attention.proj, mask

    def forward(self, x: Tensor, **_: object) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, 3, 16)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v, self.mask(x)).transpose(1, 2).flatten(2))


class Copying(nn.Module):
    """Writes the patches behind a first token of zeros, which so are of the image as far as can be told."""

    def __init__(self) -> None:
        super().__init__()
        self.vit = build("vit")

    def forward(self, x: Tensor) -> Tensor:
        patches = self.vit.patch_embed(x)
        tokens = patches.new_zeros(patches.shape[0], TOKENS, 48)
        tokens[:, 1:] = patches
        for block in self.vit.blocks:
            tokens = block(tokens)
        return self.vit.head(tokens[:, 0])


def masked(mask: type[nn.Module]) -> nn.Module:
    model = build("vit")
    for block in model.blocks:
        block.attn = Masked(block.attn, mask())
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_mask_made_in_the_block_is_read_by_position(dtype):
    made, kept = masked(MaskMade), masked(MaskKept)
    x = images(made, 3)
    idle, expected = (idlefx.convert(m, [1, 2], 0.5, example_inputs=x).to(dtype) for m in (made, kept))
    torch.testing.assert_close(made(x), kept(x))
    torch.testing.assert_close(idle(x.to(dtype)), expected(x.to(dtype)))
    assert not torch.allclose(idle(x.to(dtype)).float(), made(x))


def test_shifted_windows_of_torchvision_make_no_block_of_their_own():
    model = SwinTransformer([4, 4], 24, [2, 2], [2, 2], [4, 4], num_classes=5).eval()
    table = idlefx.inspect(model, torch.randn(2, 3, 64, 64))
    assert [block.path for block in table][::2] == ["features.1.0", "features.3.0"]
    assert len(table) == 4 and table[0].macs == table[1].macs


@torch.no_grad()
def test_what_the_image_is_written_into_is_of_the_image():
    model = Copying().eval()
    randomise(model)
    x = images(model.vit, 2)
    table = idlefx.inspect(model, x)
    assert {block.prefix for block in table} == {()}
    assert all("may be no prefix token" in block.refusal for block in table)
    idle = idlefx.convert(model, [1], 0.5, example_inputs=x, prefix=1)
    assert torch.equal(idlefx.convert(model, [1], 1.0, example_inputs=x, prefix=1)(x), model(x))
    assert torch.isfinite(idle(x)).all()
