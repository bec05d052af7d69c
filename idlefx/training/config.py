"""What a fine-tune can be told; every field is an option of the shell."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from idlefx.errors import InputError

GLYPHS = "glyphs"  # the name of the data set that is drawn
REFERENCE_BATCH, REFERENCE_LR = 512, 1e-5  # the published learning rate is per so many images
DISTANCES = ("cosine", "squared", "kl")
TRAINED = ("all", "stages", "norms")

# What is None in a `Settings` until the kind of the data is known.
LABELLED: Mapping[str, Any] = {
    "epochs": 30, "min_lr": 1e-6, "warmup": 0.05, "weight_decay": 0.05, "w_cut": 20.0, "ema": 0.99996, "patience": 0,
    "vector_lr": 1.0, "parameters": "all",
}  # fmt: skip
# Near the teacher AdamW's first steps do more harm than a short run repairs: a long warm-up, and nothing that pulls
# the weights away from where they are. Steps of AdamW are as large for a weight that hardly matters as for one that
# does; in short runs on the real model vectors could take larger ones, and what comes before the first stage none.
UNLABELLED: Mapping[str, Any] = {
    "epochs": 1, "min_lr": 0.0, "warmup": 1 / 3, "weight_decay": 0.0, "w_cut": 0.0, "ema": 0.0, "patience": 5,
    "vector_lr": 40.0, "parameters": "stages",
}  # fmt: skip
UNLABELLED_LR = {"follow": 2e-6, "rest": 1e-5}  # what follows is near the teacher already, what rests is far
UNLABELLED_BUDGET = 10.0  # minutes, where neither steps nor epochs nor a budget are named


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


def _by_data(name: str, text: str) -> Any:
    labelled, unlabelled = (
        each if isinstance(each, str) else f"{each:.5g}" for each in (LABELLED[name], UNLABELLED[name])
    )
    return _option(None, f"{text} (default: {labelled} with labels, {unlabelled} without)")


@dataclass(frozen=True)
class Settings:
    """How to train; the defaults are the published ones with labels, and those that served best without.

    What is None is decided by the kind of the data; `settled` does that.

    Source:
        IdleViT, arXiv:2310.05654, section 4, and the training flags in its repository.

    Raises:
        InputError: A value is out of its range.
    """

    epochs: int = _option(
        None, f"passes over the training images; with labels {LABELLED['epochs']}, without as many as the budget allows"
    )
    steps: int = _option(0, "stop after so many steps, if not 0")
    budget: float = _option(
        0.0, f"minutes that the run may take, if not 0; without labels, steps and epochs it is {UNLABELLED_BUDGET:g}"
    )
    accumulate: int = _option(1, "batches whose gradients make one step")
    lr: float = _option(
        0.0, f"highest learning rate; 0: {REFERENCE_LR:g} for every {REFERENCE_BATCH} images of a step; without labels "
        + ", ".join(f"{rate:g} where tokens {idle}" for idle, rate in UNLABELLED_LR.items()),
    )  # fmt: skip
    min_lr: float = _by_data("min_lr", "learning rate at the end of the cosine")
    warmup: float = _by_data("warmup", "share of the run over which the learning rate rises")
    state_warmup: float = _option(0.0, "share of the run at whose start the optimiser only watches the gradients")
    weight_decay: float = _by_data("weight_decay", "of AdamW")
    vector_lr: float = _by_data(
        "vector_lr", "factor of the learning rate of norms, biases and other vectors; 1 where lr is named"
    )
    layer_decay: float = _option(1.0, "factor of the learning rate from each block to the one before; 1: none")
    clip: float = _option(1.0, "largest norm of the gradients; 0: any")
    w_cut: float = _by_data("w_cut", "weight of the token cut loss")
    cut_warmup: float = _option(0.0, "share of the run over which that weight rises from 0")
    w_kd: float = _option(10.0, "weight of the distance to the dense model's classes; with labels")
    w_feat: float = _option(1000.0, "weight of the distance to the dense model's class features; with labels")
    distance: Mapping[str, str] = field(
        default_factory=dict,
        metadata={"help": f"how an output is compared, NAME={'|'.join(DISTANCES)}; without labels, else by its shape"},
    )
    weight: Mapping[str, float] = field(
        default_factory=dict, metadata={"help": "how much an output counts, NAME=NUMBER; without labels, else 1"}
    )
    keep_from: float = _option(
        0.0, "keep ratio from which those of the plan are come to in steps, over the first third of the run; 0: they "
        "are taken at once; without labels",
    )  # fmt: skip
    stream: bool = _option(
        False, "compare the tokens after the last block too, as an output named stream; without labels"
    )
    mixup: float = _option(0.8, "strength of mixup; 0: none; with labels")
    cutmix: float = _option(1.0, "strength of cutmix; 0: none; with labels")
    smoothing: float = _option(0.1, "label smoothing")
    ema: float = _by_data("ema", "decay of the averaged weights, reached slowly from 0; 0: no averaging")
    parameters: str = _by_data(
        "parameters", "what is trained: all, the stages in which tokens idle, or norms and biases alone"
    )
    train_all: bool = _option(False, "train class token and positions too")
    looks: int = _option(10, "how often the held-out images are looked at; with labels after every epoch")
    patience: int = _by_data("patience", "looks without a better one after which the run ends; 0: it does not")
    checkpoint_minutes: float = _option(10.0, "minutes between checkpoints at the most")
    amp: bool = _option(False, "compute in bfloat16 where that is safe")
    compile: bool = _option(False, "compile teacher and student")
    seed: int = _option(0, "another seed, another order and augmentation")

    def __post_init__(self) -> None:
        for name, least, most in (
            ("epochs", 1, None), ("steps", 0, None), ("budget", 0, None), ("accumulate", 1, None), ("lr", 0, None),
            ("min_lr", 0, None), ("warmup", 0, 1), ("state_warmup", 0, 1), ("weight_decay", 0, None),
            ("vector_lr", 0, None), ("layer_decay", 0, 1), ("clip", 0, None), ("w_cut", 0, None), ("cut_warmup", 0, 1),
            ("w_kd", 0, None), ("w_feat", 0, None), ("mixup", 0, None), ("cutmix", 0, None), ("smoothing", 0, 1),
            ("ema", 0, 1), ("keep_from", 0, 1), ("looks", 1, None), ("patience", 0, None),
            ("checkpoint_minutes", 0, None), ("seed", 0, None),
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and not (value >= least and (most is None or value <= most)):
                bounds = f"at least {least}" if most is None else f"between {least} and {most}"
                raise InputError(f"settings: {name} is {value}; expected {bounds}")
        if self.parameters is not None:
            _check_word("parameters", self.parameters, TRAINED)
        for output, kind in self.distance.items():
            _check_word(f"distance of {output}", kind, DISTANCES)
        for output, weight in self.weight.items():
            if not weight >= 0:
                raise InputError(f"settings: weight of {output} is {weight}; expected at least 0")

    def settled(self, *, labelled: bool, idle: str) -> "Settings":
        """These settings, with what the kind of the data decides.

        Args:
            labelled: Whether the images have labels.
            idle: What idle tokens do: "rest" or "follow".
        """
        defaults = LABELLED if labelled else UNLABELLED
        changes = {name: value for name, value in defaults.items() if getattr(self, name) is None}
        if not labelled:
            if self.lr and "vector_lr" in changes:
                changes["vector_lr"] = 1.0  # a rate that is named is that of all
            changes["lr"] = self.lr or UNLABELLED_LR[idle]
            if "epochs" in changes and not self.steps and not self.budget:
                changes["budget"] = UNLABELLED_BUDGET
        return replace(self, **changes)

    def rate(self, images: int) -> float:
        """The highest learning rate, for steps of so many images."""
        return self.lr or REFERENCE_LR * images / REFERENCE_BATCH

    def cut_weight(self, step: int, steps: int) -> float:
        """The weight of the cut loss in a step of a run."""
        rising = self.cut_warmup * steps
        return self.w_cut * min(1.0, (step + 1) / rising) if rising else self.w_cut


def _check_word(name: str, word: str, words: tuple[str, ...]) -> None:
    if word not in words:
        raise InputError(f"settings: {name} is {word!r}; expected one of {', '.join(words)}")


def names() -> list[str]:
    """Of all settings."""
    return [each.name for each in fields(Settings)]
