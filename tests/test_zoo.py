"""The compatibility table: its shrunk form holds, and each of its checks can fail."""

import math
import re
from functools import partial

import pytest
import torch

from idlefx.cli.main import main
from idlefx.pipeline import convert, inspect
from idlefx.zoo import comparisons, survey, table
from idlefx.zoo.entry import DEPTH, Entry
from idlefx.zoo.models import QUICK, entries
from tests.models import small
from tests.models.small import MODELS
from tests.oracles import reference, zoo
from tests.support import documents

PLAIN = partial(small.build, "vit")
# One of each library, and one of each kind of refusal; the others are slow tests.
FIRST = (
    "vit_tiny_patch16_224", "torchvision ViT", "DINOv2 with registers, eager", "convit_tiny", "resnet10t",
)  # fmt: skip
ROWS = [
    pytest.param(entry, id=entry.label, marks=() if entry.label in FIRST else pytest.mark.slow)
    for entry in entries(quick=True)
]


@pytest.mark.parametrize("entry", ROWS)
def test_row_of_the_shrunk_table(entry):
    row = survey.check(entry)
    if row.missing:
        pytest.skip(row.note)
    assert not row.failure
    (written,) = (cells for cells in documented() if cells[0] == entry.label)
    assert written[2:4] == (str(row.found or "-"), str(row.can_idle) if row.found else "-")
    if not entry.refused:
        assert (row.found, row.can_idle) == (entry.blocks, entry.blocks)
        assert row.note == ""
        assert (row.keep_all, row.batch) == (0.0, "free")
        assert max(row.resting, row.following or 0.0) <= survey.TOLERANCE
    else:
        assert "refused: " in row.note
        assert row.can_idle < max(row.found, 1)


def test_table_names_every_model_once():
    labels = [entry.label for entry in entries()]
    assert len(labels) == len(set(labels)) > 150
    assert set(QUICK) <= set(labels)
    assert {entry.blocks for entry in entries(quick=True) if not entry.refused} == {DEPTH, 4}


def failure(build=PLAIN, **options):
    return survey.check(Entry("some", "test", build, **{"blocks": 4, **options})).failure


def test_entry_that_holds():
    assert failure() == ""


def test_other_number_of_blocks_fails():
    assert "4 blocks found instead of 5" in failure(blocks=5)


def test_refusal_that_is_not_expected_fails():
    assert "conv1d" in failure(small.build_mixing)
    assert "conv1d" in failure(small.build_mixing, refused="windows")
    assert failure(small.build_mixing, refused="conv1d") == ""
    assert "no attention" in failure(partial(torch.nn.Conv2d, 3, 3, 3), inputs=lambda b: torch.randn(b, 3, 8, 8))


def test_refusal_that_does_not_come_fails():
    assert failure(refused="windows") == "no block is refused, though this was expected"


def test_model_that_breaks_fails():
    def broken():
        raise RuntimeError("out of paint")

    assert failure(broken) == "RuntimeError: out of paint"


def test_library_that_is_missing_is_said():
    def absent():
        raise ImportError("No module named 'transformers'", name="transformers")

    row = survey.check(Entry("some", "test", absent))
    assert (row.missing, row.failure) == (True, "")
    assert row.note == "not tried: No module named 'transformers'"
    assert "1 were not tried" in table.render([row])


@pytest.fixture
def case():
    """A model, its table, its conversion and a batch."""
    model = PLAIN()
    batch = small.images(model, 3)
    idle = convert(model, [1, 3], [0.5, 0.25], schedule="blocks", example_inputs=batch[:2])
    return model, inspect(model, batch), idle, batch


def verdict(model, blocks, idle, batch):
    return survey._value_failure(0.0, comparisons.compare(model, idle, blocks, batch))


def test_conversion_that_is_right_passes(case):
    assert verdict(*case) == ""


def test_other_weights_fail(case):
    model, blocks, idle, batch = case
    with torch.no_grad():
        idle.get_parameter("blocks.1.mlp.fc2.bias")[0] += 1e-2
    assert "differs from the reference" in verdict(model, blocks, idle, batch)


def test_other_plan_fails(case):
    model, blocks, idle, batch = case
    other = convert(model, [1, 3], [0.5, 0.3], schedule="blocks", example_inputs=batch[:2])
    idle.meta["idlefx"] = other.conversion
    with pytest.raises(ValueError, match="tokens work where 11 should"):
        verdict(model, blocks, idle, batch)


def test_other_choice_fails(case):
    model, blocks, _, batch = case
    idle = convert(model, [1, 3], [0.5, 0.25], schedule="blocks", selector="norm", example_inputs=batch[:2])
    found = comparisons.compare(model, idle, blocks, batch)
    assert found.error <= survey.TOLERANCE
    assert "chooses other tokens" in survey._value_failure(0.0, found)


def test_prefix_token_that_idles_fails(case):
    model, blocks, _, batch = case
    idle = convert(model, [1], [0.5], schedule="blocks", prefix=0, example_inputs=batch[:2])
    with pytest.raises(ValueError, match="a prefix token idles"):
        verdict(model, blocks, idle, batch)


@pytest.fixture
def following():
    """A model, its conversion with stages that follow, its table, and batches."""
    model = PLAIN()
    batches = [small.images(model, 3, seed=seed) for seed in range(3)]
    idle = convert(model, [1, 3], [0.5, 0.25], idle="follow", example_inputs=batches[0])
    return model, idle, inspect(model, batches[0]), batches


def followed(*case):
    return survey._following_failure(comparisons.compare_following(*case))


def test_following_that_is_right_passes_and_other_weights_fail(following):
    assert followed(*following) == ""
    with torch.no_grad():
        following[1].get_parameter("blocks.2.mlp.fc2.bias")[0] += 1e-2
    assert "following differs from its reference" in followed(*following)


def test_other_groups_fail(following):
    model, idle, blocks, batches = following
    other = convert(model, [1, 3], [0.6, 0.25], idle="follow", example_inputs=batches[0])
    idle.meta["idlefx"] = other.conversion
    assert followed(model, idle, blocks, batches) == "groups tokens in another way than the rule"


def test_near_ties_are_passed_over_and_counted(following, monkeypatch):
    monkeypatch.setattr(comparisons, "CLEAR", math.inf)
    passed = comparisons.compare_following(*following)
    assert (passed.error, passed.ties, survey._following_failure(passed)) == (None, 3, "")
    assert survey._following_note(passed) == "following not compared: near ties on all 3 batches"
    row = survey.Row("some", "test", 4, 4, 0.0, 1e-7, None, 3)
    assert "compared for 0 models; 3 batches were passed over for near ties" in table.render([row])


def test_what_the_reference_cannot_do_is_said(following, monkeypatch):
    def cannot(*_):
        raise ValueError("something writes the stream")

    monkeypatch.setattr(comparisons.following, "run", cannot)
    told = comparisons.compare_following(*following)
    assert survey._following_note(told) == "following not compared: something writes the stream"


def test_keeping_all_must_be_exact():
    assert "1e-09" in survey._value_failure(1e-9, comparisons.Comparison(0.0, 0.0))


def test_what_is_not_a_number_fails():
    nan = comparisons.largest_difference(torch.ones(2), torch.tensor([1.0, float("nan")]))
    assert "differs" in survey._value_failure(0.0, comparisons.Comparison(nan, 0.0))


@torch.no_grad()
@pytest.mark.parametrize("family", ["vit", "distilled", "qk_norm_gap", "hand_written", "parallel_things", "registers"])
def test_hiding_keys_is_gathering_tokens(family):
    model, spec = small.build(family), MODELS[family]
    x = small.images(model, 3)
    keeps = {"blocks.1": 0.4, "blocks.2": 0.7}
    count = small.image_tokens(model)
    plan = {int(path[-1]): zoo.kept_tokens(keep, count) for path, keep in keeps.items()}
    gathered = reference.run(model, plan, x, prefix=spec.prefix, class_position=spec.class_position)
    tokens = zoo.look(model, [f"blocks.{i}" for i in range(small.DEPTH)], lambda: model(x))
    assert set(tokens.values()) == {zoo.Tokens(tuple(range(spec.prefix)), spec.class_position)}
    chosen = {f"blocks.{block}": index for block, index in gathered.selected.items()}
    answer = zoo.idle(model, keeps, tokens, chosen, lambda: model(x))
    assert answer.excess == 0.0
    assert torch.allclose(answer.output, gathered.output, atol=1e-5)


def test_command_writes_the_table(tmp_path, capsys):
    target = tmp_path / "zoo.md"
    assert main(["zoo", "--quick", "--only", "^(vit_tiny_patch16_224|resnet10t)", "--markdown", str(target)]) == 0
    printed, written = capsys.readouterr().out, target.read_text()
    for text in (printed, written):
        assert "1 of 2 models convert, 1 are refused for the reason given." in text
        assert "vit_tiny_patch16_224" in text and "no attention" in text
    assert written.startswith("| model")


def test_command_fails_with_a_row(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(survey, "entries", lambda quick: [Entry("odd", "test", PLAIN, blocks=7)])
    assert main(["zoo", "--markdown", str(tmp_path / "zoo.md")]) == 1
    assert "1 FAIL" in capsys.readouterr().out
    assert "FAILS: 4 blocks found instead of 7" in (tmp_path / "zoo.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--only", "no such model"], "no model or family matches"),
        (["--only", "("], "not a regular expression"),
        (["--markdown", "/no/such/folder/zoo.md"], "cannot write"),
    ],
)
def test_command_refuses(arguments, words, capsys):
    assert main(["zoo", *arguments]) == 2
    assert words in capsys.readouterr().err


def documented():
    """The rows of the table in the documents."""
    return [row for row in documents.rows() if len(row) == 9 and re.match("timm|transformers|torchvision", row[1])]


def test_documents_hold_the_table():
    assert [row[:2] for row in documented()] == [(entry.label, entry.family) for entry in entries()]
