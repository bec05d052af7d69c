"""What a message tells its reader."""

import re


def says(message: str, *words: str) -> bool:
    """Whether every one of these patterns is found, in capitals or not."""
    return all(re.search(word, message, re.IGNORECASE) for word in words)
