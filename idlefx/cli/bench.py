"""`python -m idlefx bench`: several models, keep ratios and batch sizes, one after the other."""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any, get_args

import torch
from torch import Tensor, nn

from idlefx.bench.baselines import Baseline, make_baseline, open_baselines
from idlefx.bench.block_latency import measure_times, token_counts
from idlefx.bench.first_tokens import first_tokens
from idlefx.bench.plot import check_chart, plot
from idlefx.bench.results import EAGER, FIRST, OTHER_ENGINES, Bench
from idlefx.bench.runner import bench
from idlefx.bench.tables import render, summary, to_json
from idlefx.bench.timer import lacks_memory
from idlefx.cli.arguments import plan_options, told_to_convert
from idlefx.cli.exit_codes import REFUSED
from idlefx.cli.onnx_sessions import OnnxSession, open_sessions
from idlefx.deploy.onnx import check_libraries
from idlefx.errors import IdleFxError, InputError
from idlefx.options import IDLES, Idle, PlanOptions
from idlefx.pipeline import convert, inspect
from idlefx.records import BlockTable, Plan
from idlefx.reporting.cost_report import report
from idlefx.reporting.latency import BlockTimes, size_of, times_to_json
from idlefx.runtime.module import IdleModule
from idlefx.utils.devices import check_dtype, present
from idlefx.utils.files import check_writable, whole_file

Load = Callable[[argparse.Namespace, str], nn.Module]
Example = Callable[[argparse.Namespace, nn.Module], Any]
KINDS = {  # by what idle tokens do, and whether they are chosen or grouped anew: what the title says of it
    ("rest", True): [],
    ("rest", False): ["pruned"],
    ("follow", True): ["follow"],
    ("follow", False): ["follow, joined"],
}


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
        if options.training and options.baseline:
            raise InputError("bench: peers are for inference; leave --baseline or --training out")
        self.peers = open_baselines([entry for entry in options.baseline if entry not in (FIRST, *IDLES)])
        self.engines = [engine for engine in OTHER_ENGINES if engine in options.runtime]
        if self.engines:
            self._check_onnx()
        self.done: list[Bench] = []
        self.tables: list[BlockTimes] = []

    def _check_onnx(self) -> None:
        check_libraries()
        other = {
            "--training": self.options.training, "--table": self.options.table,
            "--eager": self.options.eager and "torch" not in self.options.runtime,
            "--device": self.device.type != "cpu", "--dtype": self.dtype != torch.float32,
            "--baseline tome": self.peers,
        }  # fmt: skip
        if wrong := [option for option, given in other.items() if given]:
            raise InputError(f"bench: onnxruntime calls models in float32 on the CPU; leave {' and '.join(wrong)} out")

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
            return REFUSED
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
        plans = []
        for plan in self._asked(model, example):
            idle = convert(model, example_inputs=example, **told_to_convert(plan))
            plans.append(idle.plan)
            numbers = {"layers": plan.layers, "keep": plan.keep if isinstance(plan.keep, tuple) else [plan.keep]}
            told = [f"{what} {' '.join(map(str, each))}" for what, each in numbers.items()]
            title = ", ".join([name, *told, *KINDS[plan.idle, plan.reselect]])
            found = self._bench(title, model, idle, example, plan)
            self.done.append(found)
            print(render(found), end="\n\n", flush=True)
            if found.interrupted:
                raise KeyboardInterrupt
        if options.table:
            self._tabulate(plans, next(model.parameters()))

    def _asked(self, model: nn.Module, example: Any) -> list[PlanOptions]:
        """The plan of the file, or all that the options ask for."""
        options = self.options
        if options.plan is not None:
            return [plan_options(options)]
        layers = options.layers or quarters(inspect(model, example, prefix=options.prefix))
        pairs = product(options.idle, options.keep)
        return [plan_options(options, layers=layers, keep=keep, idle=word) for word, keep in pairs]

    def _bench(self, title: str, model: nn.Module, idle: IdleModule, example: Any, plan: PlanOptions) -> Bench:
        options, peers, refused = self.options, list[Baseline](), list[str]()
        makers = {
            name: partial(make_baseline, name, patch, model, example, report(idle).idle_gmacs)
            for name, patch in self.peers.items()
        }
        kinds: tuple[Idle, ...] = get_args(Idle)
        for kind in kinds:
            if kind in options.baseline and kind != plan.idle:
                makers[kind] = partial(_of_kind, kind, model, example, plan)
        if FIRST in options.baseline:
            makers[FIRST] = partial(first_tokens, idle)
        for make in makers.values():
            try:
                peers.append(make())
            except IdleFxError as error:
                refused.append(str(error))

        def serve(served: nn.Module) -> dict[str, OnnxSession]:
            if served is model:  # the dense model is packaged as the others are
                served = convert(model, [0], 1.0, example_inputs=example)
            return open_sessions(served, self.engines, max(options.batch_size))

        modes = [EAGER, *([] if options.eager else options.modes)] if "torch" in options.runtime else []

        def complete(found: Bench) -> Bench:
            return replace(found, skipped=(*refused, *found.skipped))

        found = bench(
            model,
            idle,
            example,
            batches=options.batch_size,
            dtype=self.dtype if options.training else None,
            modes=modes,
            peers=peers,
            training=options.training,
            title=title,
            seconds=options.seconds,
            each=lambda found: self._write([*self.done, complete(found)]),
            serve=serve if self.engines else None,
        )
        return complete(found)

    def _write(self, benches: Sequence[Bench]) -> None:
        if self.options.json:
            with whole_file(self.options.json) as partial:
                partial.write_text(to_json(benches))
        if self.options.plot:
            plot(benches, self.options.plot)

    def _tabulate(self, plans: Sequence[Plan], weight: Tensor) -> None:
        options, batch = self.options, max(self.options.batch_size)
        mode, counts = EAGER if options.eager else options.modes[0], token_counts(plans)
        for block in {size_of(block): block for block in plans[0].blocks if block.tokens}.values():
            self.tables.append(measure_times(block, counts, batch, weight, mode, options.seconds))
        with whole_file(options.table) as partial:
            partial.write_text(times_to_json(self.tables))
        print(f"block times at batch {batch}, {mode}, for {len(counts)} token counts: {options.table}\n", flush=True)


def _of_kind(kind: Idle, model: nn.Module, example: Any, plan: PlanOptions) -> Baseline:
    """The same plan with idle tokens of another kind."""
    idle = convert(model, example_inputs=example, **told_to_convert(replace(plan, idle=kind)))
    return Baseline(kind, idle, report(idle).idle_gmacs)


def quarters(blocks: BlockTable) -> list[int]:
    """The blocks a quarter, half and three quarters through the model: 3, 6 and 9 of 12."""
    return sorted({max(1, len(blocks) * part // 4) for part in (1, 2, 3)})
