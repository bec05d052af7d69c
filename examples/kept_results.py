"""Results of a study that are kept as soon as they are there, so that an interrupted one goes on."""

import json
from pathlib import Path
from typing import Any

from idlefx.utils.files import whole_file

Result = dict[str, Any]


def read_results(path: Path) -> list[Result]:
    """What was kept, if anything was."""
    return json.loads(path.read_text()) if path.exists() else []


def keep_results(path: Path, results: list[Result]) -> None:
    """Write all of it anew, whole or not at all."""
    path.parent.mkdir(exist_ok=True)
    with whole_file(path) as partial:
        partial.write_text(json.dumps(results, indent=1) + "\n")
