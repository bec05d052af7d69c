"""Folders of pictures: how each arrangement is read, said and split."""

import pytest

import idlefx
from idlefx.training.datasets import Source, open_loaders
from idlefx.training.folders import held_out
from tests.models.colours import SIDE, folder, models, picture, vit
from tests.support.messages import refusal, says


@pytest.fixture(scope="module")
def encoder():
    """A model without classes."""
    return idlefx.convert(vit(num_classes=0), layers=[1], keep=0.5)


def pictures(root, *names, count=10):
    """Write pictures into folders; "" is the folder itself."""
    for label, name in enumerate(names):
        (root / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            picture(label, number).save(root / name / f"{number}.png")
    return root


def opened(root, idle, **source):
    return open_loaders(Source(str(root), **source), idle, 4)


def sizes(loaders):
    return [len(loader.dataset) for loader in loaders]


def test_pictures_in_any_arrangement_are_split_by_their_names(tmp_path, encoder, capsys):
    pictures(tmp_path, "", "a", "a/b", "c d/e")
    train, val = opened(tmp_path, encoder)
    assert not train.labelled and sizes((train, val)) == [36, 4]
    assert says(capsys.readouterr().out, "data: 36 pictures to train on, 4 held out, which are always the same ones")
    held = {name for batch in val.epoch() for name in batch.names}
    assert held == {name for batch in opened(tmp_path, encoder)[1].epoch() for name in batch.names}
    assert all((tmp_path / name).is_file() for name in held)
    seen = {name for batch in train.epoch() for name in batch.names}
    assert len(seen) == 36 and not seen & held
    assert next(val.epoch()).inputs.shape == (4, 3, SIDE, SIDE)
    moved = tmp_path.rename(tmp_path.with_name("elsewhere"))
    assert held == {name for batch in opened(moved, encoder)[1].epoch() for name in batch.names}


@pytest.mark.parametrize(
    ("names", "classifier", "labelled", "words"),
    [
        ("abcd", True, True, "read with the labels of 4 folders"),
        ("abc", True, False, "read without labels, as there are 3 folders, but the model tells 4 classes apart"),
        ("abcd", False, False, "read without labels, as the model is no classifier"),
        (["", "a", "b"], True, False, "read without labels, as 10 pictures lie beside 2 folders"),
        ([""], True, False, "read without labels, as there are no class folders"),
        ("a", False, False, "all of them are of one kind, a, and so tell nothing of others"),
    ],
)
def test_it_is_said_how_a_folder_was_read(tmp_path, encoder, capsys, names, classifier, labelled, words):
    pictures(tmp_path, *names)
    train, val = opened(tmp_path, models()[1] if classifier else encoder)
    assert says(capsys.readouterr().out, "^data: ", words)
    assert train.labelled is val.labelled is labelled
    if labelled:
        assert {int(label) for _, labels in train.epoch() for label in labels} == {0, 1, 2, 3}


def test_folders_that_are_split_stay_so(tmp_path, encoder, capsys):
    folder(tmp_path)
    assert opened(tmp_path, models()[1])[0].labelled
    train, val = opened(tmp_path, encoder)
    assert not train.labelled and sizes((train, val)) == [48, 16]
    assert says(capsys.readouterr().out, "48 pictures to train on, 16 held out, read without labels")
    picture(0, 0).save(tmp_path / "train" / "loose.png")
    assert sizes(opened(tmp_path, models()[1])) == [49, 16]
    assert says(capsys.readouterr().out, "read without labels, as there are pictures in .*train itself")


@pytest.mark.parametrize(
    ("count", "source", "words"),
    [
        (3, {}, ["of 3 pictures", "more pictures", "--val-share"]),
        (10, {"val_share": 0.0}, ["a share of 0", "--val-share"]),
        (10, {"val_share": 1.0}, ["a share of 1", "leave pictures to train on"]),
        (10, {"val_most": 1}, ["at the most 1"]),
    ],
)
def test_a_share_that_leaves_nothing_is_refused(tmp_path, encoder, count, source, words):
    message = refusal(opened, pictures(tmp_path, "", count=count), encoder, **source)
    assert says(message, "^data: ", *words), message


def test_a_folder_without_pictures_is_refused(tmp_path, encoder):
    assert says(refusal(opened, tmp_path, encoder), "there is no image in")


def test_a_picture_more_hardly_moves_the_others(tmp_path):
    files = [tmp_path / f"{number}.png" for number in range(200)]
    before, after = (set(held_out(part, tmp_path, 0.1, 100)[1]) for part in (files[:-10], files))
    assert len(before) == 19 and len(after) == 20 and len(before & after) >= 16


def test_a_picture_that_cannot_be_read_is_left_out(tmp_path, encoder, capsys):
    pictures(tmp_path, "", count=200)
    (tmp_path / "7.png").write_bytes(b"no picture")
    train, val = opened(tmp_path, encoder)
    names = [name for loader in (train, val) for batch in loader.epoch() for name in batch.names]
    assert "7.png" not in names and says(capsys.readouterr().out, r"left out .*7\.png: cannot identify")
