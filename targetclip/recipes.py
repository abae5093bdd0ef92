"""Recipes: named settings of the optimizer, among them those of the paper and of its release.

Knows settings only, and imports no torch.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

from targetclip.command import did_you_mean

Preprocess = Literal["release", "consistent"]
"""How images are resized and normalised for the encoder; see `targetclip.embedder`."""
Differences = Literal["unit", "raw"]
"""Whether consistency compares differences of unit or of raw embeddings."""
Initial = Literal["inversion", "random", "zero"]


@dataclass(frozen=True)
class Recipe:
    """All settings of a search, except the seed and the bank of sources."""

    sources: int
    """Sources edited at every step."""
    fresh_sources: bool
    """Draw sources from the bank anew at every step. False: use its first ones throughout."""
    steps: int
    learning_rate: float
    """Highest rate of Adam; `optimize.learning_rate` gives the schedule."""
    transfer_weight: float
    consistency_weight: float
    differences: Differences
    weight_decay: float
    """Of Adam: adds the gradient of weight_decay/2 |direction|^2."""
    preprocess: Preprocess
    """Of generated images."""
    target_preprocess: Literal["encoder", "same"]
    """Of the target: as the encoder's own library does it, or the same as of generated images."""
    initial: Initial
    """Where the direction starts: the target's latent, a random latent, or zero."""
    coefficients: bool = False
    """Scale the direction by a learned factor for each source (release)."""
    keep: Literal["best", "last"] = "last"
    """Return the direction of the lowest loss, or the last one."""
    identity_weight: float = 0.0
    """Of the identity loss, which is not in the paper and needs an identity model."""
    tied_layers: bool = False
    """Search one w_dim vector for all layers (a direction in W) instead of one for each (W+)."""
    render_size: int | None = None
    """Size in px of the images that a search renders, by a generator that can end at a coarser
    level. None: the generator's own."""
    patience: int | None = None
    """Stop a target whose smoothed loss has not improved by 0.001 for this number of steps."""

    def __post_init__(self) -> None:
        if self.coefficients and self.fresh_sources:
            raise ValueError("coefficients belong to fixed sources: set fresh_sources=False")
        if min(self.sources, self.steps) < 1:
            raise ValueError(
                f"expected at least 1 source and 1 step, found {self.sources} and {self.steps}"
            )
        if not 0 <= self.identity_weight < math.inf:
            raise ValueError(f"expected an identity weight from 0 on, found {self.identity_weight}")


RECIPES: dict[str, Recipe] = {
    # The final released code, with its quirks: the target is normalised for CLIP, the generated
    # images are not; each source has a coefficient whose Adam is made anew at every step.
    "release": Recipe(
        sources=4,
        fresh_sources=False,
        steps=1000,
        learning_rate=0.2,
        transfer_weight=1.0,
        consistency_weight=0.5,
        differences="unit",
        weight_decay=3e-3,
        preprocess="release",
        target_preprocess="encoder",
        initial="inversion",
        coefficients=True,
        keep="best",
    ),
    # The first version of the paper: one preprocessing for all, random start, no coefficients.
    "paper": Recipe(
        sources=6,
        fresh_sources=False,
        steps=1000,
        learning_rate=0.2,
        transfer_weight=1.0,
        consistency_weight=0.6,
        differences="raw",
        weight_decay=3e-3,
        preprocess="release",
        target_preprocess="same",
        initial="random",
        keep="best",
    ),
    # Not in the paper: every step edits fresh sources, target and images are preprocessed alike,
    # and the start is neutral. A smaller decay brings more essence and loses more identity. With a
    # larger consistency weight edits are longer, until sources look alike (CHANGELOG).
    "consistent": Recipe(
        sources=6,
        fresh_sources=True,
        steps=150,
        learning_rate=0.2,
        transfer_weight=1.0,
        consistency_weight=0.2,
        differences="unit",
        weight_decay=1e-2,
        preprocess="consistent",
        target_preprocess="encoder",
        initial="zero",
    ),
}
# With an identity loss, as StyleCLIP's mapper has one, twice the identity is kept for the same
# essence. A smaller decay raises the transfer score, hardly the essence, and loses identity (on
# the 64 px world of drawn faces that was bundled before).
RECIPES["identity"] = replace(RECIPES["consistent"], identity_weight=0.15)


def recipe_named(name: str, where: str = "--recipe") -> Recipe:
    """Return a recipe. ValueError: no such name; the message begins with `where`."""
    if name not in RECIPES:
        hint = did_you_mean(name, RECIPES)
        raise ValueError(f"{where}: expected one of {', '.join(RECIPES)}, found {name!r}{hint}")
    return RECIPES[name]
