"""A plan that was made for one model: its options, and the sizes by which another model is told apart."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from itertools import groupby
from pathlib import Path
from typing import Any

from idlefx.errors import InputError, PlanError
from idlefx.options import PlanOptions
from idlefx.records import Block, BlockTable

Size = tuple[int, int, int]  # N tokens, P of them prefix, and C features of a block


@dataclass(frozen=True)
class ModelPlan(PlanOptions):
    """Options that serve one model; `convert` refuses them for another.

    Attributes:
        model: What the model is called, for people.
        sizes: Tokens, prefix tokens and width of each of its blocks.
    """

    model: str = ""
    sizes: tuple[Size, ...] = ()

    def check(self, blocks: BlockTable) -> None:
        """See whether a model is like the one that the plan was made for.

        Raises:
            PlanError: Its blocks are of other sizes.
        """
        found = sizes_of(blocks)
        if self.sizes and found != self.sizes:
            raise PlanError(
                f"plan: it was made for {self.model or 'another model'}, which has {_in_words(self.sizes)}, but this "
                f"model has {_in_words(found)}; make a plan for this one, with idlefx.plan or `python -m idlefx plan`"
            )

    def to_json(self) -> str:
        """What `read_plan` reads."""
        return json.dumps({"plan": self.to_dict(), **self.told()}, indent=1)

    def told(self) -> dict[str, Any]:
        """What stands in a file beside the options."""
        return {"model": self.model, "sizes": [list(size) for size in self.sizes]}


def read_plan(path: str | Path) -> ModelPlan:
    """The plan that `idlefx.plan` or `python -m idlefx plan` wrote.

    Raises:
        InputError: The file cannot be read or is none of its kind.
        PlanError: One of its options is wrong.
    """
    try:
        told = json.loads(Path(path).read_text())
        options, model = PlanOptions.from_dict(told["plan"]), str(told["model"])
        sizes = tuple(_size(*size) for size in told["sizes"])
    except OSError as error:
        raise InputError(f"plan file: cannot read {path}: {error.strerror}") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(
            f"plan file: {path} is no plan that `python -m idlefx plan` wrote ({type(error).__name__}: {error})"
        ) from error
    return for_model(options, model, sizes)


def for_model(options: PlanOptions, model: str, sizes: Iterable[Size]) -> ModelPlan:
    """Options, with the model that they were made for."""
    return ModelPlan(**options, model=model, sizes=tuple(sizes))


def sizes_of(blocks: Iterable[Block]) -> tuple[Size, ...]:
    """By what two models are told apart."""
    return tuple((block.tokens, len(block.prefix), block.width) for block in blocks)


def plain(plan: PlanOptions) -> PlanOptions:
    """The options alone, whatever came with them."""
    return PlanOptions(**plan)


def given_plan(plan: PlanOptions | None, asked: Mapping[str, Any]) -> PlanOptions:
    """What a conversion is to do: a plan, or else options one by one.

    Args:
        plan: All options at once.
        asked: Options by name; those that are None, or what they are by default, were not asked for.

    Raises:
        PlanError: Both are there, neither is, or an option is wrong.
    """
    defaults = {each.name: each.default for each in fields(PlanOptions)}
    given = {name: value for name, value in asked.items() if value is not None}
    if plan is None:
        return PlanOptions.from_dict(given)
    if not isinstance(plan, PlanOptions):
        raise PlanError(
            f"plan: plan={plan!r} is no plan; give PlanOptions, what idlefx.plan returns, or the options one by one"
        )
    if twice := [name for name, value in given.items() if value != defaults[name]]:
        raise PlanError(
            f"plan: plan= holds all options, so {' and '.join(twice)} cannot be told beside it; leave that out, or "
            "change the plan with dataclasses.replace"
        )
    return plan


def _size(tokens: int, prefix: int, width: int) -> Size:
    return int(tokens), int(prefix), int(width)


def _in_words(sizes: Iterable[Size]) -> str:
    runs = [(len(list(run)), size) for size, run in groupby(sizes)]
    return ", ".join(
        f"{count} block{'s' * (count != 1)} of {tokens} tokens ({prefix} prefix) and width {width}"
        for count, (tokens, prefix, width) in runs
    )
