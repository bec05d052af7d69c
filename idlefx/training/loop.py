"""A fine-tune from its first look at the models to its last step: `finetune`."""

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from torch import nn

from idlefx.capture.export import capture
from idlefx.errors import InputError
from idlefx.pipeline import spell
from idlefx.reporting.comparison.model_calls import evaluating
from idlefx.runtime.module import IdleModule, conversion_of
from idlefx.training import checkpoints
from idlefx.training.config import Settings
from idlefx.training.distillation import Distillation
from idlefx.training.distributed import World
from idlefx.training.feature_taps import has_features, tap
from idlefx.training.gain import Gain
from idlefx.training.given_batches import Batches, as_batches
from idlefx.training.history import History
from idlefx.training.labelled import Labelled
from idlefx.training.length import Length, affordable_length, planned_length
from idlefx.training.loader import ImageLoader
from idlefx.training.run import Run
from idlefx.training.trainer import Trainer
from idlefx.variants import with_cut_loss


def finetune(
    dense: nn.Module,
    idle: IdleModule,
    train: ImageLoader | Iterable[Any],
    val: ImageLoader | Iterable[Any],
    settings: Settings | None = None,
    *,
    directory: Path | None = None,
    resume: bool = False,
    example_inputs: Any = None,
    tensorboard: bool = False,
    stop: Callable[[], bool] = lambda: False,
    batch_size: int = 16,
    world: World | None = None,
) -> History | Gain:
    """Train a converted model in place, with the dense model as its teacher.

    With labels, which an `ImageLoader` of labelled images has, it is trained as published, and comes back with the
    averaged weights. Without them every output is drawn to the dense model's, and the model comes back with the
    weights that did best on held-out images, also where an interrupt or an error ended the training. Where none did
    surely better than the untuned ones, it comes back untuned.

    Args:
        dense: The model as it was; it stays as it is, so convert a copy.
        idle: What `convert` made of it; it comes back in eval mode.
        train: Training batches: what `open_loaders` gives; or, without labels, any iterable or `DataLoader` of tensors
            (B, channels, height, width), of tuples that begin with one, or of dicts of keyword inputs.
        val: Held-out batches, alike.
        settings: How to train; by default as published with labels, and without them as served best.
        directory: Where checkpoints and metrics go; None for nowhere.
        resume: Whether to continue exactly from the last checkpoint there.
        example_inputs: As for `convert`.
        tensorboard: Whether to write for TensorBoard too.
        stop: Asked after each step; if it says so, a checkpoint is written and the run ends unfinished.
        batch_size: Images in a batch, where an iterable holds single images.
        world: The processes that train together, for batches that do not know them.

    Returns:
        With labels, accuracy of dense, idle before and idle after; without, how the outputs compare with the dense
        model's before and after. Both hold the losses of every step.

    Raises:
        InputError: The data does not fit the model, or a file cannot be written.
        TrainingError: A loss is no finite number.
    """
    began = time.perf_counter()
    if {*map(id, dense.parameters())} & {*map(id, idle.parameters())}:
        raise InputError("finetune: the model shares its weights with its teacher; convert it with copy=True")
    conversion = conversion_of(idle)
    conversion.check_gradients()
    options: dict[str, Any] = {"world": world, "batch_size": batch_size, "seed": (settings or Settings()).seed}
    trained = as_batches(train, conversion.facts, once=True, **options)
    held_out = as_batches(val, conversion.facts, **options)
    if trained.labelled != held_out.labelled:
        raise InputError(
            "finetune: training and held-out images must both have labels, as an ImageLoader of labelled ones has, or "
            "neither of them"
        )
    settings = (settings or Settings()).settled(labelled=trained.labelled, idle=conversion.plan.idle)
    batches = trained.count()
    per_epoch = None if batches is None else batches // settings.accumulate
    if per_epoch == 0:
        raise InputError(f"settings: accumulate is {settings.accumulate}, but an epoch has {batches} batches only")
    with evaluating([dense]):
        objective = _objective(dense, idle.eval(), trained, held_out, settings, example_inputs)
        outcome = _outcome(objective)
        state: dict[str, Any] = {}
        if resume:
            assert directory is not None
            state = checkpoints.load(directory)
            objective.restore(state["history"])
        else:
            objective.begin(idle)
            if isinstance(objective, Distillation) and objective.nothing_to_gain:
                if directory is not None and trained.world.leads:
                    checkpoints.save_best(directory, idle.state_dict())
                outcome.finished = True
                return outcome
        spent = time.perf_counter() - began
        length = _length(settings, trained, per_epoch, objective, state, spent)
        options = {"steps": length.steps, "batch_size": trained.batch_size, "world": trained.world}
        training = Trainer(idle, objective, settings, **options)
        if resume:
            training.restore(state["training"])
        run = Run(training, trained, length, directory, stop)
        run.go(outcome, stale=state.get("stale", 0), tensorboard=tensorboard)
    return outcome


def _length(
    settings: Settings,
    train: Batches,
    per_epoch: int | None,
    objective: Labelled | Distillation,
    state: dict[str, Any],
    spent: float,
) -> Length:
    """Of a run that goes on what it was, else what the settings name or their budget allows."""
    if "length" in state:
        return Length(**state["length"])
    if settings.steps or not settings.budget:
        return planned_length(settings, per_epoch, labelled=train.labelled)
    seconds = 60 * settings.budget - spent
    length = affordable_length(settings, train.epoch(), objective, seconds, spent, train.world)
    if train.world.leads:
        print(f"a budget of {settings.budget:g} minutes is enough for {length.steps} steps")
    return length


def _objective(
    dense: nn.Module, idle: IdleModule, train: Batches, val: Batches, settings: Settings, example_inputs: Any
) -> Labelled | Distillation:
    rests = conversion_of(idle).plan.idle == "rest"
    leads = train.world.leads
    if settings.w_cut and not rests and leads:
        print("there is no token cut loss of tokens that follow, so w_cut is off")
    if not isinstance(train, ImageLoader) or not train.labelled:
        distillation = Distillation(dense, idle, val, settings, Gain.of(idle))
        if leads:
            print(distillation)
        return distillation
    assert isinstance(val, ImageLoader)  # as it has labels
    teacher = tap(spell(capture(dense, example_inputs, copy_model=False).eval_graph))
    student = tap((with_cut_loss(idle) if settings.w_cut and rests else idle).train())
    idle.eval()
    if settings.w_feat and leads and not (has_features(teacher) and has_features(student)):
        print("no linear classifier was found, so w_feat is off")
    return Labelled(student, teacher, settings, val, History.of(idle), train.batch_size)


def _outcome(objective: Labelled | Distillation) -> History | Gain:
    return objective.history if isinstance(objective, Labelled) else objective.gain
