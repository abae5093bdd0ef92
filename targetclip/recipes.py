"""Recipes: the settings of the optimizer, those of the paper and of its release among them."""

import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, replace
from typing import Any, Literal

Preprocess = Literal["release", "consistent"]
"""How generated images reach the encoder: as the release shows them, or as it was trained."""
Differences = Literal["unit", "raw"]
"""Consistency compares differences of unit or of raw embeddings."""
Initial = Literal["inversion", "random", "zero"]


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what a direction comes out as, but for the seed and the sources."""

    sources: int
    """Sources edited at every step."""
    fresh_sources: bool
    """Draw them anew from the bank at every step, or keep its first ones throughout."""
    steps: int
    learning_rate: float
    """Of Adam, at its highest (see `learning_rate`)."""
    transfer_weight: float
    consistency_weight: float
    differences: Differences
    """Consistency between differences of unit or of raw embeddings."""
    weight_decay: float
    """Of Adam: the gradient of weight_decay/2 |direction|^2, added inside it."""
    preprocess: Preprocess
    """How generated images reach the encoder."""
    target_preprocess: Literal["encoder", "same"]
    """How the target reaches it: as the encoder's own library does, or as generated images do."""
    initial: Initial
    """What the direction starts from."""
    coefficients: bool = False
    """Scale the direction by a learned factor for each source (release)."""
    keep: Literal["best", "last"] = "last"
    """Return the direction of the lowest loss, or the last one."""
    identity_weight: float = 0.0
    """Of the identity loss, which is ours and needs an identity model."""
    tied_layers: bool = False
    """One w_dim vector for all layers (a direction in W) instead of one each (W+)."""
    patience: int | None = None
    """Stop a target whose smoothed loss has not improved by 0.001 for so many steps."""

    def __post_init__(self) -> None:
        if self.coefficients and self.fresh_sources:
            raise ValueError("coefficients belong to fixed sources: set fresh_sources=False")
        if min(self.sources, self.steps) < 1:
            raise ValueError(
                f"expected at least 1 source and 1 step, found {self.sources} and {self.steps}"
            )
        if not 0 <= self.identity_weight < math.inf:
            raise ValueError(f"expected an identity weight from 0 on, found {self.identity_weight}")


def with_defaults(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a file says of a recipe; what it does not say was not there to be chosen, and is as it
    is by default."""
    defaults = {each.name: each.default for each in fields(Recipe) if each.default is not MISSING}
    return {**settings, **{name: v for name, v in defaults.items() if name not in settings}}


def stored_recipe(settings: Mapping[str, Any]) -> Recipe:
    """A recipe from what a file says of it, with defaults for what it does not.

    Raises:
        ValueError: settings that are unknown here, or that cannot be.
    """
    try:
        return Recipe(**settings)
    except TypeError as error:
        raise ValueError(f"a recipe unknown here: {error}") from error


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
    # Ours: every step meets fresh sources, target and images are preprocessed alike, the start is
    # neutral. Decay decides between essence and identity: a third of it brings more of both the
    # target and its background. A heavy consistency loss asks for long edits, in which the
    # differences between sources vanish, and identity with them (CHANGELOG).
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
# Ours too: a loss that looks at who is on the picture, as StyleCLIP's mapper has one, keeps twice
# the identity for the same essence. With less decay the transfer score still rises, but what the
# attribute reader sees hardly does, and identity is lost (docs/teacher.md).
RECIPES["identity"] = replace(RECIPES["consistent"], identity_weight=0.15)
