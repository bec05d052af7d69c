"""Training loops of other libraries: the examples run on small models, which come nearer to the dense ones."""

from copy import deepcopy
from functools import cache

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

import idlefx
from idlefx.finetune import Taught
from idlefx.training.config import Settings
from idlefx.training.loop import finetune
from tests.models.colours import Colours, vit
from tests.support.documents import ROOT
from tests.support.messages import refusal, says

IMAGES = torch.stack([Colours(48, 0.0)[index][0] for index in range(48)])
EXAMPLES = sorted((ROOT / "examples").glob("tune_*.py"))


@cache
def _converted(idle):
    dense = vit(num_classes=0)
    return dense, idlefx.convert(dense, layers=[1], keep=0.4, idle=idle)


def pair(idle="rest"):
    return deepcopy(_converted(idle))


def cosine(dense, idle):
    (change,) = idlefx.compare(dense, idle, IMAGES, progress=False).changes["idle"].values()
    return change.cosine


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_an_example_is_short(file):
    assert len(EXAMPLES) == 4 and len(file.read_text().splitlines()) < 60


@pytest.mark.parametrize("idle", ["rest", "follow"])
def test_the_loss_is_that_of_finetune_and_trains_the_student_alone(idle):
    dense, student = pair(idle)
    taught = Taught(dense, student, IMAGES[:32]).train()
    assert not student.training and [*taught.state_dict()] == [f"idle.{name}" for name in student.state_dict()]
    found = taught(IMAGES[:32])
    assert found["loss"].item() == pytest.approx(1.0, rel=1e-2) and found["output"].shape == (32, 24)
    gain = finetune(*pair(idle), [IMAGES[:32]], [IMAGES[:32]], Settings(steps=1))
    assert gain.rows[0]["loss"] == pytest.approx(found["loss"].item(), rel=1e-3)
    found["loss"].backward()
    assert student.get_parameter("patch_embed.proj.weight").grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in dense.parameters())


def test_what_cannot_be_taught_is_refused():
    dense, student = pair()
    assert says(refusal(Taught, dense, student, []), "no images to begin with")
    same = idlefx.convert(dense, layers=[1], keep=1.0)
    assert says(refusal(Taught, dense, same, IMAGES[:8]), "dense model already")
    taught = Taught(dense, student, IMAGES[:8])
    student.requires_grad_(False)
    assert says(refusal(taught, IMAGES[:8]), "no output depends on what is trained")


def test_in_a_loop_like_that_of_timm():
    from examples.tune_timm_style import tune

    dense, student = pair()
    before = cosine(dense, student)
    averaged = tune(dense, student, DataLoader(list(IMAGES), 16), epochs=8, lr=1e-4)
    assert cosine(dense, student) > before
    ours, theirs = student.state_dict(), averaged.state_dict()
    assert ours.keys() == theirs.keys() and not ours["norm.weight"].equal(theirs["norm.weight"])


@pytest.mark.parametrize("idle", ["rest", "follow"])
def test_adapters_of_low_rank_are_trained_alone_and_merged(idle):
    pytest.importorskip("peft")
    from examples.tune_with_lora import layers_to_adapt, tune

    dense, student = pair(idle)
    before, names = {name: value.clone() for name, value in student.state_dict().items()}, [*student.state_dict()]
    chosen = layers_to_adapt(student)
    assert {"blocks.1.attn.proj", "blocks.2.mlp.fc1"} <= set(chosen) and "blocks.1.attn.qkv" not in chosen
    gain = tune(dense, student, IMAGES[:32].split(16), IMAGES[32:].split(16), steps=40, lr=3e-3)
    assert gain.gained and [*student.state_dict()] == names
    assert all(parameter.requires_grad for parameter in student.parameters())
    changed = {name for name, value in student.state_dict().items() if not value.equal(before[name])}
    assert changed == {f"{path}.weight" for path in chosen}
    found = idlefx.compare(dense, student, IMAGES[32:], progress=False).changes["idle"]["output"]
    assert found.relative_difference == pytest.approx(gain.tuned["output"].relative_difference, rel=1e-3)


@pytest.mark.slow
def test_in_the_trainer_of_hugging_face(tmp_path):
    pytest.importorskip("accelerate")
    from transformers import ViTConfig, ViTModel

    from examples.tune_with_trainer import Pictures, tune

    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 96}
    dense = ViTModel(ViTConfig(**sizes, image_size=64), add_pooling_layer=False).eval()
    idle = idlefx.convert(dense, layers=[1], keep=0.4)
    noise = torch.randint(256, (20, 70, 70, 3), dtype=torch.uint8).numpy()
    files = [tmp_path / f"{number}.png" for number in range(len(noise))]
    for file, pixels in zip(files, noise, strict=True):
        Image.fromarray(pixels).save(file)
    before = {name: value.clone() for name, value in idle.state_dict().items()}
    tune(dense, idle, Pictures(files, idle), tmp_path / "out", steps=4)
    assert (tmp_path / "out" / "tuned.safetensors").exists()
    assert any(not value.equal(before[name]) for name, value in idle.state_dict().items())


@pytest.mark.slow
def test_in_the_trainer_of_lightning(tmp_path):
    pytest.importorskip("lightning")
    from examples.tune_with_lightning import tune

    dense, student = pair()
    before = cosine(dense, student)
    quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "default_root_dir": tmp_path}
    tune(dense, student, DataLoader(list(IMAGES), 16), steps=30, **quiet)
    assert cosine(dense, student) > before
