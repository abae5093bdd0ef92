"""Image-guided essence transfer (TargetCLIP): the product's main names, and those of the method.

Names are imported when they are asked for, so that a command answers before torch is there. The
product's come from `predictor`, which uses this package: only this list knows of it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from predictor import Direction, EssenceTransfer, Text, load_essence, mixed
    from targetclip.embedder import ClipEmbedder, ImageEmbedder
    from targetclip.generators import Generator, load_generator
    from targetclip.losses import consistency_loss, transfer_loss
    from targetclip.optimize import optimize_directions
    from targetclip.recipes import RECIPES, Recipe
    from targetclip.scene import Scene
    from targetclip.world import load_scene, load_world

    __version__: str

EXPORTS = {
    "predictor": ("Direction", "EssenceTransfer", "Text", "load_essence", "mixed"),
    "targetclip.embedder": ("ClipEmbedder", "ImageEmbedder"),
    "targetclip.generators": ("Generator", "load_generator"),
    "targetclip.losses": ("consistency_loss", "transfer_loss"),
    "targetclip.optimize": ("optimize_directions",),
    "targetclip.recipes": ("RECIPES", "Recipe"),
    "targetclip.scene": ("Scene",),
    "targetclip.world": ("load_scene", "load_world"),
}
HOMES = {name: module for module, names in EXPORTS.items() for name in names}
__all__ = [
    "RECIPES", "ClipEmbedder", "Direction", "EssenceTransfer", "Generator", "ImageEmbedder",
    "Recipe", "Scene", "Text", "consistency_loss", "load_essence", "load_generator", "load_scene",
    "load_world", "mixed", "optimize_directions", "transfer_loss",
]  # fmt: skip


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__, "__version__"])


if not TYPE_CHECKING:  # a type checker knows the names, and that there are no others

    def __getattr__(name: str) -> Any:
        if name == "__version__":
            metadata = import_module("importlib.metadata")
            try:
                return metadata.version("targetclip")
            except metadata.PackageNotFoundError:  # run from a checkout, as a Space does
                return "not installed"
        if name not in HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(HOMES[name]), name)
