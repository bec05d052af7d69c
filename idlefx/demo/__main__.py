"""The shell of the demonstration: `python -m idlefx.demo`; `idlefx.cli.demo` says what its command does."""

import sys

from idlefx.cli.demo import main

if __name__ == "__main__":
    sys.exit(main())
