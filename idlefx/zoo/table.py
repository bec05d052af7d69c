"""The compatibility table as it is printed, and what it sums up to."""

import re
from collections.abc import Iterable, Sequence

from tabulate import tabulate

from idlefx.zoo.survey import Row

WIDTHS = {"simple": [None] * 8 + [60], "github": None}


def render(rows: Iterable[Row], style: str = "simple") -> str:
    """The table and a line that sums it up, for a terminal or with `style="github"` as Markdown."""
    rows = list(rows)
    cells = [
        (
            row.label, row.family, row.found or "-", row.can_idle if row.found else "-",
            "-" if row.keep_all is None else f"{row.keep_all:.0e}" if row.keep_all else "0",
            _scientific(row.resting), _scientific(row.following),
            row.batch or "-", f"FAILS: {row.failure}" if row.failure else row.note,
        )
        for row in rows
    ]  # fmt: skip
    headers = (
        "model",
        "family",
        "blocks",
        "can idle",
        "keep-all error",
        "resting error",
        "following error",
        "batch",
        "note",
    )
    table: str = tabulate(cells, headers, tablefmt=style, disable_numparse=True, maxcolwidths=WIDTHS[style])
    if style == "github":  # read by people only once it is rendered
        table = re.sub(" +", " ", re.sub("-{4,}", "---", table))
    return f"{table}\n\n{_summary(rows)}\n"


def _scientific(error: float | None) -> str:
    return "-" if error is None else f"{error:.0e}"


def _summary(rows: Sequence[Row]) -> str:
    converted = [row for row in rows if row.resting is not None and not row.failure]
    followed = [row for row in converted if row.following is not None]
    failed = sum(bool(row.failure) for row in rows)
    missing = sum(row.missing for row in rows)
    refused = len(rows) - len(converted) - failed - missing
    parts = [f"{len(converted)} of {len(rows)} models convert", f"{refused} are refused for the reason given"]
    parts += [f"{missing} were not tried"] if missing else []
    parts += [f"{failed} FAIL"] if failed else []
    resting, following = (
        max(errors, default=0.0)
        for errors in ([row.resting or 0.0 for row in converted], [row.following or 0.0 for row in followed])
    )
    ties = sum(row.ties for row in rows)
    return (
        f"{', '.join(parts)}. Largest error of resting {resting:.0e}, and of following {following:.0e}, which was "
        f"compared for {len(followed)} models; {ties} batches were passed over for near ties."
    )
