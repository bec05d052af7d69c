"""Peers and pictures of a bench: what is refused, and that a peer costs what idling costs."""

import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import idlefx
from idlefx import __main__ as shell
from idlefx.bench.baselines import make_baseline, open_baselines
from idlefx.bench.first_tokens import first_tokens
from idlefx.bench.plot import figure, plot, points
from idlefx.bench.results import Bench, Timing
from idlefx.bench.tables import summary
from idlefx.errors import InputError
from idlefx.reporting.cost_report import report
from idlefx.runtime import following
from tests.models.small import build, images
from tests.support.cases import Case, convert

PATCH = """
def apply_patch(model):
    class Shorter(type(model.blocks)):
        def forward(self, x):
            for block in self:
                x = block(x)[:, : max(1, x.shape[1] - model.r * {slope})] {change}
            return x
    model.blocks.__class__ = Shorter
"""
COMMAND = [
    "bench", "--model", f"{__name__}:named", "--example-shape", "2,3,48,48", "--layers", "1", "2", "--keep", "0.5",
    "--batch", "2", "--eager", "--seconds", "0",
]  # fmt: skip


def named() -> nn.Module:
    return build("vit")


@cache
def pair() -> tuple[nn.Module, Any, Tensor]:
    model = build("vit")
    return model, convert(model, Case((1, 2), 0.5)), images(model, 2)


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes a checkout that has the interface of the published code, and cuts tokens off instead of merging them."""

    def make(slope: int = 1, change: str = "", start: str = "") -> str:
        patch = tmp_path / "tome" / "patch"
        patch.mkdir(parents=True)
        (tmp_path / "tome" / "__init__.py").write_text(start)
        (patch / "__init__.py").write_text("from .timm import apply_patch as timm\n")
        (patch / "timm.py").write_text(PATCH.format(slope=slope, change=change))
        return f"tome={tmp_path}"

    for name in [name for name in sys.modules if name.partition(".")[0] == "tome"]:
        monkeypatch.delitem(sys.modules, name)
    yield make
    for name in [name for name in sys.modules if name.partition(".")[0] == "tome"]:
        sys.modules.pop(name)


def peer_of(given: str) -> Any:
    dense, idle, example = pair()
    return make_baseline("tome", open_baselines([given])["tome"], dense, example, idlefx.report(idle).idle_gmacs)


def test_peer_merges_until_it_costs_what_idling_costs(checkout):
    dense, idle, example = pair()
    peer, report = peer_of(checkout()), idlefx.report(idle)
    assert peer.gmacs == pytest.approx(report.idle_gmacs, rel=0.05)
    assert peer.model.r > 0 and not hasattr(dense, "r")
    with torch.inference_mode():
        assert peer.model(example).shape == dense(example).shape


def test_peer_is_timed_in_the_same_run(checkout, capsys):
    assert shell.main([*COMMAND, "--peer", checkout()]) == 0
    shown = capsys.readouterr().out
    assert "tome" in shown and "limit of tome" in shown


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"slope": 0}, "saves nothing"),
        ({"change": "* 2"}, "merging nothing it should compute what the model does"),
        ({"change": "[0]"}, "it fails on this model"),
    ],
)
def test_peer_that_does_not_know_the_model_is_named_and_the_rest_goes_on(options, words, checkout, capsys):
    assert shell.main([*COMMAND, "--peer", checkout(**options)]) == 0
    shown = capsys.readouterr().out
    assert "Skipped: peer tome" in shown and words in shown
    assert "idle" in shown and "limit of tome" not in shown


def test_checkout_that_cannot_be_used_is_refused(checkout, tmp_path, capsys):
    assert shell.main([*COMMAND, "--peer", f"tome={tmp_path}"]) == 2
    assert "has no tome/patch/timm.py" in capsys.readouterr().err
    with pytest.raises(InputError, match="cannot be imported, ModuleNotFoundError: No module named 'no_such_module'"):
        open_baselines([checkout(start="import no_such_module")])
    with pytest.raises(InputError, match="NAME=PATH; known are tome"):
        open_baselines(["evit=here"])


def test_other_code_of_that_name_is_not_taken_for_the_checkout(checkout, tmp_path):
    open_baselines([checkout()])
    other = tmp_path / "other" / "tome" / "patch"
    other.mkdir(parents=True)
    (other / "timm.py").touch()
    with pytest.raises(InputError, match="was imported instead of"):
        open_baselines([f"tome={tmp_path / 'other'}"])


def benches() -> list[Bench]:
    eager = Timing("eager", 1, {"dense": (2.0,) * 5, "idle": (2.5,) * 5})
    slow = Timing("default", 8, {"dense": (9.0,) * 5, "idle": (7.0,) * 5})
    fast = Timing("max-autotune", 8, {"dense": (8.0,) * 5, "idle": (8.0,) * 5, "tome": (4.0,) * 5})
    return [Bench("vit, keep 0.5", "a machine", {"dense": 4.0, "idle": 2.0, "tome": 1.6}, (eager, slow, fast))]


def test_points_are_best_against_best():
    assert points(benches()[0]) == [(1, "idle", 0.8), (8, "idle", pytest.approx(8 / 7)), (8, "tome", 2.0)]


def test_summary_has_a_line_each_of_best_against_best():
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in summary(benches()).splitlines()[4:]]
    assert lines == [
        ["vit, keep 0.5", "1", "idle", "4 → 2", "2.00", "2", "2.5", "0.80×", "40%", "slower"],
        ["vit, keep 0.5", "8", "idle", "4 → 2", "2.00", "8", "7", "1.14×", "57%", "faster"],
        ["vit, keep 0.5", "8", "tome", "4 → 1.6", "2.50", "8", "4", "2.00×", "80%", "faster"],
    ]
    assert summary([]) == ""


def test_plot_has_a_point_each_over_its_limit_and_is_a_file(tmp_path):
    drawn = [tuple(line.get_xydata()[0]) for line in figure(benches()).axes[0].lines if line.get_marker() == "o"]
    assert drawn == [(2.0, 0.8), (2.0, pytest.approx(8 / 7)), (2.5, 2.0)]
    target = plot(benches(), tmp_path / "speed.png")
    assert target.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(InputError, match="png"):
        plot(benches(), tmp_path / "speed.txt")
    assert not (tmp_path / "speed.txt").exists()


def test_shell_draws_the_plot(tmp_path, capsys):
    target = tmp_path / "speed.svg"
    assert shell.main([*COMMAND, "--plot", str(target)]) == 0
    assert "<svg" in target.read_text()
    assert shell.main([*COMMAND, "--plot", str(tmp_path / "speed.gif")]) == 2


@pytest.mark.parametrize("reselect", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["anew", "joined"])
def test_first_tokens_bound_what_following_costs(reselect, capsys):
    model, _, x = pair()
    idle = idlefx.convert(model, [1, 2], 0.5, idle="follow", reselect=reselect, example_inputs=x)
    first = first_tokens(idle)
    products = [torch.ops.aten.linear.default, torch.ops.aten.scaled_dot_product_attention.default]
    for target in products:
        shapes = [
            [node.meta["val"].shape[1:] for node in graph.find_nodes(op="call_function", target=target)][-4:]
            for graph in (idle.graph, first.model.graph)
        ]
        assert shapes[0] == shapes[1]
    assert report(idle).dense_gmacs > report(idle).idle_gmacs > first.gmacs
    made = {node.target for node in first.model.graph.nodes}
    assert made.isdisjoint({following.group_tokens, following.average_groups, following.restore_tokens})
    assert first.model(x).shape == idle(x).shape and not torch.equal(first.model(x), idle(x))
    assert shell.main([*COMMAND, "--idle", "follow", "rest", "--baseline", "first"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("of the speed of first, which chooses nothing") == 1
    assert "Skipped: baseline first: it bounds what following costs" in shown


def test_other_kind_of_idle_tokens_is_timed_in_the_same_table(capsys):
    assert shell.main([*COMMAND, "--idle", "follow", "--baseline", "follow", "rest", "first"]) == 0
    shown = capsys.readouterr().out
    rows = [line.split()[2] for line in shown.splitlines() if line.startswith("eager  ")]
    assert rows == ["dense", "idle", "rest", "first"]
    for name in ("idle", "rest"):
        assert f"eager, batch 2: {name} reaches" in shown


def test_other_kind_that_is_refused_is_named_and_the_rest_goes_on(capsys):
    assert shell.main([*COMMAND, "--selector", "mean", "--baseline", "follow"]) == 0
    shown = capsys.readouterr().out
    assert "Skipped: plan: " in shown and "limit of follow" not in shown
