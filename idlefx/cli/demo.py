"""`python -m idlefx.demo fetch`: download the real model and real pictures into a cache."""

import argparse
import shutil
from collections.abc import Sequence

from idlefx.cli.arguments import add_version
from idlefx.cli.exit_codes import exit_code_of
from idlefx.cli.parser import Parser

PARTS = WEIGHTS, SAMPLES, PHOTOGRAPHS, GALLERY = "weights", "samples", "photographs", "gallery"
FROM_APT = PHOTOGRAPHS, GALLERY


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        0 if it succeeded, 2 if it was refused, 130 if it was interrupted.

    Raises:
        SystemExit: Help or version were asked for, with 0; or the arguments are wrong, with 2.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    if unknown := [part for part in options.parts if part not in PARTS]:
        parser.error(f"there is no part {unknown[0]!r}; there are {', '.join(PARTS)}")
    return exit_code_of(lambda: _fetch(options.parts))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m idlefx.demo", description="A real model and real pictures, to see what idling does to them."
    )
    add_version(parser)
    commands = parser.add_subparsers(required=True, dest="command", metavar="COMMAND", title="commands")
    fetch = commands.add_parser(
        "fetch", help="download them, say from where and under which licence, and keep them in a cache"
    )
    fetch.add_argument(
        "parts", nargs="*", metavar="PART",
        help=f"{WEIGHTS}: those of the real model; {SAMPLES}: four photographs; {PHOTOGRAPHS}: those that scenes are "
        f"made of; {GALLERY}: whole ones of animals, monuments and musicians; both where apt is; all if not told",
    )  # fmt: skip
    return parser


def _fetch(parts: Sequence[str]) -> int:
    from idlefx.demo import gallery, photographs, samples, weights

    sources = {
        WEIGHTS: (weights.ABOUT, weights.fetch_weights),
        SAMPLES: (samples.ABOUT, samples.fetch_samples),
        PHOTOGRAPHS: (photographs.ABOUT, photographs.fetch_photographs),
        GALLERY: (gallery.ABOUT, gallery.fetch_gallery),
    }
    for part, (about, fetch) in sources.items():
        if part in parts or not parts:
            if not parts and part in FROM_APT and shutil.which("apt-get") is None:
                print(f"{part}: left out, as apt is not here: {about}")
                continue
            print(f"{part}: {about}", flush=True)
            print(f"{part}: in {fetch()}", flush=True)
    return 0
