"""Time a dense model, its idling twin and peers side by side: calls, or training steps."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only
from tqdm import tqdm

from idlefx.bench.baselines import Baseline
from idlefx.bench.case import BenchCase, Prepare
from idlefx.bench.results import DENSE, EAGER, IDLE, MODES, Bench
from idlefx.bench.timer import Run
from idlefx.bench.train_step import training_step
from idlefx.capture.inputs import call
from idlefx.errors import InputError
from idlefx.reporting.cost_report import report
from idlefx.runtime.module import IdleModule, conversion_of
from idlefx.utils.devices import check_dtype, machine_in_words, present
from idlefx.variants import with_cut_loss


def bench(
    dense: nn.Module,
    idle: IdleModule,
    example: Any,
    *,
    batches: Sequence[int] = (1, 8, 16),
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    modes: Sequence[str] = (EAGER, "default"),
    peers: Sequence[Baseline] = (),
    training: bool = False,
    title: str = "",
    seconds: float = 4.0,
    rounds: int | None = None,
    progress: bool = True,
    each: Callable[[Bench], None] | None = None,
    serve: Callable[[nn.Module], Mapping[str, nn.Module]] | None = None,
) -> Bench:
    """Time the dense and the idling model, call by call in turn, in one warm process.

    Inference runs in evaluation mode. A training step is made in train mode, on copies: forward, cross-entropy,
    backward and AdamW, a resting model with its token cut loss; another `dtype` than float32 means autocast then.

    Args:
        dense: The original model.
        idle: Its idling twin.
        example: An input, batch first: a tensor, a tuple of positional or a dict of keyword inputs.
        batches: Batch sizes.
        device: Where to; copies of the models are moved. By default they stay where they are.
        dtype: Number type of the copies and of the input; by default the models' own.
        modes: "eager", and modes of `torch.compile(dynamic=False)`; every batch size is compiled anew. None where
            onnxruntime alone is timed.
        peers: Other models for the same inputs; not for training.
        training: Whether to time training steps.
        title: Heading of the table.
        seconds: About how long to measure one pair in one mode.
        rounds: How many rounds to measure instead.
        progress: Whether to show a progress bar.
        each: Called with what was found so far after every batch size.
        serve: Makes of each model what other engines run, by `OTHER_ENGINES`; they are timed too, behind the modes.

    Raises:
        InputError: A batch size is not positive, there is none, a mode is unknown, the device or the number type
            is missing.
    """
    if not batches or min(batches) < 1:
        raise InputError(f"bench: batch sizes must be positive, got {list(batches)}")
    if not (modes or serve) or not set(modes) <= set(MODES):
        raise InputError(f"bench: modes are {', '.join(MODES)}; got {', '.join(modes) or 'none'}")
    if training and peers:
        raise InputError("bench: peers are for inference; leave them out or do not time training")
    found = Bench(title or type(dense).__name__, "", _gmacs(idle, peers), training=training)
    with _ready(dense, idle, peers, device, dtype, training) as models, torch.inference_mode(not training):
        served = {} if serve is None else {name: serve(model) for name, model in models.items()}
        modes = [*modes, *served.get(DENSE, ())]
        weight = next(models[DENSE].parameters())
        amp = dtype if training and dtype != torch.float32 else None
        prepare = _steps(amp, cut=_rests(idle)) if training else dict.fromkeys(models, _call)
        machine = machine_in_words(weight) + (f", autocast to {amp}" if amp else "")
        found = replace(found, machine=f"{machine}, onnxruntime {version('onnxruntime')}" if serve else machine)
        for batch in tqdm(batches, desc="bench", unit="batch", leave=False, disable=not progress):
            case = BenchCase(models, served, prepare, partial(_resized, example, batch, weight), batch, weight.device)
            case.run(modes, seconds, rounds)
            found = replace(
                found,
                timings=(*found.timings, *case.timings()),
                skipped=(*found.skipped, *case.skipped),
                interrupted=case.interrupted,
            )
            if each is not None:
                each(found)
            if case.interrupted:
                break
    return found


@contextmanager
def _ready(
    dense: nn.Module,
    idle: IdleModule,
    peers: Sequence[Baseline],
    device: str | torch.device | None,
    dtype: torch.dtype | None,
    training: bool,
) -> Iterator[dict[str, nn.Module]]:
    """The models where and as they are timed, copies if need be; the modes of the user's own come back."""
    target = next(dense.parameters()).device if device is None else present(device)
    if dtype is not None:
        check_dtype(target, dtype)
    models = {DENSE: dense, IDLE: idle, **{peer.name: peer.model for peer in peers}}
    if training or device is not None or dtype is not None:
        models = {n: deepcopy(m).to(target, None if training else dtype) for n, m in models.items()}
    if training and _rests(idle):
        models[IDLE] = with_cut_loss(models[IDLE])  # type: ignore[arg-type]
    modes = {module: module.training for model in models.values() for module in model.modules()}
    for model in models.values():
        model.train(training)
    try:
        yield models
    finally:
        for module, mode in modes.items():  # parents first; a converted model swaps its graph with its mode
            if isinstance(module, IdleModule):
                module.train(mode)
            module.training = mode


def _rests(idle: IdleModule) -> bool:
    """Whether its idle tokens rest, which is what the token cut loss is for."""
    return conversion_of(idle).plan.idle == "rest"


def _gmacs(idle: IdleModule, peers: Sequence[Baseline]) -> dict[str, float]:
    totals = report(idle)
    return {DENSE: totals.dense_gmacs, IDLE: totals.idle_gmacs, **{peer.name: peer.gmacs for peer in peers}}


def _resized(example: Any, batch: int, weight: Tensor) -> Any:
    def resize(value: Tensor) -> Tensor:
        whole = value[:1].expand(batch, *value.shape[1:]).contiguous().to(weight.device)
        return whole.to(weight.dtype) if whole.is_floating_point() else whole

    return tree_map_only(Tensor, resize, example)


def _call(model: nn.Module, run: Callable[..., Any], inputs: Any) -> tuple[Run, Sequence[Tensor]]:
    resident = [*model.parameters(), *model.buffers(), *tree_leaves(inputs)]
    return lambda: call(run, inputs), [t for t in resident if isinstance(t, Tensor)]


def _steps(amp: torch.dtype | None, *, cut: bool) -> dict[str, Prepare]:
    return {name: partial(training_step, amp=amp, cut=cut and name == IDLE) for name in (DENSE, IDLE)}
