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
    "RECIPES": "targetclip.recipes",
    "ClipEmbedder": "targetclip.embedder",
    "Direction": "predictor",
    "EssenceTransfer": "predictor",
    "Generator": "targetclip.generators",
    "ImageEmbedder": "targetclip.embedder",
    "Recipe": "targetclip.recipes",
    "Scene": "targetclip.scene",
    "Text": "predictor",
    "consistency_loss": "targetclip.losses",
    "load_essence": "predictor",
    "load_generator": "targetclip.generators",
    "load_scene": "targetclip.world",
    "load_world": "targetclip.world",
    "mixed": "predictor",
    "optimize_directions": "targetclip.optimize",
    "transfer_loss": "targetclip.losses",
}
__all__ = [
    "RECIPES",
    "ClipEmbedder",
    "Direction",
    "EssenceTransfer",
    "Generator",
    "ImageEmbedder",
    "Recipe",
    "Scene",
    "Text",
    "consistency_loss",
    "load_essence",
    "load_generator",
    "load_scene",
    "load_world",
    "mixed",
    "optimize_directions",
    "transfer_loss",
]


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__, "__version__"])


if not TYPE_CHECKING:  # a type checker knows the names, and that there are no others

    def __getattr__(name: str) -> Any:
        if name == "__version__":
            return import_module("importlib.metadata").version("targetclip")
        if name not in EXPORTS:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(EXPORTS[name]), name)
