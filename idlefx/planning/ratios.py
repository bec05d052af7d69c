"""How many tokens a keep ratio comes to."""

import math


def kept_tokens(keep: float, tokens: int) -> int:
    """K of M image tokens: `max(1, floor(keep * M))`, safe against the last bit of the product."""
    return max(1, math.floor(keep * tokens + 1e-9))
