"""`python -m idlefx bench`: several models, keep ratios and batch sizes, one after the other."""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from idlefx.bench import MODES, bench
from idlefx.chart import check_chart, plot
from idlefx.devices import DTYPES, check_dtype, present
from idlefx.errors import IdleFxError, InputError
from idlefx.files import check_writable, whole_file
from idlefx.peers import make_peer, open_peers
from idlefx.pipeline import convert, inspect
from idlefx.records import BlockTable
from idlefx.report import report
from idlefx.scoreboard import render, to_json
from idlefx.stopwatch import lacks_memory
from idlefx.timings import EAGER, Bench

Patch = Callable[[nn.Module], None]
Load = Callable[[argparse.Namespace, str], nn.Module]
Example = Callable[[argparse.Namespace, nn.Module], Any]


def add_options(parser: argparse.ArgumentParser) -> None:
    """What the command takes besides the options of models and plans."""
    parser.add_argument("--model", nargs="+", required=True, help="timm names, or package.module:callable")
    parser.add_argument(
        "--layers", type=int, nargs="+", help="blocks that open a stage; by default a quarter, half, three quarters in"
    )
    parser.add_argument(
        "--keep", type=ratios, nargs="+", default=[[0.7]], help="ratios to time; 0.7,0.5,0.3 is one per layer"
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 16], help="images per call")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="for training, that of autocast")
    parser.add_argument("--modes", nargs="+", choices=MODES[1:], default=["default"], help="modes of torch.compile")
    parser.add_argument("--eager", action="store_true", help="do not time compiled models")
    parser.add_argument("--training", action="store_true", help="time a training step instead, with the token cut loss")
    parser.add_argument("--seconds", type=float, default=4.0, help="about how long to measure one pair in one mode")
    parser.add_argument("--peer", nargs="+", default=[], metavar="tome=PATH", help="time a checkout of ToMe too")
    parser.add_argument("--plot", metavar="FILE", help="draw speed-up over GMAC ratio: a png, pdf or svg")
    parser.add_argument("--json", metavar="FILE", help="write every sample, after every batch size")


def run(options: argparse.Namespace, load: Load, example_of: Example) -> int:
    """Measure, print and write; a model that is refused is named, and the rest goes on.

    Args:
        options: Of the command line.
        load: Makes the model of a name.
        example_of: Makes its example inputs.

    Returns:
        0, or 2 if a model was refused.

    Raises:
        InputError: The device, number type or a path cannot be used.
        KeyboardInterrupt: The user stopped it; what was measured is printed and written.
    """
    device, dtype = present(options.device), getattr(torch, options.dtype)
    check_dtype(device, dtype)
    for path in filter(None, [options.json, options.plot]):
        check_writable(path)
    if options.plot:
        check_chart(options.plot)
    if options.training and options.peer:
        raise InputError("bench: peers are for inference; leave --peer or --training out")
    peers = open_peers(options.peer)
    done: list[Bench] = []
    refused = 0
    for name in options.model:
        for keep in options.keep:
            try:
                done.append(_bench(options, name, keep, peers, done, load, example_of))
            except IdleFxError as error:
                print(f"error: {name}: {error}", file=sys.stderr)
                refused = 2
                continue
            print(render(done[-1]), end="\n\n", flush=True)
            if done[-1].interrupted:
                raise KeyboardInterrupt
    return refused


def _bench(
    options: argparse.Namespace,
    name: str,
    keep: Sequence[float],
    patches: Mapping[str, Patch],
    done: Sequence[Bench],
    load: Load,
    example_of: Example,
) -> Bench:
    def write(found: Bench) -> None:
        benches = [*done, replace(found, skipped=(*refused, *found.skipped))]
        if options.json:
            with whole_file(options.json) as partial:
                partial.write_text(to_json(benches))
        if options.plot:
            plot(benches, options.plot)

    dtype = getattr(torch, options.dtype)
    try:
        model = load(options, name).to(options.device, None if options.training else dtype)
    except RuntimeError as error:
        if not lacks_memory(error):
            raise
        raise InputError("the model itself does not fit in memory") from error
    example = example_of(options, model)
    layers = options.layers or quarters(inspect(model, example, prefix=options.prefix))
    idle = convert(
        model,
        layers,
        keep[0] if len(keep) == 1 else keep,
        schedule=options.schedule,
        selector=options.selector,
        prefix=options.prefix,
        example_inputs=example,
    )
    peers, refused = [], []
    for peer, patch in patches.items():
        try:
            peers.append(make_peer(peer, patch, model, example, report(idle).idle_gmacs))
        except InputError as error:
            refused.append(str(error))
    title = f"{name}, layers {' '.join(map(str, layers))}, keep {' '.join(map(str, keep))}"
    found = bench(
        model,
        idle,
        example,
        batches=options.batch,
        dtype=dtype if options.training else None,
        modes=[EAGER] if options.eager else [EAGER, *options.modes],
        peers=peers,
        training=options.training,
        title=title,
        seconds=options.seconds,
        each=write,
    )
    return replace(found, skipped=(*refused, *found.skipped))


def quarters(blocks: BlockTable) -> list[int]:
    """The blocks a quarter, half and three quarters through the model: 3, 6 and 9 of 12."""
    return sorted({max(1, len(blocks) * part // 4) for part in (1, 2, 3)})


def ratios(text: str) -> list[float]:
    """One keep ratio, or as many as layers, with commas."""
    return [float(ratio) for ratio in text.split(",")]
