"""`python -m idlefx bench`: several models, keep ratios and batch sizes, one after the other."""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from idlefx.bench.baselines import Baseline, make_baseline, open_baselines
from idlefx.bench.block_latency import measure_times, token_counts
from idlefx.bench.plot import check_chart, plot
from idlefx.bench.results import EAGER, Bench
from idlefx.bench.runner import MODES, bench
from idlefx.bench.tables import render, summary, to_json
from idlefx.bench.timer import lacks_memory
from idlefx.cli.arguments import add_choice, add_weights, choice_of
from idlefx.errors import IdleFxError, InputError
from idlefx.pipeline import convert, inspect
from idlefx.records import BlockTable, Plan
from idlefx.reporting.cost_report import report
from idlefx.reporting.latency import BlockTimes, size_of, times_to_json
from idlefx.runtime.module import IdleModule
from idlefx.utils.devices import DTYPES, check_dtype, present
from idlefx.utils.files import check_writable, whole_file

Load = Callable[[argparse.Namespace, str], nn.Module]
Example = Callable[[argparse.Namespace, nn.Module], Any]


def add_options(parser: argparse.ArgumentParser) -> None:
    """What the command takes; several models and ratios, unlike others."""
    add_weights(parser)
    add_choice(parser)
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
    parser.add_argument("--table", metavar="FILE", help="write block times by token count, for `convert --times`")
    parser.add_argument("--plot", metavar="FILE", help="draw speed-up over GMAC ratio: a png, pdf or svg")
    parser.add_argument("--json", metavar="FILE", help="write every sample, after every batch size")


class Campaign:
    """All that one command measures.

    Args:
        options: Of the command line.
        load: Makes the model of a name.
        example_of: Makes its example inputs.

    Raises:
        InputError: The device, the number type, a path or a peer cannot be used.
    """

    def __init__(self, options: argparse.Namespace, load: Load, example_of: Example) -> None:
        self.options, self.load, self.example_of = options, load, example_of
        self.device, self.dtype = present(options.device), getattr(torch, options.dtype)
        check_dtype(self.device, self.dtype)
        for path in filter(None, [options.json, options.plot, options.table]):
            check_writable(path)
        if options.plot:
            check_chart(options.plot)
        if options.training and options.peer:
            raise InputError("bench: peers are for inference; leave --peer or --training out")
        self.peers = open_baselines(options.peer)
        self.done: list[Bench] = []
        self.tables: list[BlockTimes] = []

    def run(self) -> int:
        """Measure, print and write; a model that is refused is named, and the rest goes on.

        Returns:
            0, or 2 if a model was refused.

        Raises:
            KeyboardInterrupt: The user stopped it; what was measured is printed and written.
        """
        try:
            return max(map(self._attempt, self.options.model))
        finally:
            if len(self.done) > 1:
                print(summary(self.done), flush=True)

    def _attempt(self, name: str) -> int:
        try:
            self._measure(name)
        except IdleFxError as error:
            print(f"error: {name}: {error}", file=sys.stderr)
            return 2
        return 0

    def _measure(self, name: str) -> None:
        options = self.options
        try:
            model = self.load(options, name).to(self.device, None if options.training else self.dtype)
        except RuntimeError as error:
            if not lacks_memory(error):
                raise
            raise InputError("the model itself does not fit in memory") from error
        example = self.example_of(options, model)
        layers = options.layers or quarters(inspect(model, example, prefix=options.prefix))
        plans = []
        for keep in options.keep:
            idle = convert(
                model,
                layers,
                keep[0] if len(keep) == 1 else keep,
                example_inputs=example,
                **choice_of(options),
            )
            plans.append(idle.plan)
            title = f"{name}, layers {' '.join(map(str, layers))}, keep {' '.join(map(str, keep))}"
            found = self._bench(title, model, idle, example)
            self.done.append(found)
            print(render(found), end="\n\n", flush=True)
            if found.interrupted:
                raise KeyboardInterrupt
        if options.table:
            self._tabulate(plans, next(model.parameters()))

    def _bench(self, title: str, model: nn.Module, idle: IdleModule, example: Any) -> Bench:
        options, peers, refused = self.options, list[Baseline](), list[str]()
        for name, patch in self.peers.items():
            try:
                peers.append(make_baseline(name, patch, model, example, report(idle).idle_gmacs))
            except InputError as error:
                refused.append(str(error))

        def complete(found: Bench) -> Bench:
            return replace(found, skipped=(*refused, *found.skipped))

        found = bench(
            model,
            idle,
            example,
            batches=options.batch,
            dtype=self.dtype if options.training else None,
            modes=[EAGER] if options.eager else [EAGER, *options.modes],
            peers=peers,
            training=options.training,
            title=title,
            seconds=options.seconds,
            each=lambda found: self._write([*self.done, complete(found)]),
        )
        return complete(found)

    def _write(self, benches: Sequence[Bench]) -> None:
        if self.options.json:
            with whole_file(self.options.json) as partial:
                partial.write_text(to_json(benches))
        if self.options.plot:
            plot(benches, self.options.plot)

    def _tabulate(self, plans: Sequence[Plan], weight: Tensor) -> None:
        options, batch = self.options, max(self.options.batch)
        mode, counts = EAGER if options.eager else options.modes[0], token_counts(plans)
        for block in {size_of(block): block for block in plans[0].blocks if block.tokens}.values():
            self.tables.append(measure_times(block, counts, batch, weight, mode, options.seconds))
        with whole_file(options.table) as partial:
            partial.write_text(times_to_json(self.tables))
        print(f"block times at batch {batch}, {mode}, for {len(counts)} token counts: {options.table}\n", flush=True)


def quarters(blocks: BlockTable) -> list[int]:
    """The blocks a quarter, half and three quarters through the model: 3, 6 and 9 of 12."""
    return sorted({max(1, len(blocks) * part // 4) for part in (1, 2, 3)})


def ratios(text: str) -> list[float]:
    """One keep ratio, or as many as layers, with commas."""
    return [float(ratio) for ratio in text.split(",")]
