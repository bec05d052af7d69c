"""Token idling written from its definition, without a look at the passes: what conversions are compared with.

1. `reference` runs a timm model with only the working tokens in each block.
2. `masked` lets all tokens through, hides the idle ones and puts them back, with the token cut loss.
3. `generated_reference` hides them in the models of `tests.models.generated`; `masked_generated` adds the loss.
4. `zoo`, which is `idlefx.zoo.reference`, hides them in any model by its attention calls.
5. `segments` runs the towers of `tests.models.packed`, whose attention is over segments.
6. `following` groups tokens that follow and runs a stage on the means of the groups: `following_generated` in the
   models of `tests.models.generated`, `following_zoo` in any model by its attention calls.

The zoo command ships `zoo`, `following` and `following_zoo`.
"""

from idlefx.zoo import reference as zoo
from idlefx.zoo.reference import following as following_zoo
from idlefx.zoo.reference import groups as following

__all__ = ["following", "following_zoo", "zoo"]
