"""Token idling written from its definition, without a look at the passes: what conversions are compared with.

`reference` runs a timm model with only the working tokens in each block; `masked` lets all tokens through and hides
the idle ones, with the token cut loss; `generated_reference` does so for the models of `tests.models.generated`. The
fourth, `zoo`, is `idlefx.zoo.reference`: it masks any model by its attention calls, and ships with the zoo command.
"""

from idlefx.zoo import reference as zoo

__all__ = ["zoo"]
