"""The options of a plan, as Python, the shell, the backend, checkpoints and artifacts all speak of them."""

import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any, Literal, get_args

from idlefx.errors import PlanError

Schedule = Literal["stages", "blocks"]
SCHEDULES: tuple[str, ...] = get_args(Schedule)
Idle = Literal["rest", "follow"]
IDLES: tuple[str, ...] = get_args(Idle)
Unit = Literal["auto", "windows", "tokens"]
UNITS: tuple[str, ...] = get_args(Unit)
AUTO = "auto"
SELECTORS = (AUTO, "class", "mean", "norm", "random")  # those that are built in


@dataclass(frozen=True)
class PlanOptions:
    """Which tokens idle in which blocks, as a user says it; the model decides the rest.

    Lists of any kind become tuples, and numbers of any library plain ones, so that two records that mean the same are
    equal. `convert(model, plan=options)` does what the options say, and so does `convert(model, **options)`.

    Attributes:
        layers: Block indices, from 0 in execution order: where stages begin, or with `schedule="blocks"` exactly the
            blocks that idle.
        keep: Share of the image tokens that works, in (0, 1]; several give each entry of `layers` its own. With
            "stages" one ratio compounds: stage s keeps `keep ** (s + 1)` in every block of it.
        schedule: "stages" or "blocks".
        selector: Name of the token score; "auto" takes the logits of the class token, or of the mean query.
        reselect: Whether a token that idles may work again in a later block. Where tokens follow, False keeps those
            together that are in one group: later stages join whole groups.
        multiple_of: P + K, the tokens that work, is raised to a multiple of it.
        prefix: Number of leading prefix tokens, or their positions; found if None.
        idle: What idle tokens do meanwhile: "rest", unchanged, or "follow" the worker most like them.
        unit: What idles where attention is over windows: whole "windows", or "tokens" in each; "auto" takes tokens
            where there are fewer than 16 windows, or where tokens follow.

    Raises:
        PlanError: A value is of the wrong kind or out of its range, whatever the model; or the tokens follow, and it
            is said how they are scored, which only resting knows.
    """

    layers: Sequence[int]
    keep: float | Sequence[float]
    schedule: Schedule = "stages"
    selector: str = AUTO
    reselect: bool = True
    multiple_of: int = 1
    prefix: int | Sequence[int] | None = None
    idle: Idle = "rest"
    unit: Unit = "auto"

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise PlanError(f"plan: unknown schedule {self.schedule!r}; known are {', '.join(SCHEDULES)}")
        if self.idle not in IDLES:
            raise PlanError(f"plan: unknown idle={self.idle!r}; idle tokens either {' or '.join(IDLES)}")
        if self.unit not in UNITS:
            raise PlanError(f"plan: unknown unit={self.unit!r}; known are {', '.join(UNITS)}")
        if not isinstance(self.selector, str):
            raise PlanError(f"plan: selector={self.selector!r} is no name; register a score with idlefx.selector")
        if not isinstance(self.reselect, bool):
            raise PlanError(f"plan: reselect={self.reselect!r} is neither True nor False")
        if not _is_whole(self.multiple_of) or self.multiple_of < 1:
            raise PlanError(f"plan: multiple_of={self.multiple_of!r} is no whole number from 1; 8 suits most kernels")
        if self.idle == "follow" and self.selector != AUTO:
            raise PlanError(
                f"plan: selector={self.selector!r} scores tokens that rest; with idle='follow' those idle that "
                "are most like others, so leave the selector out, or take idle='rest'"
            )
        layers = _plain_layers(self.layers)
        plain = {"layers": layers, "keep": _plain_keep(self.keep, len(layers)), "prefix": plain_prefix(self.prefix)}
        for name, value in plain.items():
            object.__setattr__(self, name, value)

    def keys(self) -> Iterator[str]:
        """Names of the options: with them and `[name]`, `**options` gives all of them to a function."""
        return (each.name for each in fields(PlanOptions))

    def __getitem__(self, name: str) -> Any:
        if name not in self.keys():
            raise KeyError(name)
        value = getattr(self, name)
        return list(value) if isinstance(value, tuple) else value

    def to_dict(self) -> dict[str, Any]:
        """Plain data, which JSON keeps as it is."""
        return dict(self)

    @classmethod
    def from_dict(cls, told: Mapping[str, Any]) -> "PlanOptions":
        """The options that `to_dict` told; those that have a default may be left out.

        Raises:
            PlanError: An option is unknown, missing or wrong.
        """
        known = [each.name for each in fields(PlanOptions)]
        if unknown := [name for name in told if name not in known]:
            raise PlanError(f"plan: unknown options {unknown}; known are {', '.join(known)}")
        if missing := [name for name in ("layers", "keep") if name not in told]:
            raise PlanError(f"plan: options lack {' and '.join(missing)}; give for example layers=[3, 6, 9], keep=0.7")
        return cls(**told)


def plain_prefix(prefix: int | Sequence[int] | None) -> int | tuple[int, ...] | None:
    """A number of leading prefix tokens, or positions, in plain numbers of Python.

    Raises:
        PlanError: It is neither.
    """
    if prefix is None:
        return None
    try:
        if isinstance(prefix, bool) or (isinstance(prefix, Iterable) and any(isinstance(p, bool) for p in prefix)):
            raise TypeError
        return tuple(map(operator.index, prefix)) if isinstance(prefix, Iterable) else operator.index(prefix)
    except TypeError:
        raise PlanError(f"plan: prefix={prefix!r} is neither a number of leading tokens nor their positions") from None


def _is_whole(number: object) -> bool:
    return isinstance(number, int) and not isinstance(number, bool)


def _plain_layers(layers: object) -> tuple[int, ...]:
    if not isinstance(layers, (list, tuple, range)) or not all(map(_is_whole, layers)):
        raise PlanError(f"plan: layers={layers!r} is not a list of whole numbers; name block indices such as [3, 6, 9]")
    if not layers:
        raise PlanError("plan: layers is empty; name at least one block")
    for index in layers:
        if layers.count(index) > 1:
            raise PlanError(f"plan: block {index} is listed twice in layers={list(layers)}; list it once")
    return tuple(layers)


def _plain_keep(keep: object, layers: int) -> float | tuple[float, ...]:
    if isinstance(keep, Real):
        return _plain_ratio(keep)
    if not isinstance(keep, (list, tuple)):
        raise PlanError(f"plan: keep={keep!r} is neither a ratio nor a list of ratios")
    if len(keep) != layers:
        raise PlanError(f"plan: keep holds {len(keep)} ratios but layers {layers} blocks; give one ratio, or one each")
    return tuple(map(_plain_ratio, keep))


def _plain_ratio(ratio: object) -> float:
    if isinstance(ratio, bool) or not isinstance(ratio, Real) or not 0 < float(ratio) <= 1:
        raise PlanError(f"plan: keep={ratio!r} is not in (0, 1]; 0.7 keeps 70 % of the image tokens, 1.0 all of them")
    return float(ratio)
