"""`python -m idlefx.finetune`: parse the arguments, then run; help and errors of the arguments are there at once."""

from collections.abc import Sequence

from idlefx.cli.exit_codes import exit_code_of
from idlefx.cli.finetune_options import parse


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        0 if it succeeded, 2 if it was refused, 130 if it was interrupted.

    Raises:
        SystemExit: Help or version were asked for, with 0; or the arguments are wrong, with 2.
    """
    return exit_code_of(lambda: _run(arguments))


def _run(arguments: Sequence[str] | None) -> int:
    options = parse(arguments)
    from idlefx.cli.finetune_run import run

    return run(options)
