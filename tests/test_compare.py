"""What a comparison says of converted models: its figures against plain torch, and what it leaves as it was."""

import gc
import json
from collections.abc import Iterator
from copy import deepcopy
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import ViTConfig, ViTForImageClassification

import idlefx
from tests.models.small import DROPOUTS, SMALL, build, images
from tests.support.cases import Case, convert, converted

CASE = Case((1, 3), 0.5)
COUNT = 7


class Dense(nn.Module):
    """A model with outputs of every kind; none of them says how many classes there are."""

    def __init__(self) -> None:
        super().__init__()
        self.net = build("vit", depth=2)

    def forward(self, x: Tensor) -> dict[str, Any]:
        tokens = self.net.forward_features(x)
        logits = self.net.forward_head(tokens)
        return {"logits": logits, "maps": (tokens, [logits.argmax(1), self.net.cls_token])}


@cache
def pair() -> tuple[nn.Module, Any]:
    model = Dense().eval()
    return model, idlefx.convert(model, [0, 1], 0.5, example_inputs=images(model.net, 2, seed=99))


def pictures(count: int = COUNT) -> Tensor:
    return images(build("vit"), count)


def quick(model: nn.Module, idle: Any, *args: Any, **options: Any) -> idlefx.Comparison:
    return idlefx.compare(model, idle, *args, progress=False, **options)


@torch.no_grad()
def test_figures_are_those_of_a_few_lines_of_torch():
    model, idle = pair()
    x = pictures()
    found = quick(model, idle, x, batch_size=3)
    a, b = model(x), idle(x)
    assert found.images == COUNT and found.left_out == ("maps.1.1",)
    logits, tokens, label = (found.changes["idle"][name] for name in ("logits", "maps.0", "maps.1.0"))
    for change, one, other in ((logits, a["logits"], b["logits"]), (tokens, a["maps"][0], b["maps"][0])):
        cosine = F.cosine_similarity(one.flatten(1), other.flatten(1))
        assert change.cosine == pytest.approx(cosine.mean().item(), abs=1e-6) and change.cosine < 0.999
        assert (change.worst_image, change.worst) == (cosine.argmin(), pytest.approx(cosine.min().item(), abs=1e-6))
        assert change.relative_difference == pytest.approx(((one - other).norm() / one.norm()).item(), rel=1e-5)
        assert change.shape == one.shape[1:] and change.same_values is None
    kl = F.kl_div(b["logits"].log_softmax(1), a["logits"].log_softmax(1), reduction="batchmean", log_target=True)
    assert logits.kl_nats == pytest.approx(kl.item(), rel=1e-4)
    same = (a["logits"].argmax(1) == b["logits"].argmax(1)).float().mean().item()
    assert logits.same_top1 == pytest.approx(same) == label.same_values and 0 < same < 1
    assert tokens.same_top1 is None and tokens.kl_nats is None and label.cosine is None


def batches(x: Tensor) -> Iterator[Tensor]:
    yield from x.split(4)


@pytest.mark.parametrize(
    "source",
    [
        list, batches, iter, lambda x: x.double(),
        lambda x: DataLoader(TensorDataset(x, torch.arange(len(x))), 2),
        lambda x: TensorDataset(x, torch.arange(len(x))),
        lambda x: [{"x": part, "labels": torch.arange(len(part))} for part in x.split(2)],
    ],
    ids=["singles", "generator", "stream", "double", "loader", "dataset", "keywords"],
)  # fmt: skip
def test_images_may_come_in_any_way(source):
    model, idle = pair()
    x = pictures()
    whole, found = quick(model, idle, x), quick(model, idle, source(x), batch_size=3)
    assert found.images == COUNT
    for name, change in whole.changes["idle"].items():
        other = found.changes["idle"][name]
        assert other.worst_image == change.worst_image
        assert other.worst == pytest.approx(change.worst, abs=1e-6)
    assert found.changes["idle"]["logits"].kl_nats == pytest.approx(whole.changes["idle"]["logits"].kl_nats, rel=1e-4)


@pytest.mark.parametrize("source", [lambda x: x, batches, list])
def test_limit_takes_the_first_ones(source):
    model, idle = pair()
    x = pictures()
    found, first = quick(model, idle, source(x), limit=5, batch_size=2), quick(model, idle, x[:5])
    assert found.images == 5
    assert found.changes["idle"]["maps.0"].cosine == pytest.approx(first.changes["idle"]["maps.0"].cosine, abs=1e-6)


def test_no_output_is_kept():
    model, idle = pair()
    alive: list[int] = []

    def stream() -> Iterator[Tensor]:
        for number in range(12):
            if number in (3, 11):
                gc.collect()
                alive.append(sum(type(each) is Tensor for each in gc.get_objects()))
            yield pictures(1)

    quick(model, idle, stream())
    assert alive[0] == alive[1]


def test_models_are_left_as_they_were_and_compared_in_eval_mode():
    model = build("vit", depth=2, **DROPOUTS)
    idle = convert(model, Case((1,), 0.5))
    calm = quick(model, idle, pictures())
    model.train()
    model.blocks[0].eval()
    idle.train()
    idle.blocks[1].eval()
    modes = [{name: part.training for name, part in each.named_modules()} for each in (model, idle)]
    graph, x = idle.graph, pictures()
    before = x.clone()
    assert quick(model, idle, x) == calm
    assert modes == [{name: part.training for name, part in each.named_modules()} for each in (model, idle)]
    assert idle.graph is graph is not deepcopy(idle).eval().graph and torch.is_grad_enabled()
    assert all(p.grad is None for p in [*model.parameters(), *idle.parameters()]) and torch.equal(x, before)


def test_models_are_left_as_they_were_by_an_error_too():
    model, idle = (deepcopy(each) for each in pair())
    with pytest.raises(idlefx.InputError):
        quick(model.train(), idle.train(), pictures()[..., :40])
    assert model.training and idle.training and torch.is_grad_enabled()


def test_several_are_compared_in_one_table():
    model, idle = pair()
    found = quick(model, {"dense": model, "rest": idle}, pictures())
    assert list(found.changes) == ["dense", "rest"]
    assert found.changes["rest"] == quick(model, idle, pictures()).changes["idle"]
    same = found.changes["dense"]["logits"]
    assert (same.cosine, same.relative_difference, same.same_top1, same.kl_nats, same.worst) == (1, 0, 1, 0, 1)
    shown = str(found)
    assert all(word in shown for word in ("dense", "rest", "maps.1.0", "same top-1", "KL", "left out", "maps.1.1"))
    assert f"{found.changes['rest']['logits'].cosine:.5f}" in shown and "7 images" in shown
    told = json.loads(json.dumps(found.to_dict()))
    assert told["models"]["rest"]["logits"]["kl_nats"] == found.changes["rest"]["logits"].kl_nats
    assert told["left_out"] == ["maps.1.1"]


def test_half_precision_is_compared_in_more():
    model, idle = (deepcopy(each).to(torch.bfloat16) for each in pair())
    x = pictures()
    change = quick(model, idle, x).changes["idle"]["maps.0"]
    with torch.no_grad():
        a, b = (each(x.bfloat16())["maps"][0].flatten(1).double() for each in (model, idle))
    assert change.cosine == pytest.approx(F.cosine_similarity(a, b).mean().item(), abs=1e-12)
    assert quick(model, pair()[1], x).changes["idle"]["maps.0"].cosine == pytest.approx(change.cosine, abs=0.02)


def is_classifier(model: nn.Module, **options: Any) -> bool:
    (change,) = quick(model, model, pictures(2), **options).changes["idle"].values()
    assert (change.same_top1 is None) == (change.kl_nats is None)
    return change.same_top1 is not None


def test_only_logits_are_taken_for_logits():
    vit = build("vit")
    assert is_classifier(vit) and is_classifier(nn.DataParallel(vit))
    assert not is_classifier(build("vit", num_classes=0)), "features of an encoder"
    alone = nn.Sequential(vit)
    assert not is_classifier(alone) and is_classifier(alone, logits=["output"])
    assert not is_classifier(vit, logits=[])


def test_output_of_hugging_face_is_named_and_known():
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 96}
    config = ViTConfig(**sizes, image_size=48, patch_size=8, num_labels=10, output_hidden_states=True)
    model = ViTForImageClassification(config).eval()
    loader = [{"pixel_values": pictures(2), "labels": torch.tensor([1, 2])}]
    (changes,) = quick(model, model, loader).changes.values()
    assert list(changes) == ["logits", "hidden_states.0", "hidden_states.1", "hidden_states.2"]
    assert changes["logits"].same_top1 == 1 and changes["hidden_states.1"].same_top1 is None


@pytest.mark.slow
def test_packaged_and_compiled_models_are_compared_too(tmp_path):
    model, idle = build("vit"), converted("vit", CASE)
    idlefx.package(idle, tmp_path / "vit.pt2", batch=(1, 8))
    half = idlefx.package(idle, tmp_path / "half.pt2", dtype=torch.bfloat16, batch=(1, 8))
    forms = {"compiled": idlefx.compile(idle), "file": idlefx.load(tmp_path / "vit.pt2"), "half": idlefx.load(half)}
    found = quick(torch.compile(model), forms | {"eager": idle}, pictures()).changes
    for name, most in (("compiled", 1e-5), ("file", 1e-5), ("half", 0.05)):
        assert found[name]["output"].cosine == pytest.approx(found["eager"]["output"].cosine, abs=most)
        assert found[name]["output"].same_top1 is not None
    assert forms["half"].dtype == torch.bfloat16 and forms["file"].facts.image_size == (3, SMALL["img_size"], 48)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_images_are_put_where_the_models_are():
    model, idle = pair()
    there = deepcopy(model).cuda(), deepcopy(idle).cuda()
    found, here = quick(*there, pictures()), quick(model, idle, pictures())
    assert found.changes["idle"]["maps.0"].cosine == pytest.approx(here.changes["idle"]["maps.0"].cosine, abs=1e-4)
    assert next(there[0].parameters()).is_cuda
    mixed = quick(model, there[1], pictures().cuda())
    assert mixed.changes["idle"]["maps.0"].cosine == pytest.approx(here.changes["idle"]["maps.0"].cosine, abs=1e-4)
