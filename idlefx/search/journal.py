"""What candidates were found to change, kept in a file, so that a search that was stopped goes on where it was.

A search does the same in the same order whenever it is run; going on is running again, with what is known looked up.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from idlefx.errors import IdleFxError, InputError
from idlefx.options import PlanOptions
from idlefx.utils.files import check_writable, whole_file


class Journal:
    """Changes by plan and pictures.

    Args:
        path: Where they are kept; nowhere if None.
        search: What the search is of: another one's journal is refused.
        resume: Whether to go on with what is there.

    Attributes:
        notes: What else was kept, by name.
        done: Whether the search came to its end.

    Raises:
        InputError: The file cannot be written, or is of another search.
    """

    def __init__(self, path: Path | None, search: Mapping[str, Any], *, resume: bool) -> None:
        self.path, self.search = path, json.loads(json.dumps(search))
        self.changes: dict[str, float] = {}
        self.notes: dict[str, Any] = {}
        self.done = False
        if path is None:
            return
        if resume:
            self.changes, self.notes = _read(path, self.search)
        else:
            check_writable(path)

    def get(self, pictures: str, options: PlanOptions) -> float | None:
        """What was found, if it was."""
        return self.changes.get(_key(pictures, options))

    def __getitem__(self, asked: tuple[str, PlanOptions]) -> float:
        return self.changes[_key(*asked)]

    def put(self, pictures: str, options: PlanOptions, change: float) -> None:
        """Keep what was found.

        Args:
            pictures: Which ones, in a word.
            options: Of the plan.
            change: From the dense model.
        """
        self.changes[_key(pictures, options)] = change
        self._write()

    def note(self, name: str, value: Any) -> None:
        """Keep something else that a search must have again to do the same: plain data."""
        self.notes[name] = value
        self._write()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Take the file away where nothing is left to go on with: the search is done, or was refused."""
        refused = kind is not None and issubclass(kind, IdleFxError)
        if self.path is not None and (self.done or refused):
            self.path.unlink(missing_ok=True)

    def _write(self) -> None:
        if self.path is not None:
            told = {"search": self.search, "notes": self.notes, "changes": self.changes}
            with whole_file(self.path) as partial:
                partial.write_text(json.dumps(told, indent=1))


def journal_path(out: str | Path | None, *, resume: bool) -> Path | None:
    """Where the journal of a search stands that writes its plan to `out`; None where that is nowhere.

    Raises:
        InputError: There is none that the search could go on with.
    """
    if out is not None:
        return Path(out).with_name(Path(out).name + ".search")
    if resume:
        raise InputError("resume: the search kept no file; name the one it was to write, with out= or --out")
    return None


def _key(pictures: str, options: PlanOptions) -> str:
    return f"{pictures} {json.dumps(options.to_dict())}"


def _read(path: Path, search: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, Any]]:
    try:
        told = json.loads(path.read_text())
        before, notes = dict(told["search"]), dict(told["notes"])
        changes = {str(key): float(change) for key, change in told["changes"].items()}
    except OSError as error:
        raise InputError(f"resume: cannot read {path}: {error.strerror}; begin anew, without resume") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"resume: {path} is no journal of a search: {error}; begin anew, without resume") from error
    if other := [name for name in search if before.get(name) != search[name]]:
        raise InputError(
            f"resume: {path} is of another search, with another {' and another '.join(other)}; take what it was begun "
            "with, or begin anew, without resume"
        )
    return changes, notes
