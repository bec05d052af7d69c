"""`python -m idlefx plan`, and the file that it writes, which other commands and `convert` take."""

import json
from functools import cache

import pytest

import idlefx
from idlefx import PlanOptions
from idlefx.cli import finetune_options
from idlefx.cli.arguments import plan_options
from idlefx.cli.main import _parser, main
from idlefx.demo.glyphs import Glyphs
from idlefx.errors import InputError, PlanError
from idlefx.planning.model_plan import for_model, sizes_of
from idlefx.search.journal import Journal
from tests.models.small import build

MODEL = ["--model", f"{__name__}:named"]
PLAN = PlanOptions([0, 1], [0.8, 0.5], idle="follow")


def named():
    return build("vit", depth=2)


def other():
    return build("registers", depth=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("scenes")
    for number in range(9):
        Glyphs("test", size=9).scene(number).image.save(place / f"{number}.png")
    return place


@cache
def sizes():
    return sizes_of(idlefx.inspect(named()))


@pytest.fixture
def plan_file(tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(for_model(PLAN, "vit", sizes()).to_json())
    return path


@pytest.mark.slow
def test_command_prints_draws_and_writes_a_plan_that_convert_takes(folder, tmp_path, capsys):
    out, plot = tmp_path / "plan.json", tmp_path / "plan.png"
    words = ["plan", *MODEL, "--data", str(folder), "--speedup", "1.2", "--by", "gmacs", "--trials", "1"]
    assert main([*words, "--out", str(out), "--plot", str(plot)]) == 0
    shown = capsys.readouterr()
    assert "chosen for a speed-up of 1.2 by multiply-adds" in shown.out and str(out) in shown.out and not shown.err
    assert plot.stat().st_size > 10_000
    findings = json.loads(out.read_text())["findings"]
    assert findings["pictures"] == [7, 7, 2] and findings["worst_image"][0] in ("3.png", "7.png")
    assert main(["convert", *MODEL, "--plan", str(out)]) == 0
    idle = idlefx.convert(named(), plan=idlefx.read_plan(out))
    assert str(idle.plan) in capsys.readouterr().out


def test_plan_of_a_file_is_that_of_every_command(plan_file):
    leading = (["convert", *MODEL], ["bench", *MODEL], ["draw", *MODEL, "--out", "a.png"], ["compare", *MODEL])
    for words in leading:
        data = ["--data", "."] if words[0] == "compare" else []
        options = _parser().parse_args([*words, *data, "--plan", str(plan_file)])
        assert plan_options(options).to_dict() == PLAN.to_dict()
    tuned = finetune_options.parse([*MODEL, "--data", "folder", "--plan", str(plan_file)])
    assert plan_options(tuned).to_dict() == PLAN.to_dict()
    stored = json.loads(json.dumps(finetune_options.stored(tuned)))
    assert all(stored[name] == value for name, value in PLAN.to_dict().items()) and "plan" not in stored


@pytest.mark.slow
def test_bench_times_the_plan_of_a_file(plan_file, capsys):
    words = ["bench", *MODEL, "--plan", str(plan_file), "--batch-size", "2", "--eager", "--seconds", "0"]
    assert main(words) == 0
    assert "layers 0 1, keep 0.8 0.5, follow" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--plan", "plan.json", "--keep", "0.5"], "error: plan file: plan.json holds all options; leave --keep out"),
        (["--plan", "nowhere.json"], "error: plan file: cannot read nowhere.json"),
        (["--plan", "other.json"], "error: plan file: other.json is no plan that"),
        (["--plan", "wrong.json"], "error: plan: keep=7"),
    ],
)
def test_file_that_is_no_plan_is_refused(words, message, plan_file, monkeypatch, capsys):
    monkeypatch.chdir(plan_file.parent)
    plan_file.with_name("other.json").write_text('{"layers": [1]}')
    wrong = json.loads(plan_file.read_text()) | {"plan": {"layers": [1], "keep": 7}}
    plan_file.with_name("wrong.json").write_text(json.dumps(wrong))
    assert main(["convert", *MODEL, *words]) == 2
    assert message in capsys.readouterr().err


def test_plan_of_another_model_is_refused(plan_file, capsys):
    words = ["--model", f"{__name__}:other", "--plan", str(plan_file)]
    assert main(["convert", *words]) == 2
    error = capsys.readouterr().err
    assert "plan: it was made for vit, which has 2 blocks of 37 tokens (1 prefix) and width 48, but this" in error
    assert "make a plan for this one" in error


def test_plan_and_options_are_not_told_together():
    with pytest.raises(PlanError, match="plan= holds all options, so keep and idle cannot be told beside it"):
        idlefx.convert(named(), keep=0.5, idle="follow", plan=PLAN)
    with pytest.raises(PlanError, match=r"plan='plan\.json' is no plan"):
        idlefx.convert(named(), plan="plan.json")
    with pytest.raises(PlanError, match="options lack layers and keep"):
        idlefx.convert(named())


@pytest.mark.parametrize("budget", [[], ["--speedup", "1.5", "--gmacs", "1"]])
def test_one_budget_is_wanted(budget, capsys):
    with pytest.raises(SystemExit) as end:
        main(["plan", *MODEL, "--data", ".", *budget])
    assert end.value.code == 2 and "--speedup" in capsys.readouterr().err


def test_folder_is_looked_at_before_the_model_is_made(tmp_path, capsys):
    assert main(["plan", "--model", "no.such:model", "--data", str(tmp_path), "--speedup", "1.5"]) == 2
    assert "there is no image in" in capsys.readouterr().err


def test_journal_of_another_search_is_not_gone_on_with(folder, tmp_path):
    out = tmp_path / "plan.json"
    journal = tmp_path / "plan.json.search"
    journal.write_text(json.dumps({"search": {"budget": "another"}, "notes": {}, "changes": {}}))
    with pytest.raises(InputError, match="of another search, with another model and another options"):
        idlefx.plan(named(), folder, speedup=1.2, by="gmacs", out=out, resume=True, progress=False)
    journal.write_text("words")
    with pytest.raises(InputError, match="no journal of a search"):
        Journal(journal, {}, resume=True)
