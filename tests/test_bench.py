"""Timing dense against idling: what is measured, what is said of it, and what is refused."""

import json
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from idlefx import __main__ as shell
from idlefx.bench import case, timer
from idlefx.bench.baselines import Baseline
from idlefx.bench.results import Timing, outcome
from idlefx.bench.runner import Bench, bench
from idlefx.bench.tables import render, to_json, verdict
from idlefx.errors import InputError
from tests.models.small import build, images
from tests.support.cases import Case, convert

CASE = Case((1, 2), 0.5)
CPU = torch.device("cpu")


@cache
def pair() -> tuple[nn.Module, Any, Tensor]:
    model = build("vit")
    return model, convert(model, CASE), images(model, 1)


def quick(**options: Any) -> Bench:
    dense, idle, example = pair()
    given = {"batches": [2], "modes": ["eager"], "rounds": 2, "progress": False}
    return bench(dense, idle, example, **given | options)


def named(name: str = "vit") -> nn.Module:
    return build(name)


COMMAND = [
    "bench", "--model", f"{__name__}:named", "--example-shape", "2,3,48,48", "--layers", "1", "2", "--keep", "0.5",
    "--batch", "2", "--eager", "--seconds", "0",
]  # fmt: skip


def test_models_take_turns_and_each_opens_a_round_now_and_then():
    order: list[str] = []
    samples: list[list[float]] = []
    timer.time_in_turn([lambda: order.append("a"), lambda: order.append("b")], CPU, samples, 0.0, rounds=4)
    assert order == ["a", "b", "b", "a"] * 2
    assert len(samples) == 4 and all(len(row) == 2 for row in samples)


def test_peak_memory_is_what_is_there_and_what_a_call_adds_at_most():
    there = torch.zeros(2**18)  # 1 MiB

    def run() -> None:
        for _ in range(3):
            first = torch.ones(2**18)
            second = first + there
            del first, second

    assert timer.peak_mib(run, CPU, [there, there[:5]]) == pytest.approx(3, abs=0.01)


def test_peak_memory_of_a_backward_pass_is_followed_into_its_thread():
    weight = torch.ones(2**18, requires_grad=True)

    def run() -> None:
        (weight.exp() * 2).exp().sum().backward()
        weight.grad = None

    assert 3 <= timer.peak_mib(run, CPU, [weight]) <= 6


def test_training_step_is_timed_with_its_memory_and_changes_nobody():
    dense, _, _ = pair()
    before = {name: value.clone() for name, value in dense.state_dict().items()}
    found = quick(training=True, batches=[2, 4])
    assert [t.batch for t in found.timings] == [2, 4] and found.training and not dense.training
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())
    assert all(p.grad is None for p in dense.parameters())
    own = sum(p.nbytes for p in dense.parameters()) / 2**20
    for timing in found.timings:
        assert set(timing.ms) == {"dense", "idle"} and all(len(ms) == 2 for ms in timing.ms.values())
        assert timing.peak_mib["dense"] > 4 * own, "weights, gradients and the two moments of AdamW"
    assert found.timings[1].peak_mib["dense"] > found.timings[0].peak_mib["dense"]
    assert "training step" in render(found)


def test_idling_student_needs_less_memory_to_train_than_the_dense_model():
    dense = build("vit", img_size=96)
    idle = convert(dense, CASE)
    found = bench(dense, idle, images(dense, 1), batches=[8], modes=["eager"], rounds=1, training=True, progress=False)
    assert found.timings[0].memory_ratio() < 1


def test_outcome_has_three_words_and_disturbed_rounds_do_not_decide():
    steady = [10.0] * 12
    assert outcome(steady, [8.0] * 12) == "faster"
    assert outcome(steady, [12.0] * 12) == "slower"
    assert outcome(steady, [8.0] * 6 + [12.0] * 6) == "not told apart"
    assert outcome(steady, [8.0] * 10 + [900.0] * 2) == "faster", "two disturbed rounds of twelve"
    assert outcome(steady[:3], [8.0] * 3) == "not told apart", "three rounds are too few"
    assert outcome(steady, steady) == "not told apart"


def made(**idle_ms: float) -> Bench:
    """A bench at batch 8 in which the dense model takes 10 ms, by mode."""
    timings = [
        Timing(mode.replace("_", "-"), 8, {"dense": (10.0,) * 9, "idle": (ms,) * 9}) for mode, ms in idle_ms.items()
    ]
    return Bench("vit", "a machine", {"dense": 4.0, "idle": 2.0}, tuple(timings))


def test_verdict_says_where_idling_does_not_pay():
    words = verdict(made(eager=12.5, default=8.0))
    assert "SLOWER" in words and "eager, batch 8 (0.80×)" in words
    assert "faster: default, batch 8 (1.25×)" in words
    assert "here it does not pay" in verdict(made(default=12.5))
    assert "does not pay" not in verdict(made(default=8.0))


def test_best_compiled_dense_stands_against_best_compiled_idle():
    timings = (
        Timing("eager", 8, {"dense": (1.0,) * 9, "idle": (1.0,) * 9}),
        Timing("default", 8, {"dense": (8.0,) * 9, "idle": (7.0,) * 9}),
        Timing("max-autotune", 8, {"dense": (9.0,) * 9, "idle": (6.4,) * 9}),
    )
    words = verdict(Bench("vit", "", {"dense": 4.0, "idle": 2.0}, timings))
    assert "1.25× as fast as dense (default against max-autotune), 62% of its limit" in words


def test_json_holds_every_sample_and_what_follows():
    found = quick()
    (entry,) = json.loads(to_json([found]))["benches"]
    (timing,) = entry["timings"]
    assert len(timing["ms"]["dense"]) == 2
    assert timing["derived"]["idle"]["speed_up"] == pytest.approx(found.timings[0].speed_up())


def test_batch_without_room_is_skipped_by_name_and_the_rest_goes_on():
    dense, idle, example = pair()

    class Greedy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = dense

        def forward(self, x: Tensor) -> Tensor:
            if len(x) == 3:
                torch.empty(2**62, dtype=torch.uint8)
            return self.inner(x)

    found = bench(Greedy(), idle, example, batches=[2, 3, 4], modes=["eager"], rounds=1, progress=False)
    assert [t.batch for t in found.timings] == [2, 4]
    assert found.skipped == ("eager, batch 3, dense: it does not fit in memory",)
    assert "Skipped: eager, batch 3" in render(found)


def test_batch_whose_inputs_alone_have_no_room_is_skipped_too():
    found = quick(batches=[2**45, 2])
    assert [t.batch for t in found.timings] == [2] and f"batch {2**45}: its inputs" in found.skipped[0]


def test_failure_of_an_eager_model_is_not_hidden():
    dense, idle, example = pair()
    with pytest.raises(RuntimeError, match="shape"):
        bench(nn.Sequential(dense, nn.Linear(3, 3)), idle, example, modes=["eager"], progress=False)


def test_interrupted_bench_keeps_finished_rounds(monkeypatch, tmp_path, capsys):
    calls = []

    def time_ms(run: Any, device: torch.device) -> float:
        calls.append(run)
        if len(calls) == 8:  # in the middle of the fourth round
            raise KeyboardInterrupt
        return 1.0

    monkeypatch.setattr(timer, "time_ms", time_ms)
    target = tmp_path / "bench.json"
    assert shell.main([*COMMAND, "--seconds", "60", "--json", str(target)]) == 130
    (entry,) = json.loads(target.read_text())["benches"]
    assert entry["interrupted"] and len(entry["timings"][0]["ms"]["idle"]) == 3
    assert "Interrupted" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--device", "cuda:7"], "cuda:7"),
        (["--device", "toaster"], "toaster"),
        (["--batch", "0"], "positive"),
        (["--model", "no_such_vit"], "no_such_vit"),
        (["--json", "/no/such/place/a.json"], "cannot write"),
    ],
)
def test_bad_input_is_refused_in_words(options, words, capsys):
    assert shell.main([*COMMAND, *options]) == 2
    assert words in capsys.readouterr().err


def test_number_type_that_the_device_lacks_is_refused(monkeypatch):
    def no_half(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("\"addmm\" not implemented for 'Half'")

    pair()  # converted before half precision is taken away
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", no_half)
    with pytest.raises(InputError, match=r"cpu cannot compute in float16.*take float32"):
        quick(dtype=torch.float16)


@pytest.mark.slow
def test_several_models_and_ratios_are_timed_and_a_refused_one_named(capsys, tmp_path):
    target = tmp_path / "bench.json"
    command = [*COMMAND, "--model", f"{__name__}:named", f"{__name__}:CASE", "--keep", "0.9", "0.9,0.5"]
    assert shell.main([*command, "--json", str(target)]) == 2
    shown = capsys.readouterr()
    assert "keep 0.9\n" in shown.out and "keep 0.9 0.5\n" in shown.out
    assert f"{__name__}:CASE" in shown.err
    summary = shown.out.partition("Best compiled against best compiled")[2]
    assert "keep 0.9 " in summary and "keep 0.9 0.5 " in summary
    written = json.loads(target.read_text())
    assert len(written["benches"]) == 2 and {"torch", "timm"} <= set(written["versions"]) and written["measured"]


def test_peer_that_does_not_compile_is_skipped_and_the_rest_goes_on(monkeypatch):
    dense, _, _ = pair()

    def compile(model: nn.Module, **_: Any) -> nn.Module:
        if isinstance(model, nn.Sequential):
            raise TypeError("cannot trace it")
        return model

    monkeypatch.setattr(case.torch, "compile", compile)
    found = quick(modes=["eager", "default"], peers=[Baseline("other", nn.Sequential(dense), 0.004)])
    assert {t.mode: set(t.ms) for t in found.timings} == {
        "eager": {"dense", "idle", "other"},
        "default": {"dense", "idle"},
    }
    assert "default, batch 2, other: it does not compile, TypeError: cannot trace it" in found.skipped
    assert "limit of other" in render(found)
