"""A schedule that respects the clock: tokens rounded to tiles, and times predicted from a table that was measured."""

import json
from typing import Any

import pytest
import torch

import idlefx
from idlefx import __main__ as shell
from idlefx.bench.block_latency import measure_times, token_counts
from idlefx.errors import InputError, PlanError
from idlefx.reporting.latency import BlockTimes, read_times, size_of, times_to_json
from idlefx.runtime.selections import selections
from tests.models.small import build, images
from tests.support.cases import Case, convert, converted

CASE = Case((1, 3), 0.5)
OPTIONS = ["--example-shape", "2,3,48,48", "--layers", "1", "3", "--keep", "0.5"]


def named(**options: Any) -> torch.nn.Module:
    return build("vit", **options)


def wider() -> torch.nn.Module:
    return build("vit", embed_dim=96)


def table(**ms: float) -> BlockTimes:
    """For blocks of the small model."""
    return BlockTimes("a machine", "default", 16, 48, 3, 16, 192, {int(n[1:]): t for n, t in ms.items()})


@pytest.mark.parametrize(("name", "prefix", "multiple_of"), [("vit", 1, 8), ("registers", 5, 4), ("gap", 0, 16)])
def test_tokens_that_work_are_rounded_up_prefix_and_all(name, prefix, multiple_of):
    model = build(name)
    exact, rounded = converted(name, CASE), converted(name, CASE, multiple_of=multiple_of)
    for before, after in zip(exact.plan, rounded.plan, strict=True):
        assert before.kept <= after.kept < before.kept + multiple_of
        assert (after.kept + prefix) % multiple_of == 0
    chosen = selections(rounded, images(model, 2))
    assert {block: index.shape[1] for block, index in chosen.items()} == {
        s.block: s.kept + prefix for s in rounded.plan
    }
    assert f"multiple of {multiple_of}" in str(rounded.plan) and "multiple of" not in str(exact.plan)


def test_rounding_never_goes_beyond_all_tokens():
    idle = converted("vit", CASE, multiple_of=64)
    assert [step.kept for step in idle.plan] == [36, 36, 36] and not any(step.idles for step in idle.plan)


@pytest.mark.parametrize("wrong", [0, 2.5, True])
def test_what_is_no_multiple_is_refused(wrong):
    with pytest.raises(PlanError, match=r"multiple_of=.*whole number"):
        convert(build("vit"), CASE, multiple_of=wrong)


def test_time_is_read_off_a_straight_line_between_measured_counts():
    times = table(n10=2.0, n20=4.0, n40=5.0)
    assert [times.at(n) for n in (10, 15, 20, 30, 40)] == [2.0, 3.0, 4.0, 4.5, 5.0]
    for outside in (9, 41):
        with pytest.raises(InputError, match=f"not {outside}; measure anew"):
            times.at(outside)


def test_report_predicts_the_time_of_each_block_and_of_all():
    idle = converted("vit", CASE)
    found = idlefx.report(idle, [table(n1=1.0, n37=37.0)])
    assert [b.dense_ms for b in found.blocks] == pytest.approx([37.0] * 4)
    assert [b.idle_ms for b in found.blocks] == pytest.approx([37.0, 19.0, 19.0, 10.0])
    text = str(found)
    assert "148.000" in text and "85.000" in text and "a machine, default, batch 16" in text
    assert "ms" not in str(idlefx.report(idle)).replace("GMACs", "").replace("params", "")


def test_table_of_another_width_is_refused(tmp_path):
    path = tmp_path / "times.json"
    path.write_text(times_to_json([table(n1=1.0, n37=37.0)]))
    idle = convert(wider(), CASE)
    with pytest.raises(InputError, match=r"block 0 has width 96.*the table is for width 48"):
        idlefx.report(idle, path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"tables": [{"width": 3}]}', '{"tables": [{"ms": 3}]}'])
def test_file_that_is_no_table_is_refused(text, tmp_path):
    path = tmp_path / "times.json"
    path.write_text(text)
    with pytest.raises(InputError, match="no table that `bench --table` wrote"):
        read_times(path)
    with pytest.raises(InputError, match="cannot read"):
        read_times(tmp_path / "missing.json")


def test_counts_are_those_of_the_plan_and_of_whole_tiles():
    counts = token_counts([converted("vit", CASE).plan])
    assert {37, 19, 24, 10, 16} <= set(counts) and counts[0] == 1 and counts[-1] == 37


def test_measured_block_has_the_multiply_adds_of_the_models_own():
    block = idlefx.inspect(build("vit"), images(build("vit"), 2))[0]
    assert size_of(block) == (48, 3, 16, 192)
    found = measure_times(block, [1, 37], 2, torch.zeros(1), "eager", 0.0)
    assert set(found.ms) == {1, 37} and all(ms > 0 for ms in found.ms.values())


@pytest.mark.slow
def test_table_goes_from_bench_to_convert_in_the_shell(tmp_path, capsys):
    path = tmp_path / "times.json"
    timing = [
        "bench",
        "--model",
        f"{__name__}:named",
        "--batch",
        "2",
        "--eager",
        "--seconds",
        "0",
        "--table",
        str(path),
    ]
    assert shell.main([*timing, *OPTIONS, "--multiple-of", "8"]) == 0
    assert json.loads(path.read_text())["tables"][0]["batch"] == 2
    assert shell.main(["convert", "--model", f"{__name__}:named", *OPTIONS, "--times", str(path)]) == 0
    assert "predicted" in capsys.readouterr().out
    assert shell.main(["convert", "--model", f"{__name__}:wider", *OPTIONS, "--times", str(path)]) == 2
    assert "width 96" in capsys.readouterr().err
