"""Image-guided essence transfer (TargetCLIP): generators, embedders, losses and the optimizer.

Knows nothing of datasets, training or files of pairs.
"""

from targetclip.editing import apply_direction, score_edit
from targetclip.embedder import ClipEmbedder, ImageEmbedder
from targetclip.generators import Generator, load_generator
from targetclip.losses import consistency_loss, transfer_loss
from targetclip.optimize import optimize_directions
from targetclip.recipes import RECIPES, Recipe
from targetclip.world import load_parts, load_world

__all__ = [
    "RECIPES",
    "ClipEmbedder",
    "Generator",
    "ImageEmbedder",
    "Recipe",
    "apply_direction",
    "consistency_loss",
    "load_generator",
    "load_parts",
    "load_world",
    "optimize_directions",
    "score_edit",
    "transfer_loss",
]
