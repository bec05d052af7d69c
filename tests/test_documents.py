"""Numbers in README.md and docs/ against what the commands compute, and against the results that are shipped."""

import json
import re
from typing import Any

import pytest

import idlefx
from examples import int8, real_study_shown, study, tuned_study
from idlefx.bench.results import Bench, Timing
from idlefx.bench.tables import summary
from idlefx.demo.model import glyph_vit
from tests.support import documents
from tests.support.cases import deit_s

RESULTS = documents.ROOT / "examples" / "results"


def test_deit_s_keeps_and_costs_what_is_written():
    _, converted = deit_s()
    report, kept = idlefx.report(converted), list(dict.fromkeys(step.kept for step in converted.plan))
    assert re.search(r"\D{1,9}".join(map(str, kept)), documents.text()), kept
    dense, idle = (f"{gmacs:.2f}".rstrip("0") for gmacs in (report.dense_gmacs, report.idle_gmacs))
    assert re.search(rf"\b{dense}0?\D{{1,20}}{idle}\b", documents.text()), (dense, idle)


def benches(name: str) -> list[Bench]:
    """The benches of a file of results, as `bench` had them."""
    found = []
    for entry in json.loads((RESULTS / name).read_text())["benches"]:
        timings = tuple(
            Timing(t["mode"], t["batch"], {m: tuple(ms) for m, ms in t["ms"].items()}) for t in entry["timings"]
        )
        found.append(Bench(entry["title"], entry["machine"], entry["gmacs"], timings))
    return found


def test_table_of_times_is_that_of_the_shipped_results():
    measured = [
        documents.cells(line)
        for name in ("deit", "large", "follow", "518", "batch_one", "windows")
        for line in summary(benches(f"bench_{name}.json")).splitlines()
    ]
    written = [row for row in documents.rows() if len(row) == 10 and row[-1] in ("faster", "slower", "not told apart")]
    assert len(written) >= 24
    assert [row for row in written if row not in measured] == []


def test_costs_of_windows_are_those_of_the_shipped_results():
    shipped = json.loads((RESULTS / "bench_windows.json").read_text())
    wanted = {
        line for line in summary(benches("bench_windows.json")).splitlines() if line.startswith(("| s", "| hiera"))
    }
    assert len(wanted) >= 1 and {documents.cells(line) for line in wanted} <= set(documents.rows())
    for told in shipped["reports"]:
        layers, (dense, idle) = " ".join(map(str, told["plan"]["layers"])), told["gmacs"]
        row = (told["model"], str(told["pixels"]), layers, " and ".join(told["units"]), f"{dense:.3g} → {idle:.3g}")
        assert (*row, f"{dense / idle:.2f}") in documents.rows(), row


@pytest.mark.parametrize(
    "columns", [("gmacs", "cosine", "iou"), ("gmacs", "photographs' cosine", "photographs' difference")]
)
def test_tables_of_the_real_model_are_those_of_the_shipped_results(columns):
    results = json.loads((RESULTS / "real_study.json").read_text())
    measured = {(result["method"], result["level"]): result for result in results if result["size"] == 224}
    for method in ("rest", "pruned", "ToMe", "follow, 3 stages", "follow, 6 stages", "follow, 6 stages, joined"):
        wanted = [measured[method, level][column] for level in (1, 2, 3) for column in columns]
        label = method if method == "ToMe" or "stages" in method else f"{method}, 3 stages"
        rows = [[cell.strip("*") for cell in row[1:]] for row in documents.rows() if row[0] == label and len(row) == 10]
        assert any(
            all(abs(float(cell) - value) <= 0.51 * 10 ** -len(cell.partition(".")[2]) for cell, value in pairs)
            for pairs in (list(zip(row, wanted, strict=True)) for row in rows)
        ), (label, wanted)


def test_tables_at_518_pixels_are_those_of_the_shipped_results():
    results = json.loads((RESULTS / "real_study.json").read_text())
    lines = real_study_shown.tables([result for result in results if result["size"] == 518]).splitlines()
    rows = [documents.cells(line) for line in lines if line.startswith("| ")]
    assert len(rows) >= 50 and [row for row in rows if row not in documents.rows()] == []


def test_times_of_the_real_model_are_those_of_the_shipped_results():
    results = json.loads((RESULTS / "real_study.json").read_text())
    lines = real_study_shown.tables([r for r in results if any(key.startswith("ms") for key in r) or not r["saving"]])
    rows = [documents.cells(line) for line in lines.splitlines() if line.count("|") == 7 and "×" in line]
    assert len(rows) == 12 and [row for row in rows if row not in documents.rows()] == []


def test_tables_of_int8_are_those_of_the_shipped_results():
    files = [json.loads((RESULTS / name).read_text()) for name in ("int8.json", "int8_torchao.json")]
    lines = [line for file in files for line in int8.tables(file["results"]).splitlines()]
    rows = [documents.cells(line) for line in lines if line.startswith("| ")]
    assert len(rows) == 23 and [row for row in rows if row not in documents.rows()] == []


def test_table_of_tuned_models_is_that_of_the_shipped_results():
    lines = tuned_study.table(json.loads((RESULTS / "tuned_study.json").read_text())).splitlines()
    assert len(lines) > 4
    assert [line for line in lines[2:] if documents.cells(line) not in documents.rows()] == []


@pytest.fixture(scope="module")
def results() -> list[dict[str, Any]]:
    return json.loads((RESULTS / "study.json").read_text())


def test_tables_of_the_study_are_those_of_the_shipped_results(results):
    lines = [line for line in study.tables(results).splitlines() if line and not line.startswith("|-")]
    assert len(lines) > 20
    written = set(documents.rows())
    missing = [line for line in lines if documents.cells(line) not in written and line not in documents.text()]
    assert missing == []


@pytest.mark.parametrize(("layers", "keep"), [(study.PUBLISHED, 0.7), (study.EARLY, 0.5)])
def test_study_counted_what_a_conversion_costs_now(results, layers, keep):
    report = idlefx.report(idlefx.convert(glyph_vit(), list(layers), keep))
    (run, *_) = study.find(results, layers, keep, "idle")
    assert report.dense_gmacs == pytest.approx(run["dense_gmacs"])
    assert report.idle_gmacs == pytest.approx(run["idle_gmacs"])
