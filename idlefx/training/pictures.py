"""Pictures in files as a data set, and batches of them without labels."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image
from torch.utils.data import Dataset

from idlefx.reporting.comparison.image_batches import ImageBatch, Name
from idlefx.training.loader import ImageLoader


class Pictures(Dataset[Any]):
    """Pictures, each with its class, or with its own place where there are no classes.

    Args:
        files: In order.
        root: The folder below which they lie.
        labels: Of each file its class; by default its place.
        class_to_idx: Classes by name.

    Attributes:
        transform: From a picture to what the model takes; set by whoever opens the data.
    """

    input_img_mode = "RGB"

    def __init__(
        self,
        files: Sequence[Path],
        root: Path,
        labels: Sequence[int] | None = None,
        class_to_idx: Mapping[str, int] | None = None,
    ) -> None:
        self.files, self.root, self.transform = list(files), root, None
        self.reader = _Reader(self.files, range(len(files)) if labels is None else labels, dict(class_to_idx or {}))

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        file, label = self.reader[index]
        with file:
            picture: Any = Image.open(file).convert(self.input_img_mode)
        return (self.transform(picture) if self.transform else picture), label

    def short_name(self, index: int) -> str:
        """The file of a picture, below the folder."""
        return str(self.files[index].relative_to(self.root))

    def filename(self, index: int, *, absolute: bool = False) -> str:
        """The file of a picture."""
        return str(self.files[index].absolute() if absolute else self.files[index])


class _Reader:
    """Opened files and labels, as the readers of timm give them, so that what cannot be read is found one by one."""

    def __init__(self, files: Sequence[Path], labels: Sequence[int], class_to_idx: dict[str, int]) -> None:
        self.files, self.labels, self.class_to_idx = files, labels, class_to_idx

    def __getitem__(self, index: int) -> tuple[BinaryIO, int]:
        return self.files[index].open("rb"), self.labels[index]


class PictureLoader(ImageLoader):
    """Batches of pictures whose labels, if there are any, are left out; they are named by their files."""

    labelled = False

    def epoch(self, number: int = 0, skip: int = 0) -> Iterator[Any]:
        """Batches of one epoch: images (B, C, H, W) and their names."""
        before = 0
        for images, places in super().epoch(number, skip):
            names: Sequence[Name] = range(before, before + len(places))
            if isinstance(self.dataset, Pictures):
                names = [self.dataset.short_name(int(place)) for place in places]
            before += len(places)
            yield ImageBatch(names, images)
