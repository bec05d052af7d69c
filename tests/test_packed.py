"""Tokens of all images packed into one sequence, as by models for images of any size: mostly refused, in words."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import idlefx
from tests.support.messages import says

WIDTH, PATCH = 24, 48


class Block(nn.Module):
    """A block over one sequence (1, T, C)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, count, _ = x.shape
        q, k, v = self.qkv(self.norm(x)).view(batch, count, 3, 2, -1).permute(2, 0, 3, 1, 4)
        return x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, count, WIDTH))


class Packed(nn.Module):
    """Patches (T, 48) of all images become one sequence, which is joined by fours or not."""

    def __init__(self, join: str) -> None:
        super().__init__()
        self.join, self.patches = join, nn.Linear(PATCH, WIDTH)
        self.joined = nn.Linear(4 * WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, patches: Tensor) -> Tensor:
        x = self.patches(patches)
        if self.join == "fours":
            x = self.joined(x.view(-1, 4 * WIDTH))
        elif self.join == "ordered":
            fours = torch.arange(x.shape[0] // 4, device=x.device)
            x = x.reshape(len(x) // 4, 4, WIDTH)[fours].reshape(4 * (len(x) // 4), WIDTH)
        elif self.join == "images":
            x = x.flatten(0, 1)
        x = x[None]
        for block in self.blocks:
            x = block(x)
        return x


class Mixed(Packed):
    """Two blocks over each image's tokens (B, T, C), and one over all images'."""

    def forward(self, patches: Tensor) -> Tensor:
        x = self.patches(patches)
        x = self.blocks[0](x)
        x = self.blocks[1](x.flatten(0, 1)[None]).view(x.shape)
        return self.blocks[0](x)


@pytest.mark.parametrize("join", ["none", "fours", "ordered", "images"])
def test_packed_sequence_is_refused_in_words(join):
    x = torch.randn(2, 8, PATCH) if join == "images" else torch.randn(16, PATCH)
    with pytest.raises(idlefx.BlockError) as caught:
        idlefx.convert(Packed(join).eval(), [1], 0.5, example_inputs=x)
    assert says(str(caught.value), r"packed into one", r"dimension 0", r"\(B, C, H, W\)", r"test_packed\.py:\d+: ")


def test_only_the_block_over_all_images_is_refused():
    x = torch.randn(2, 8, PATCH)
    table = idlefx.inspect(Mixed("none").eval(), x)
    assert [block.can_idle for block in table] == [True, False, True]
    assert says(table[1].refusal, r"attends over the batch", r"test_packed\.py:\d+: ")


class Fours(nn.Module):
    """A model that takes images by fours, so that one image alone has no size."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.block, self.rest = nn.Linear(PATCH, WIDTH), Block(), nn.Linear(WIDTH, WIDTH)

    def forward(self, patches: Tensor) -> Tensor:
        fours = patches.shape[0] // 4
        x = self.block(self.patches(patches))
        x = x.reshape(fours, 4, -1, WIDTH)[torch.arange(fours)]
        return self.rest(x.reshape(4 * fours, -1, WIDTH))


def test_work_that_has_no_size_for_one_image_is_refused_in_words():
    with pytest.raises(idlefx.BlockError) as caught:
        idlefx.inspect(Fours().eval(), torch.randn(8, 8, PATCH))
    assert says(str(caught.value), r"no size for a batch of one", r"test_packed\.py:\d+: ", r"must count images")


class Segments(nn.Module):
    """Attention over each of several images that are packed into one sequence, as long as an input or a list says."""

    def __init__(self, lengths: list[int] | None = None) -> None:
        super().__init__()
        self.patches, self.block = nn.Linear(PATCH, WIDTH), Block()
        self.lengths = lengths

    def forward(self, patches: Tensor, lengths: Tensor | None = None) -> Tensor:
        told = self.lengths if lengths is None else [length for length in lengths.tolist() if length > 0]
        return torch.cat([self.block(image) for image in self.patches(patches)[None].split(told, 1)], 1)


def test_lengths_of_packed_images_must_be_plain_numbers():
    x, lengths = torch.randn(16, PATCH), [10, 6]
    with pytest.raises(idlefx.CaptureError) as caught:
        idlefx.inspect(Segments().eval(), (x, torch.tensor(lengths)))
    assert says(str(caught.value), "lengths of packed images, must be plain numbers", r"test_packed\.py:\d+")
    with pytest.warns(UserWarning, match="fixes the batch size"):
        idle = idlefx.convert(Segments(lengths).eval(), [0], 0.5, example_inputs=x)
    assert [(step.kept, step.tokens) for step in idle.plan] == [(5, 10), (3, 6)], "of each image its share"
