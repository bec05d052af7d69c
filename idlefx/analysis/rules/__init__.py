"""The rules by which the token axis is followed, by operation."""
