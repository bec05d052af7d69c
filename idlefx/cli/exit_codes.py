"""What a command tells the shell by its exit code."""

import sys
from collections.abc import Callable

from idlefx.errors import IdleFxError

FAILED, REFUSED = 1, 2
INTERRUPTED = 130  # what shells know an interrupted program by


def exit_code_of(command: Callable[[], int]) -> int:
    """Run a command; a refusal or an interrupt becomes a line on standard error.

    Returns:
        What the command returns, 2 if it was refused, 130 if it was interrupted.
    """
    try:
        return command()
    except IdleFxError as error:
        print(f"error: {error}", file=sys.stderr)
        return REFUSED
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
