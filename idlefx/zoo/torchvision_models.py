"""Models of torchvision."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

from idlefx.zoo.entry import DEPTH, Entry, images


def _vit() -> nn.Module:
    from torchvision.models import VisionTransformer

    return VisionTransformer(40, 8, DEPTH, 3, 48, 96, num_classes=7)


def _swin(windows: tuple[int, int] = (4, 4)) -> nn.Module:
    from torchvision.models.swin_transformer import SwinTransformer

    return SwinTransformer([4, 4], 24, [2, 1], [2, 2], list(windows), num_classes=7)


def _swin_v2(windows: tuple[int, int] = (4, 4)) -> nn.Module:
    from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformer, SwinTransformerBlockV2

    options = {"block": SwinTransformerBlockV2, "downsample_layer": PatchMergingV2}
    return SwinTransformer([4, 4], 24, [2, 1], [2, 2], list(windows), num_classes=7, **options)


def _max_vit() -> nn.Module:
    from torchvision.models.maxvit import MaxVit

    return MaxVit((64, 64), 16, 2, [24, 48], [1, 1], 8, 0.0, num_classes=7)


def _swin_3d(depths: list[int], frames: int) -> nn.Module:
    from torchvision.models.video.swin_transformer import SwinTransformer3d

    return SwinTransformer3d([2, 4, 4], 24, depths, [2] * len(depths), [frames, 4, 4], num_classes=7)


def _film(batch: int) -> Tensor:
    return torch.randn(batch, 3, 1, 1, 1) + torch.randn(batch, 3, 4, 32, 32)


def torchvision_entries() -> Iterator[Entry]:
    """The rows."""
    small = partial(images, side=32)
    yield Entry("torchvision ViT", "torchvision", _vit)
    yield Entry("torchvision Swin", "torchvision", _swin, inputs=small)
    yield Entry("torchvision Swin, padded", "torchvision", partial(_swin, (3, 3)), inputs=small)
    yield Entry("torchvision Swin, wide windows", "torchvision", partial(_swin, (2, 4)), inputs=small)
    yield Entry("torchvision Swin v2", "torchvision", _swin_v2, inputs=small)
    yield Entry("torchvision Swin v2, padded", "torchvision", partial(_swin_v2, (3, 3)), inputs=small)
    yield Entry("torchvision Swin of a film", "torchvision", partial(_swin_3d, [2, 1], 1), inputs=_film)
    yield Entry("torchvision Swin of a film, all frames", "torchvision", partial(_swin_3d, [1, 1], 2), 2, inputs=_film)
    yield Entry("torchvision MaxViT", "torchvision", _max_vit, 4, inputs=partial(images, side=64))
