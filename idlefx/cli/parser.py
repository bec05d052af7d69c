"""The parser of every command: the help it shows, how it refuses, and how it reads lists of numbers."""

import argparse
from collections.abc import Sequence
from itertools import takewhile
from typing import Any, NoReturn

KINDS: dict[type[int] | type[float], str] = {int: "whole number", float: "number"}


class Help(argparse.HelpFormatter):
    """Help that ends each option's text with its default, where there is one that says something."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        plain_switch = action.const is True and action.default is False
        mute = plain_switch or action.default in (None, "", [], {}, argparse.SUPPRESS)
        if action.help is None or mute or "%(default)" in action.help:
            return action.help
        return f"{action.help} (default: {_shown(action.default)})"


class Parser(argparse.ArgumentParser):
    """A parser that refuses with the usage of the very command that is meant, and says where to look."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"formatter_class": Help, **options})

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parse, and refuse here what is unknown: the parser around a command would show its own usage for it."""
        options, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return options, unknown

    def error(self, message: str) -> NoReturn:
        """Show usage and message, and exit with 2."""
        super().error(f"{message}; `{self.prog} --help` explains all arguments")


class Numbers(argparse.Action):
    """An option that takes a list of numbers, `3 6 9` or `3,6,9`.

    The list ends at the first word that is no number. What follows is left to `images`, if the command takes some.

    Args:
        kind: Of the numbers.
        nargs: "+", or "*" if the list may be empty.
        **options: As of any argument.
    """

    def __init__(self, *, kind: type[int] | type[float] = int, nargs: str | None = None, **options: Any) -> None:
        super().__init__(nargs=nargs or "+", **options)
        self.kind = kind

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, *_: Any) -> None:
        """Put the numbers, and the images behind them, in their places."""
        words = list(takewhile(_holds_numbers, values))
        images = values[len(words) :]
        if images and (not hasattr(namespace, "images") or (self.nargs == "+" and not words)):
            raise argparse.ArgumentError(self, _complaint(images[0], self.kind))
        try:
            setattr(namespace, self.dest, self.read(words))
        except argparse.ArgumentTypeError as error:
            raise argparse.ArgumentError(self, str(error)) from None
        if images:
            namespace.images = [*namespace.images, *images]

    def read(self, words: Sequence[str]) -> Any:
        """The value of the option."""
        return numbers(",".join(words), self.kind)


class NumberLists(Numbers):
    """An option that takes several lists: commas join the numbers of one, spaces part one list from the next."""

    def read(self, words: Sequence[str]) -> Any:
        """A list for each word."""
        return [numbers(word, self.kind) for word in words]


class CountOrPositions(Numbers):
    """An option whose lone number `2` is a count, and whose list `0 2`, `0,2` or `2,` holds positions."""

    def read(self, words: Sequence[str]) -> Any:
        """A number, 0 where nothing is named, or a list."""
        text = ",".join(words)
        read = numbers(text, self.kind)
        return read if "," in text else next(iter(read), 0)


def numbers(text: str, kind: type[int] | type[float]) -> list[Any]:
    """The numbers of `3,6,9`.

    Raises:
        ArgumentTypeError: One is no number of that kind.
    """
    read: list[Any] = []
    for word in filter(None, text.split(",")):
        try:
            read.append(kind(word))
        except ValueError:
            raise argparse.ArgumentTypeError(_complaint(word, kind)) from None
    return read


def flag(name: str) -> str:
    """How an option is spelled in a shell."""
    return "--" + name.replace("_", "-")


def add_switch(parser: Any, name: str, default: bool, text: str) -> None:
    """An option that is on or off."""
    parser.add_argument(flag(name), action=argparse.BooleanOptionalAction, default=default, help=text)


def add_renamed(parser: Any, name: str, former: str, **options: Any) -> None:
    """An option that had another name, which scripts go on using and the help does not mention."""
    action = parser.add_argument(name, **options)
    hidden = {"dest": action.dest, "default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
    parser.add_argument(former, **{**options, **hidden})


def _holds_numbers(word: str) -> bool:
    try:
        return bool([float(part) for part in word.split(",") if part])
    except ValueError:
        return False


def _complaint(word: str, kind: type[int] | type[float]) -> str:
    return (
        f"{word!r} is no {KINDS[kind]}; a list is written {'3 6 9 or 3,6,9' if kind is int else '0.7 0.5 or 0.7,0.5'}"
    )


def _shown(default: Any) -> str:
    """A default as it would be typed."""
    if isinstance(default, list):
        return " ".join(",".join(map(str, part)) if isinstance(part, list) else str(part) for part in default)
    return f"{default:g}" if isinstance(default, float) else str(default)
