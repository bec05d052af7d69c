"""Idle tokens by their definition, in anybody's eager modules; imports torch alone, and nothing of the package.

`resting` hides tokens that rest from attention; `groups` says who follows whom, and `following` runs a stage on groups.
"""

from idlefx.zoo.reference.resting import Answer, Attention, Core, Tokens, idle, kept_tokens, look, scores

__all__ = ["Answer", "Attention", "Core", "Tokens", "idle", "kept_tokens", "look", "scores"]
