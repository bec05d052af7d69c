"""How the shell answers: help, version, usage where something is wrong, and exit codes."""

import subprocess
import sys

import pytest

import idlefx
from idlefx.cli import main as shell
from idlefx.cli.commands import COMMANDS
from idlefx.cli.exit_codes import exit_code_of

MODEL = ["--model", "idlefx.models:glyph_vit"]


def shown_by(run, *words, capsys):
    """What a command shows before it ends with help, version or an error, in one line, and its exit code."""
    with pytest.raises(SystemExit) as end:
        run(list(words))
    printed = capsys.readouterr()
    return " ".join((printed.out + printed.err).split()), end.value.code


def test_help_names_every_command_and_the_door_of_fine_tuning(capsys):
    told, code = shown_by(shell.main, "--help", capsys=capsys)
    assert code == 0 and "`python -m idlefx.finetune`" in told
    for command in [*COMMANDS, "finetune"]:
        assert f" {command} " in told
    (choices,) = (action.choices for action in shell._parser()._actions if action.dest == "command")
    assert list(choices) == [*COMMANDS, "finetune"]


def test_fine_tuning_is_a_command_too(tmp_path, capsys):
    told, code = shown_by(shell.main, "finetune", "--layers", "x", capsys=capsys)
    assert code == 2 and told.startswith("usage: python -m idlefx.finetune ")
    assert shell.main(["finetune", "--resume", str(tmp_path)]) == 2
    assert "there is no run in" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--version"], ["finetune", "--version"]])
def test_version(words, capsys):
    assert shown_by(shell.main, *words, capsys=capsys) == (f"idlefx {idlefx.__version__}", 0)


@pytest.mark.parametrize(
    ("words", "command", "message"),
    [
        (["draw", "--model", "x"], "draw", "the following arguments are required: --out"),
        (["zoo", "--fast"], "zoo", "unrecognized arguments: --fast"),
        (["inspect", *MODEL, "photo.jpg"], "inspect", "unrecognized arguments: photo.jpg"),
        (["convert", *MODEL, "--schedule", "odd"], "convert", "argument --schedule: invalid choice: 'odd'"),
    ],
)
def test_an_error_shows_the_usage_of_its_command(words, command, message, capsys):
    told, code = shown_by(shell.main, *words, capsys=capsys)
    assert code == 2 and told.startswith(f"usage: python -m idlefx {command} ")
    assert message in told and told.endswith(f"`python -m idlefx {command} --help` explains all arguments")


def test_an_error_without_a_command_names_those_there_are(capsys):
    for words in ([], ["plant"]):
        told, code = shown_by(shell.main, *words, capsys=capsys)
        assert code == 2 and "COMMAND" in told and "`python -m idlefx --help`" in told
    assert "'inspect'" in told or "inspect, convert" in told


QUICK = """
import contextlib, sys
from idlefx.cli.finetune import main as finetune
from idlefx.cli.main import main
for run, words in [(main, ["--help"]), (main, ["--version"]), (main, ["convert", "--help"]), (main, ["draw"]),
                   (main, ["bench", "--keep", "x"]), (finetune, ["--help"]), (finetune, ["--layers", "x"])]:
    with contextlib.suppress(SystemExit):
        run(words)
print("imported:", *sorted({"torch", "timm", "matplotlib"} & sys.modules.keys()))
"""


def test_help_and_errors_of_arguments_do_without_torch():
    done = subprocess.run([sys.executable, "-c", QUICK], capture_output=True, text=True, check=True)
    assert (done.stdout.count("usage: "), done.stderr.count("usage: ")) == (3, 3)
    assert done.stdout.splitlines()[-1] == "imported:"


def test_exit_codes(capsys):
    def refused():
        raise idlefx.InputError("plan: no")

    def interrupted():
        raise KeyboardInterrupt

    assert [exit_code_of(command) for command in (lambda: 0, lambda: 1, refused, interrupted)] == [0, 1, 2, 130]
    assert capsys.readouterr().err == "error: plan: no\ninterrupted\n"


def test_a_plan_that_no_model_could_have_is_refused_before_the_model_is_made(capsys):
    for command in (["convert"], ["draw", "--out", "t.png"]):
        assert shell.main([*command, "--model", "no_such_vit", "--layers", "3", "--keep", "1.5"]) == 2
        assert "keep=1.5 is not in (0, 1]" in capsys.readouterr().err
