"""Multiply-adds: counted as one each, attention included, before and after."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import idlefx
from idlefx.analysis.macs import count_macs
from tests.models.small import DEPTH, build, image_tokens, images
from tests.support.cases import Case, convert, converted, deit_s

PLAIN = ("vit", "layer_scale", "registers", "clip", "average_pool", "gap", "hand_written", "collision")


def block_macs(tokens: int, width: int, hidden: int) -> int:
    projections = tokens * width * 3 * width + tokens * width * width
    attention = 2 * tokens * tokens * width
    return projections + attention + 2 * tokens * width * hidden


def other_macs(patches: int, patch: int, width: int, classes: int) -> int:
    return patches * 3 * patch * patch * width + width * classes


@pytest.mark.parametrize("family", PLAIN)
def test_dense_gmacs_are_those_of_the_closed_form(family):
    model = build(family)
    patches, width = image_tokens(model), model.embed_dim
    tokens, hidden = patches + model.num_prefix_tokens, 4 * width
    closed_form = DEPTH * block_macs(tokens, width, hidden) + other_macs(patches, 8, width, 10)
    report = idlefx.report(converted(family, Case((1, 3), 0.5)))
    assert report.dense_gmacs == pytest.approx(closed_form / 1e9, rel=1e-6)


@pytest.mark.parametrize("family", PLAIN)
def test_idle_gmacs_are_those_of_the_kept_tokens_and_little_more(family):
    model = build(family)
    patches, prefix, width = image_tokens(model), model.num_prefix_tokens, model.embed_dim
    tokens, hidden = patches + prefix, 4 * width
    working = [tokens, *(prefix + kept for kept in (patches // 2, patches // 2, patches // 4))]
    without_scores = sum(block_macs(n, width, hidden) for n in working) + other_macs(patches, 8, width, 10)
    scores = 3 * (2 * tokens * width + 2 * width * width)
    report = idlefx.report(converted(family, Case((1, 3), 0.5)))
    assert without_scores < report.idle_gmacs * 1e9 <= (without_scores + scores) * (1 + 1e-6)


def test_deit_s_costs_2_88_of_4_60_gmacs():
    report = idlefx.report(deit_s()[1])
    closed_form = (12 * block_macs(197, 384, 1536) + other_macs(196, 16, 384, 1000)) / 1e9
    assert report.dense_gmacs == pytest.approx(closed_form, rel=1e-6)
    assert report.dense_gmacs == pytest.approx(4.60, abs=0.005)
    assert report.idle_gmacs == pytest.approx(2.88, abs=0.005)
    text = str(report)
    for word in ("137", "96", "67", "4.60", "2.88"):
        assert word in text


@pytest.mark.slow
def test_where_the_score_is_not_affine_keys_are_projected_but_no_values():
    affine = idlefx.report(converted("vit", Case((1,), 0.5)))
    keys = idlefx.report(converted("qk_norm", Case((1,), 0.5)))
    tokens, width = 37, 48
    assert affine.dense_gmacs == pytest.approx(keys.dense_gmacs, rel=1e-6)
    more = (keys.idle_gmacs - affine.idle_gmacs) * 1e9 / 3
    assert 0.9 * (tokens - 3) * width * width < more < 1.1 * (tokens + 1) * width * width


def test_keeping_all_costs_what_the_dense_model_costs():
    report = idlefx.report(convert(build("vit"), Case((1,), 1.0)))
    assert report.idle_gmacs == report.dense_gmacs > 0


def test_batch_of_the_example_does_not_count():
    model, case = build("siglip"), Case((1, 3), 0.5)
    examples = [images(model, batch) for batch in (2, 5)]
    reports = [idlefx.report(convert(model, case, example_inputs=example)) for example in examples]
    assert reports[0].dense_gmacs == reports[1].dense_gmacs
    assert reports[0].idle_gmacs == reports[1].idle_gmacs


def test_reporting_does_not_change_the_model():
    idle = converted("vit", Case((1, 3), 0.5))
    code, keys = idle.code, list(idle.state_dict())
    idlefx.report(idle)
    assert idle.code == code and list(idle.state_dict()) == keys


def test_transposed_convolutions_are_counted():
    layers = [nn.ConvTranspose2d(6, 4, 4, stride=2, groups=2), nn.ConvTranspose1d(4, 2, 3), nn.ConvTranspose3d(2, 2, 2)]
    images = [torch.randn(1, 6, 5, 7), torch.randn(1, 4, 5), torch.randn(1, 2, 3, 3, 3)]
    for layer, image in zip(layers, images, strict=True):
        graph = torch.export.export(layer, (image,)).module().graph
        with FlopCounterMode(display=False) as counter:
            layer(image)
        assert count_macs(graph.nodes) == counter.get_total_flops() / 2 > 0
