"""How often a classifier is right before and after conversion: the figures, their data, and what is refused."""

import json
import shutil

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

import idlefx
from idlefx.cli.main import main
from idlefx.training import datasets
from tests.models.colours import CLASSES, COLOURS, MODEL, Colours, folder, models, picture
from tests.support.messages import refusal, says


class Nearest(nn.Module):
    """Tells classes by the nearest colour, or takes some for others."""

    num_classes = CLASSES

    def __init__(self, order=(0, 1, 2, 3)):
        super().__init__()
        self.register_buffer("colours", torch.tensor(COLOURS[list(order)] / 127.5 - 1, dtype=torch.float32))

    def forward(self, images):
        return {"feature": images.flatten(1), "logits": -torch.cdist(images.mean((2, 3)), self.colours)}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return folder(tmp_path_factory.mktemp("colours"))


def answers(model, batches):
    """Class given and true of every image."""
    with torch.no_grad():
        pairs = [(model(images).argmax(1), labels) for images, labels in batches]
    return (torch.cat(parts).numpy() for parts in zip(*pairs, strict=True))


def test_figures_are_those_of_paired_samples():
    batches = list(DataLoader(Colours(64, noise=0.0), 10))
    dense, idle = models()
    found = idlefx.evaluate(dense, {"half": idle}, batches)
    (was, labels), (now, _) = answers(dense, batches), answers(idle, batches)
    change = 100.0 * (now == labels) - 100.0 * (was == labels)
    assert found.images == 64 and found.classes == CLASSES
    assert found.models["dense"].top1 == pytest.approx(100 * np.mean(was == labels))
    assert found.models["half"].change == pytest.approx(change.mean())
    assert found.models["half"].change_error == pytest.approx(change.std() / 8)
    assert found.models["half"].error == pytest.approx(100 * np.std(now == labels) / 8)
    assert found.models["half"].same_top1 == pytest.approx(100 * np.mean(was == now))


def test_a_worse_model_is_told_from_a_better_one(root):
    converted = models()[1]  # says how large the images are
    found = idlefx.evaluate(Nearest(), {"same": Nearest(), "worse": Nearest((1, 0, 2, 3)), "vit": converted}, root)
    assert found.images == 4 * CLASSES and found.models["dense"].top1 == 100.0
    same, worse = found.models["same"], found.models["worse"]
    assert (same.change, same.change_error, same.same_top1) == (0.0, 0.0, 100.0)
    assert (worse.top1, worse.change, worse.same_top1) == (50.0, -50.0, 50.0)
    assert "16 images of 4 classes; ± is one standard error" in str(found)


def test_models_stay_in_their_mode(root):
    dense, idle = models()
    idle.train()
    idlefx.evaluate(dense, idle, root, limit=4)
    assert idle.training and not dense.training


def test_class_folders_alone_are_read_whole(root):
    dense, idle = models()
    assert idlefx.evaluate(dense, idle, root / "train").images == 12 * CLASSES
    assert idlefx.evaluate(dense, idle, root, split="train").images == 12 * CLASSES


def test_a_limit_takes_images_of_all_classes(root):
    found = idlefx.evaluate(Nearest(), models()[1], root / "train", limit=CLASSES)
    assert found.images == CLASSES and found.models["dense"].top1 == 100.0


def test_a_class_without_held_out_images_does_not_shift_the_others(root, tmp_path):
    shutil.copytree(root, tmp_path / "less")
    shutil.rmtree(tmp_path / "less" / "validation" / "b")
    found = idlefx.evaluate(Nearest(), models()[1], tmp_path / "less")
    assert found.images == 4 * (CLASSES - 1) and found.models["dense"].top1 == 100.0


def test_an_unreadable_image_is_named_and_left_out(tmp_path, capsys):
    pictures = folder(tmp_path, train=1, val=30)
    (broken := pictures / "validation" / "a" / "7.png").write_bytes(b"no picture")
    found = idlefx.evaluate(Nearest(), models()[1], pictures)
    assert found.images == 30 * CLASSES - 1
    assert says(capsys.readouterr().out, f"left out {broken}")


def test_the_command_prints_and_writes_what_python_finds(root, tmp_path, capsys):
    words = [
        "--layers",
        "1",
        "--keep",
        "0.5",
        "--data",
        str(root),
        "--workers",
        "0",
        "--json",
        str(tmp_path / "f.json"),
    ]
    assert main(["evaluate", "--model", MODEL, *words, "--idle", "rest", "follow"]) == 0
    dense, rest = models()
    wanted = idlefx.evaluate(dense, {"rest": rest, "follow": idlefx.convert(dense, [1], 0.5, idle="follow")}, root)
    assert str(wanted) in capsys.readouterr().out
    told = json.loads((tmp_path / "f.json").read_text())
    assert {key: told[key] for key in ("images", "classes", "models")} == wanted.to_dict()
    assert told["plans"]["follow"]["idle"] == "follow" and told["versions"] and told["measured"]


@pytest.mark.parametrize(
    ("arrange", "words"),
    [
        (lambda root: root / "nowhere", "there is no"),
        (lambda root: folder(root, "abc"), "has 3 classes, but the model tells 4 apart"),
        (lambda root: folder(root, "a"), "images of one class only"),
        (lambda root: (folder(root), picture(0, 0).save(root / "validation" / "x.png"))[0], "pictures lie in"),
        (lambda _: [(torch.zeros(2, 3, 16, 16), torch.zeros(2, 1, dtype=torch.long))], "must be a pair of tensors"),
        (lambda _: [torch.zeros(2, 3, 16, 16)], "must be a pair of tensors"),
        (lambda _: [], "there are no images to evaluate on"),
        (lambda _: [(torch.zeros(1, 3, 16, 16), torch.tensor([4]))], "an image of class 4, but the model tells 4"),
    ],
)
def test_data_without_its_classes_is_refused(tmp_path, arrange, words):
    data = arrange(tmp_path)
    assert says(refusal(idlefx.evaluate, *models(), data), words)


def test_a_stream_takes_no_limit(monkeypatch):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(())

    monkeypatch.setattr(datasets, "_open", lambda *_, **__: Stream())
    assert says(refusal(idlefx.evaluate, *models(), "wds/shards", limit=5), "wds/shards is a stream", "leave the limit")


def test_a_limit_of_nothing_is_refused(root):
    assert says(refusal(idlefx.evaluate, *models(), root, limit=0), "limit is 0")


def test_no_converted_model_takes_the_name_of_the_dense_one(root):
    dense, idle = models()
    assert says(refusal(idlefx.evaluate, dense, {"dense": idle}, root), "is what the dense model is called")


def test_a_model_that_normalises_by_itself_wants_batches_of_bytes(root):
    class Bytes(nn.Module):
        def __init__(self):
            super().__init__()
            self.vit = models()[0]

        def forward(self, images):
            return self.vit(images.float() / 127.5 - 1)

    dense, example = Bytes(), torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
    idle = idlefx.convert(dense, [1], 0.5, example_inputs=example)
    assert says(refusal(idlefx.evaluate, dense, idle, root), "takes uint8 images", "give batches")
    assert idlefx.evaluate(dense, idle, [(example, torch.tensor([0, 1]))]).images == 2


def test_a_model_without_logits_is_sent_to_compare(root):
    dense, idle = models(num_classes=0)
    batches = [(torch.zeros(2, 3, 16, 16), torch.tensor([0, 1]))]
    wrapped = [lambda x, model=model: model(x)[:, None] for model in (dense, idle)]
    assert says(refusal(idlefx.evaluate, *wrapped, batches), "no logits", "idlefx.compare")
    assert says(refusal(idlefx.evaluate, *wrapped, root), "nothing is known of the size")
