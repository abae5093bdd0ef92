"""Image-guided essence transfer (TargetCLIP): generators, embedders, losses and the optimizer.

Knows nothing of datasets, training or files of pairs. Names are imported when they are asked for,
so that a command answers before torch is there.
"""

from importlib import import_module
from typing import Any

EXPORTS = {
    "RECIPES": "recipes",
    "ClipEmbedder": "embedder",
    "Generator": "generators",
    "ImageEmbedder": "embedder",
    "Recipe": "recipes",
    "Scene": "scene",
    "consistency_loss": "losses",
    "load_generator": "generators",
    "load_scene": "world",
    "load_world": "world",
    "optimize_directions": "optimize",
    "transfer_loss": "losses",
}
__all__ = sorted(EXPORTS)


def __getattr__(name: str) -> Any:
    if name not in EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{EXPORTS[name]}"), name)
