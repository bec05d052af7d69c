"""What the shell understands: plans, lists, photographs anywhere, former names, help and usage."""

import json
from dataclasses import fields

import pytest
from PIL import Image
from safetensors import safe_open

from idlefx import PlanOptions
from idlefx.cli import finetune_options
from idlefx.cli import main as shell
from idlefx.cli.arguments import plan_options
from idlefx.cli.finetune import main as finetune
from idlefx.demo.model import glyph_vit
from idlefx.planning import selectors

MODEL = ["--model", "idlefx.models:glyph_vit"]
LEADING = {
    "convert": ["convert", *MODEL], "draw": ["draw", *MODEL, "--out", "tokens.png"], "bench": ["bench", *MODEL],
    "finetune": [],
}  # fmt: skip

# Every value off its default: an argument that a command forgets comes back as something else.
ODD = PlanOptions([1, 3], [0.5, 0.3], "blocks", "norm", False, 8, (0, 2), unit="tokens")
ODD_WORDS = [
    "--layers", "1", "3", "--keep", "0.5,0.3", "--schedule", "blocks", "--selector", "norm", "--no-reselect",
    "--multiple-of", "8", "--prefix", "0", "2", "--unit", "tokens",
]  # fmt: skip
FOLLOWING = PlanOptions([1, 3], [0.5, 0.3], idle="follow")
FOLLOWING_WORDS = ["--layers", "1", "3", "--keep", "0.5,0.3", "--idle", "follow"]


def parsed(command, *words):
    parse = finetune_options.parse if command == "finetune" else shell._parser().parse_args
    return parse([*LEADING[command], *words])


def planned(command, *words):
    options = parsed(command, *words)
    several = {"keep": options.keep[0], "idle": options.idle[0]} if command == "bench" else {}
    return plan_options(options, **several)


def plan_of(*words):
    return planned("convert", "--layers", "3", "6", "9", *words)


def shown_by(run, *words, capsys):
    """What a command shows before it ends with help, version or an error, in one line, and its exit code."""
    with pytest.raises(SystemExit) as end:
        run(list(words))
    printed = capsys.readouterr()
    return " ".join((printed.out + printed.err).split()), end.value.code


# The plan


@pytest.mark.parametrize("command", LEADING)
def test_every_option_of_a_plan_can_be_told(command):
    assert planned(command, *ODD_WORDS) == ODD
    assert planned(command, *FOLLOWING_WORDS) == FOLLOWING
    for each in fields(PlanOptions):
        told = FOLLOWING if each.name == "idle" else ODD
        assert getattr(told, each.name) != each.default, "some value is its default"


@pytest.mark.parametrize("command", ["convert", "draw", "finetune", "bench"])
def test_defaults_are_those_of_python(command):
    keep = 0.5 if command == "finetune" else 0.7  # that of the embedded example
    assert planned(command, "--layers", "3") == PlanOptions([3], keep)


@pytest.mark.parametrize("command", LEADING)
def test_help_names_every_option_of_a_plan_and_what_it_is_by_default(command, capsys):
    run, words = (finetune, []) if command == "finetune" else (shell.main, [command])
    told, code = shown_by(run, *words, "--help", capsys=capsys)
    assert code == 0
    for each in fields(PlanOptions):
        assert f"--{each.name.replace('_', '-')} " in told
    assert "{rest,follow}" in told and "(default: rest)" in told
    assert "{stages,blocks}" in told and "(default: stages)" in told
    assert "(default: 0.7)" in told and "(default: auto)" in told and "(default: True)" in told
    assert "None" not in told and "[]" not in told


def test_a_resumed_run_has_the_plan_it_began_with(tmp_path):
    begun = parsed("finetune", *ODD_WORDS)
    (tmp_path / "plan.json").write_text(json.dumps({"options": finetune_options.stored(begun)}))
    assert planned("finetune", "--resume", str(tmp_path)) == ODD
    assert planned("finetune", "--resume", str(tmp_path), "--prefix", "1").prefix == 1


def test_help_names_the_selectors_that_are_built_in(capsys):
    told, _ = shown_by(shell.main, "convert", "--help", capsys=capsys)
    assert f"the token score: {', '.join([selectors.AUTO, *selectors._BUILT_IN])}, or" in told


def test_a_selector_that_the_module_of_the_model_registers_is_taken(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(selectors, "_REGISTRY", dict(selectors._REGISTRY))
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "house_of_vits.py").write_text(
        "import idlefx\nfrom idlefx.models import glyph_vit\n\n\n"
        "@idlefx.selector\ndef brightest(x):\n    return x.mean(dim=-1)\n"
    )
    command = ["convert", "--model", "house_of_vits:glyph_vit", "--layers", "9", "--selector"]
    assert shell.main([*command, "brightest"]) == 0
    assert "brightest" in capsys.readouterr().out
    assert shell.main([*command, "darkest"]) == 2
    assert "unknown selector 'darkest'" in capsys.readouterr().err


# Lists


@pytest.mark.parametrize("layers", [["3", "6", "9"], ["3,6,9"], ["3,", "6,", "9"], ["3,6", "9"]])
@pytest.mark.parametrize("keep", [["0.7", "0.5", "0.3"], ["0.7,0.5,0.3"]])
def test_lists_take_spaces_and_commas(layers, keep):
    expected = PlanOptions([3, 6, 9], [0.7, 0.5, 0.3])
    for command in ("convert", "draw", "finetune"):
        assert planned(command, "--layers", *layers, "--keep", *keep) == expected


@pytest.mark.parametrize("command", LEADING)
@pytest.mark.parametrize("shape", [["2,3,224,224"], ["2", "3", "224", "224"]])
def test_shapes_take_spaces_and_commas(command, shape):
    assert parsed(command, "--layers", "3", "--example-shape", *shape).example_shape == [2, 3, 224, 224]


def test_spaces_part_runs_of_bench_and_commas_join_ratios_of_one():
    assert parsed("bench", "--keep", "0.9", "0.7,0.5,0.3").keep == [[0.9], [0.7, 0.5, 0.3]]
    assert parsed("bench", "--batch-size", "1,8", "16").batch_size == [1, 8, 16]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], None), (["--prefix"], 0), (["--prefix", "2"], 2), (["--prefix", "0"], 0), (["--prefix=2"], 2),
        (["--prefix", "0", "2"], (0, 2)), (["--prefix", "0,2"], (0, 2)), (["--prefix", "2,"], (2,)),
    ],
)  # fmt: skip
def test_a_lone_prefix_is_a_count_as_in_python_and_a_list_holds_positions(words, expected):
    assert plan_of(*words) == PlanOptions([3, 6, 9], 0.7, prefix=expected)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--layers", "3", "six"], "argument --layers: 'six' is no whole number; a list is written 3 6 9 or 3,6,9"),
        (["--layers", "3.5"], "argument --layers: '3.5' is no whole number"),
        (["--layers", "3", "--keep", "half"], "argument --keep: 'half' is no number; a list is written 0.7 0.5"),
        (["--layers", "3", "--keep", "0.7;0.5"], "argument --keep: '0.7;0.5' is no number"),
        (["--layers", "3", "--prefix", "cls"], "argument --prefix: 'cls' is no whole number"),
        (["--layers", "3", "--example-shape", "2x3"], "argument --example-shape: '2x3' is no whole number"),
        (["--layers", ","], "argument --layers: ',' is no whole number"),
        (["--layers"], "argument --layers: expected at least one argument"),
    ],
)
def test_what_is_no_number_is_refused_in_words(words, complaint, capsys):
    told, code = shown_by(shell.main, *LEADING["convert"], *words, capsys=capsys)
    assert code == 2 and complaint in told


def test_ratios_of_bench_are_refused_in_words(capsys):
    told, code = shown_by(shell.main, *LEADING["bench"], "--keep", "0.7", "0.5,most", capsys=capsys)
    assert code == 2 and "argument --keep: '0.5,most' is no number" in told


# Photographs of `draw`

OUT = ["--out", "t.png"]


@pytest.mark.parametrize(
    "words",
    [
        ["a.jpg", "b.jpg", *MODEL, "--layers", "3", "6", "--keep", "0.7", *OUT],
        [*MODEL, "--layers", "3", "6", "--keep", "0.7", *OUT, "a.jpg", "b.jpg"],
        [*MODEL, *OUT, "--layers", "3", "6", "--keep", "0.7", "a.jpg", "b.jpg"],
        [*MODEL, *OUT, "--keep", "0.7", "--layers", "3", "6", "a.jpg", "b.jpg"],
        [*MODEL, *OUT, "--keep", "0.7", "--layers", "3,6", "a.jpg", "b.jpg"],
        [*MODEL, "--layers", "3", "6", "a.jpg", "b.jpg", "--keep", "0.7", *OUT],
        [*MODEL, "--layers", "3", "6", "a.jpg", "--keep", "0.7", *OUT, "b.jpg"],
        ["a.jpg", *MODEL, "--keep", "0.7", *OUT, "--layers", "3", "6", "b.jpg"],
    ],
)
def test_photographs_may_stand_anywhere(words):
    options = shell._parser().parse_args(["draw", *words])
    assert options.images == ["a.jpg", "b.jpg"]
    assert plan_options(options) == PlanOptions([3, 6], 0.7)


def test_photographs_may_follow_a_prefix_that_is_empty():
    options = parsed("draw", "--layers", "3", "--prefix", "a.jpg")
    assert (options.images, options.prefix) == (["a.jpg"], 0)


def test_without_photographs_there_are_none_from_the_run_before():
    assert parsed("draw", "--layers", "3", "a.jpg").images == ["a.jpg"]
    assert parsed("draw", "--layers", "3").images == []


def test_layers_are_not_left_to_photographs(capsys):
    told, code = shown_by(shell.main, *LEADING["draw"], "--layers", "a.jpg", capsys=capsys)
    assert code == 2 and "argument --layers: 'a.jpg' is no whole number" in told


def test_draw_shows_the_photographs_behind_its_options(tmp_path, capsys):
    Image.new("RGB", (50, 40), "red").save(tmp_path / "photo.png")
    target = tmp_path / "tokens.png"
    assert shell.main(["draw", *MODEL, "--out", str(target), "--layers", "9", str(tmp_path / "photo.png")]) == 0
    assert str(target) in capsys.readouterr().out and target.exists()
    assert shell.main(["draw", *MODEL, "--out", str(target), "--layers", "9", "no/photo.png"]) == 2
    assert "no/photo.png" in capsys.readouterr().err


# Names


@pytest.mark.parametrize(
    ("command", "name", "former", "values"),
    [
        ("bench", "--batch-size", "--batch", ["1", "16"]),
        ("bench", "--baseline", "--peer", ["tome=../ToMe"]),
        ("convert", "--batch-size", "--batch", ["1", "64"]),
        ("convert", "--out", "--save", ["weights.safetensors"]),
    ],
)
def test_former_names_serve_and_are_not_shown(command, name, former, values, capsys):
    now = parsed(command, "--layers", "3", name, *values)
    assert parsed(command, "--layers", "3", former, *values) == now != parsed(command, "--layers", "3")
    told, _ = shown_by(shell.main, command, "--help", capsys=capsys)
    assert f"{name} " in told and f"{former} " not in told


def test_convert_writes_the_models_own_weights_with_the_plan_and_says_so(tmp_path, capsys):
    target = tmp_path / "weights.safetensors"
    assert shell.main(["convert", *MODEL, "--layers", "9", "--keep", "0.5", "--out", str(target)]) == 0
    assert f"{target}: the model's own weights, which a conversion does not change" in capsys.readouterr().out
    with safe_open(target, "pt") as file:
        options = PlanOptions.from_dict(json.loads(file.metadata()["plan"]))
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert options == PlanOptions([9], 0.5)
    dense = glyph_vit().state_dict()
    assert weights.keys() == dense.keys() and all(weights[name].equal(dense[name]) for name in dense)
