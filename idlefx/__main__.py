"""The shell: `python -m idlefx`; `idlefx.cli.main` says what its commands do."""

import sys

from idlefx.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
