"""Fine-tuning: what it trains, what it leaves alone, and its losses."""

import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

import idlefx
from idlefx.training.config import Settings
from idlefx.training.feature_taps import class_count, has_features, tap, token_parameters
from idlefx.training.labelled import LOSSES, evaluate
from idlefx.training.loader import ImageLoader
from idlefx.training.loop import finetune
from idlefx.training.metric_log import MetricLog
from tests.models.colours import CLASSES, PLAIN, SIDE, Colours, batches, models
from tests.models.small import build, fingerprint, images
from tests.support.messages import refusal, says

ALONE = Settings(epochs=5, lr=3e-3, mixup=0.0, cutmix=0.0, smoothing=0.0, w_cut=0.0, w_kd=0.0, w_feat=0.0)


def test_training_wins_accuracy_and_leaves_the_teacher_alone():
    dense, idle = models()
    before = fingerprint(dense)
    history = finetune(dense, idle, *batches(96), ALONE)
    assert history.dense < 50 < 90 < history.tuned <= history.best
    assert history.tuned == evaluate(tap(idle), ImageLoader(Colours(24, 0.0), 8))
    assert fingerprint(dense) == before
    assert len(history.rows) == 5 * 12 and history.finished
    assert not idle.training and all(parameter.requires_grad for parameter in idle.parameters())


@pytest.mark.parametrize("train_all", [False, True])
def test_tokens_and_positions_are_frozen_unless_asked_for(train_all):
    dense, idle = models()
    finetune(dense, idle, *batches(16), replace(ALONE, epochs=1, train_all=train_all))
    before = dense.state_dict()
    same = {name for name, value in idle.state_dict().items() if torch.equal(value, before[name])}
    assert same == (set() if train_all else {"cls_token", "pos_embed"})


@pytest.mark.parametrize("name", ["distilled", "registers_gap", "siglip"])
def test_tokens_and_positions_are_found_in_every_family(name):
    model = build(name)
    idle = idlefx.convert(model, layers=[1], keep=0.5)
    wanted = {n for n, _ in model.named_parameters() if n in ("cls_token", "dist_token", "reg_token", "pos_embed")}
    assert token_parameters(idle) == wanted and wanted
    tapped, x = tap(idle), images(model, 2)
    logits, features = tapped(x)
    assert torch.equal(logits, idle(x)) and class_count(tapped) == 10
    assert features.shape == (2, (2 if name == "distilled" else 1) * model.embed_dim)
    heads = [model.head, model.head_dist] if name == "distilled" else [model.head]
    votes = [head(part) for head, part in zip(heads, features.chunk(len(heads), dim=1), strict=True)]
    assert torch.allclose(sum(votes) / len(votes), logits, atol=1e-5)


class Unusual(nn.Module):
    """Names that say nothing, and a head that is not linear."""

    def __init__(self) -> None:
        super().__init__()
        vit = models()[0]
        self.alpha, self.beta = nn.Parameter(torch.randn(1, 24)), nn.Parameter(torch.randn(17, 24))
        self.gamma, self.delta, self.epsilon = vit.patch_embed, vit.blocks, nn.Parameter(torch.randn(24))
        self.zeta = nn.Parameter(torch.randn(CLASSES, 24))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.gamma(x) * self.epsilon
        x = torch.cat([self.alpha.expand(len(x), 1, -1), x], dim=1) + self.beta
        return -torch.cdist(self.delta(x)[:, 0], self.zeta)


def test_names_do_not_matter_and_without_a_linear_classifier_features_are_not_compared(capsys):
    dense = Unusual().eval()
    example = torch.randn(2, 3, SIDE, SIDE)
    idle = idlefx.convert(dense, layers=[1], keep=0.5, example_inputs=example)
    assert token_parameters(idle) == {"alpha", "beta"}
    assert not has_features(tap(idle))
    history = finetune(dense, idle, *batches(16), replace(PLAIN, epochs=1), example_inputs=example)
    assert says(capsys.readouterr().out, "no linear classifier was found, so w_feat is off")
    assert all(row["feat"] == 0 < row["cut"] for row in history.rows)


def test_averaged_weights_are_kept_and_the_last_ones_continue(tmp_path):
    _, idle = trained = models()
    finetune(*trained, *batches(16), replace(ALONE, epochs=2), directory=tmp_path)
    state = torch.load(tmp_path / "training.pt", weights_only=True)["training"]
    assert torch.equal(idle.head.weight, state["averaged"]["head.weight"])
    assert not torch.equal(idle.head.weight, state["model"]["head.weight"])


def test_loss_is_the_weighted_sum_of_its_parts():
    settings = Settings(steps=3, lr=1e-2, w_cut=3.0, w_kd=5.0, w_feat=7.0, cut_warmup=1.0)
    history = finetune(*models(), *batches(24), settings)
    for step, row in enumerate(history.rows, start=1):
        assert min(row[name] for name in LOSSES) > 0
        parts = row["task"] + 3 * step / 3 * row["cut"] + 5 * row["kd"] + 7 * row["feat"]
        assert row["loss"] == pytest.approx(parts, rel=1e-5)


def test_cut_weight_rises_over_its_share_of_the_run():
    weights = [Settings(w_cut=20.0, cut_warmup=0.5).cut_weight(step, 8) for step in range(8)]
    assert weights == [5, 10, 15, 20, 20, 20, 20, 20]
    assert Settings(w_cut=20.0).cut_weight(0, 8) == 20


def test_learning_rate_follows_the_size_of_a_step():
    assert Settings().rate(1024) == pytest.approx(2e-5)
    assert Settings(lr=1e-3).rate(1024) == 1e-3


def test_half_precision_is_used_where_it_is_asked_for():
    settings = Settings(steps=2, lr=1e-3)
    full, half = (finetune(*models(), *batches(16), replace(settings, amp=amp)) for amp in (False, True))
    assert full.rows[0]["loss"] != half.rows[0]["loss"] == pytest.approx(full.rows[0]["loss"], rel=0.02)


@pytest.mark.slow
def test_compiled_training_gives_the_same_losses():
    eager, compiled = (finetune(*models(), *batches(16), replace(PLAIN, epochs=1, compile=c)) for c in (False, True))
    for row, other in zip(eager.rows, compiled.rows, strict=True):
        assert [other[name] for name in LOSSES] == pytest.approx([row[name] for name in LOSSES], rel=1e-3)


class Broken(Colours):
    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        return image * torch.nan, label


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_last_checkpoint(tmp_path):
    stop = iter([False, True])
    finetune(*models(), *batches(16), replace(ALONE, epochs=3), directory=tmp_path, stop=lambda: next(stop))
    before = (tmp_path / "training.pt").read_bytes()
    _, idle = broken = models()
    train, val = ImageLoader(Broken(16), 8, training=True), ImageLoader(Colours(8), 8)
    message = refusal(finetune, *broken, train, val, replace(ALONE, epochs=3), directory=tmp_path, resume=True)
    assert says(message, r"step 3 gave loss nan, task nan, grad_norm nan", "last checkpoint"), message
    assert (tmp_path / "training.pt").read_bytes() == before
    assert all(torch.isfinite(parameter).all() and parameter.requires_grad for parameter in idle.parameters())


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"accumulate": 3}, ["accumulate is 3", "2 batches"]),
        ({"mixup": 0.5}, ["mixup", "batch has 5", "even"]),
    ],
    ids=["accumulate", "odd batch"],
)
def test_settings_that_do_not_fit_the_data_are_refused(settings, words):
    message = refusal(finetune, *models(), *batches(10, 5), replace(ALONE, **settings))
    assert says(message, *words), message


@pytest.mark.parametrize("setting", [{"epochs": 0}, {"ema": 1.5}, {"lr": -1.0}, {"w_cut": float("nan")}], ids=str)
def test_settings_out_of_range_are_refused(setting):
    assert says(refusal(Settings, **setting), f"settings: {next(iter(setting))} is", "expected")


def test_tensorboard_is_asked_for_where_it_is_not_installed(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    message = refusal(MetricLog, tmp_path, done=0, steps=1, images=1, show=False, tensorboard=True)
    assert says(message, "pip install tensorboard")


def test_tensorboard_is_told_every_loss(tmp_path):
    pytest.importorskip("tensorboard")
    finetune(*models(), *batches(16), replace(ALONE, epochs=1), directory=tmp_path, tensorboard=True)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert {*LOSSES, "lr", "top1"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("loss")] == [1, 2]
