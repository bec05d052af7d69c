"""What a message tells its reader."""

import re
from collections.abc import Callable
from typing import Any

import pytest

import idlefx


def says(message: str, *words: str) -> bool:
    """Whether every one of these patterns is found, in capitals or not."""
    return all(re.search(word, message, re.IGNORECASE) for word in words)


def refusal(function: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    """What is said when such a call is refused."""
    with pytest.raises(idlefx.IdleFxError) as caught:
        function(*arguments, **options)
    return str(caught.value)
