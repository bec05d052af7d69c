"""What a fine-tune can be told; every field is an option of the shell."""

from dataclasses import dataclass, field, fields
from typing import Any

from idlefx.errors import InputError

GLYPHS = "glyphs"  # the name of the data set that is drawn
REFERENCE_BATCH, REFERENCE_LR = 512, 1e-5  # the published learning rate is per so many images


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Settings:
    """How to train; the defaults are the published ones where there are such.

    Source:
        IdleViT, arXiv:2310.05654, section 4, and the training flags in its repository.

    Raises:
        InputError: A value is out of its range.
    """

    epochs: int = _option(30, "passes over the training images")
    steps: int = _option(0, "stop after so many steps, if not 0")
    accumulate: int = _option(1, "batches whose gradients make one step")
    lr: float = _option(0.0, f"highest learning rate; 0: {REFERENCE_LR:g} for every {REFERENCE_BATCH} images of a step")
    min_lr: float = _option(1e-6, "learning rate at the end of the cosine")
    warmup: float = _option(0.05, "share of the run over which the learning rate rises")
    weight_decay: float = _option(0.05, "of AdamW")
    clip: float = _option(1.0, "largest norm of the gradients; 0: any")
    w_cut: float = _option(20.0, "weight of the token cut loss")
    cut_warmup: float = _option(0.0, "share of the run over which that weight rises from 0")
    w_kd: float = _option(10.0, "weight of the distance to the dense model's classes")
    w_feat: float = _option(1000.0, "weight of the distance to the dense model's class features")
    mixup: float = _option(0.8, "strength of mixup; 0: none")
    cutmix: float = _option(1.0, "strength of cutmix; 0: none")
    smoothing: float = _option(0.1, "label smoothing")
    ema: float = _option(0.99996, "decay of the averaged weights, reached slowly from 0; 0: no averaging")
    train_all: bool = _option(False, "train class token and positions too")
    amp: bool = _option(False, "compute in bfloat16 where that is safe")
    compile: bool = _option(False, "compile teacher and student")
    seed: int = _option(0, "another seed, another order and augmentation")

    def __post_init__(self) -> None:
        for name, least, most in (
            ("epochs", 1, None), ("steps", 0, None), ("accumulate", 1, None), ("lr", 0, None), ("min_lr", 0, None),
            ("warmup", 0, 1), ("weight_decay", 0, None), ("clip", 0, None), ("w_cut", 0, None), ("cut_warmup", 0, 1),
            ("w_kd", 0, None), ("w_feat", 0, None), ("mixup", 0, None), ("cutmix", 0, None), ("smoothing", 0, 1),
            ("ema", 0, 1), ("seed", 0, None),
        ):  # fmt: skip
            value = getattr(self, name)
            if not (value >= least and (most is None or value <= most)):
                bounds = f"at least {least}" if most is None else f"between {least} and {most}"
                raise InputError(f"settings: {name} is {value}; expected {bounds}")

    def rate(self, images: int) -> float:
        """The highest learning rate, for steps of so many images."""
        return self.lr or REFERENCE_LR * images / REFERENCE_BATCH

    def cut_weight(self, step: int, steps: int) -> float:
        """The weight of the cut loss in a step of a run."""
        rising = self.cut_warmup * steps
        return self.w_cut * min(1.0, (step + 1) / rising) if rising else self.w_cut


def names() -> list[str]:
    """Of all settings."""
    return [each.name for each in fields(Settings)]
