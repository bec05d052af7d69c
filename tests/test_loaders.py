"""Data for fine-tuning: what is read in which order, and what is refused."""

import os

import pytest
import torch
from torch.utils.data import IterableDataset

from idlefx.training.datasets import Source, open_loaders
from idlefx.training.distributed import World, processes
from idlefx.training.loader import ImageLoader
from tests.models.colours import SIDE, Colours, batches, folder, models
from tests.support.messages import refusal, says


def seen(part, *place):
    return [(images.clone(), labels.tolist()) for images, labels in part.epoch(*place)]


def same(some, others):
    return len(some) == len(others) and all(
        torch.equal(a, b) and x == y for (a, x), (b, y) in zip(some, others, strict=True)
    )


def test_batches_follow_from_seed_epoch_and_place_alone():
    train, _ = batches(40)
    first = seen(train, 3)
    torch.randn(5)
    assert same(first, seen(train, 3))
    assert same(first, seen(batches(40, workers=2)[0], 3))
    assert same(first[2:], seen(train, 3, 2))
    assert not same(first, seen(train, 4))
    assert not same(first, seen(batches(40, seed=1)[0], 3))


class Stream(IterableDataset):
    """Pictures in an order that follows from the epoch, shared among workers, as timm's readers do it."""

    def __init__(self, size: int = 40) -> None:
        self.images, self.epoch = Colours(size), torch.zeros((), dtype=torch.long).share_memory_()

    def set_epoch(self, number: int) -> None:
        self.epoch.fill_(number)

    def set_loader_cfg(self, num_workers: int) -> None:
        self.workers = num_workers

    def __len__(self) -> int:
        return len(self.images)

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(int(self.epoch)))
        yield from (self.images[int(at)] for at in order[worker.id :: worker.num_workers])


def test_streams_follow_from_seed_epoch_and_place_too():
    train = ImageLoader(Stream(), 8, training=True, workers=2)
    first = seen(train, 1)
    assert len(train) == 5 and len(first) == 4  # each of two workers has 20 images
    assert same(first[1:], seen(train, 1, 1)) and same(
        first, seen(ImageLoader(Stream(), 8, training=True, workers=2), 1)
    )
    assert not same(first, seen(train, 2))


def test_labels_that_the_head_does_not_know_are_refused():
    part = ImageLoader(Colours(8), 8, classes=3)
    assert says(refusal(lambda: list(part.epoch())), "class 3", "head has 3 classes")


def test_fewer_images_than_a_step_needs_are_refused():
    message = refusal(batches, 6, 4, world=World(1, 2))
    assert says(message, "6 training images are fewer than the 8", "--batch-size"), message


def open_folder(path, name=None, **source):
    return open_loaders(Source(str(name or path), augment="none", **source), models()[1], 4)


def test_folder_is_opened_with_the_classes_of_the_training_images(tmp_path):
    folder(tmp_path)
    for file in (tmp_path / "validation" / "a").iterdir():
        file.unlink()
    train, val = open_folder(tmp_path)
    assert (len(train.dataset), len(val.dataset)) == (48, 12)
    assert sorted(label for _, labels in val.epoch() for label in labels.tolist()) == [1] * 4 + [2] * 4 + [3] * 4
    picture, label = val.dataset[0]
    assert picture.shape == (3, SIDE, SIDE) and label == 1 and picture.argmax(0).float().mean() > 0.9


@pytest.mark.parametrize(
    "classes, words",
    [
        ("", ["cannot open split train", "Found 0 images"]),
        ("a", ["one class only"]),
        ("abc", ["has 3 classes", "head has 4"]),
        ("abcde", ["has 5 classes", "head has 4"]),
    ],
)
def test_data_of_other_classes_than_the_model_is_refused(tmp_path, classes, words):
    folder(tmp_path, classes)
    for split in ("train", "validation"):
        (tmp_path / split).mkdir(exist_ok=True)
    message = refusal(open_folder, tmp_path)
    assert says(message, "^data: ", *words), message


def test_data_that_is_not_there_is_refused(tmp_path):
    assert says(refusal(open_folder, tmp_path / "none"), "there is no .*none", "hfds/")
    assert says(refusal(open_folder, tmp_path, "hfds/no-such/data"), "hfds/no-such/data", "pip install|cannot open")
    assert says(refusal(open_folder, tmp_path, "torch/no-such"), "cannot open split train of torch/no-such")


def test_data_without_validation_images_is_refused(tmp_path):
    folder(tmp_path, "abcd")
    (tmp_path / "validation").rename(tmp_path / "tests")
    message = refusal(open_folder, tmp_path)
    assert says(message, "must hold the folders train and validation", "--val-split"), message


def test_validation_images_of_unknown_classes_are_refused(tmp_path):
    folder(tmp_path)
    (tmp_path / "validation" / "d").rename(tmp_path / "validation" / "z")
    assert says(refusal(open_folder, tmp_path), "classes without training images: z")


@pytest.mark.parametrize("training", [True, False])
def test_too_many_unreadable_images_stop_the_run(tmp_path, training, capsys):
    folder(tmp_path)
    bad = tmp_path / ("train" if training else "validation") / "c" / "0.png"
    bad.write_text("no picture")
    part = open_folder(tmp_path)[not training]
    message = refusal(lambda: [list(part.epoch(number)) for number in range(9)])
    assert says(message, "1 of (48|16) images cannot be read, more than 1%", "c/0.png"), message
    assert says(capsys.readouterr().out, "left out .*c/0.png: cannot identify image file")


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, value in {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setitem(os.environ, name, value)
    message = refusal(processes().__enter__)
    assert says(message, "4 processes", "2 GPUs", "--nproc-per-node 2", "--device cpu"), message
