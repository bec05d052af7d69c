"""Private Vision Transformers nobody has seen: one tiny model, whose parts are spelled as a `Config` says."""

from tests.models.generated.config import CHOICES, Config
from tests.models.generated.habits import set_modes, wrap
from tests.models.generated.vit import ViT, build, inputs, randomise

__all__ = ["CHOICES", "Config", "ViT", "build", "inputs", "randomise", "set_modes", "wrap"]
