"""Idle tokens by their definition, in anybody's eager modules; imports torch alone, and nothing of the package.

`looking` finds out where tokens stand, `resting` hides from attention those that rest; `groups` says who follows whom,
and `following` runs a stage on groups.
"""

from idlefx.zoo.reference.attention import Attention, Core
from idlefx.zoo.reference.looking import Tokens, look
from idlefx.zoo.reference.resting import Answer, idle, kept_tokens, scores

__all__ = ["Answer", "Attention", "Core", "Tokens", "idle", "kept_tokens", "look", "scores"]
