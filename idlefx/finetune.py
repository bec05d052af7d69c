"""Fine-tune a model for idling: `python -m idlefx.finetune`, or `torchrun --nproc-per-node 8 -m idlefx.finetune`.

Without arguments it shows on an embedded data set what idling costs, and what a short training wins back. Emitted
scripts import from here what they need.
"""

import sys

if __name__ == "__main__":  # before the imports for scripts, which the help of the command can do without
    from idlefx.cli.finetune import main

    sys.exit(main())

from idlefx.capture.models import load_model
from idlefx.training.config import Settings
from idlefx.training.datasets import Source, open_loaders
from idlefx.training.distributed import interrupts, processes
from idlefx.training.labelled import evaluate
from idlefx.training.loop import finetune
from idlefx.training.taught import Taught

__all__ = [
    "Settings",
    "Source",
    "Taught",
    "evaluate",
    "finetune",
    "interrupts",
    "load_model",
    "open_loaders",
    "processes",
]
