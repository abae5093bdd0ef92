"""Sizes of the random networks that are timed and counted, as flags; torch is not imported."""

from dataclasses import dataclass

from targetclip.recipes import RECIPES


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of a generator and an embedder. Default: StyleGAN2's config-f at 256 px, ViT-B/32."""

    resolution: int = 256
    channels: tuple[int, ...] = (512, 512, 512, 512, 512, 256, 128)
    """Widths at 4, 8, ... `resolution` px."""
    w_dim: int = 512
    mapping_layers: int = 8
    clip: str = "ViT-B-32"
    """A model of open_clip, or local-dir:FOLDER; its sizes are used, never its weights."""
    sources: int = RECIPES["release"].sources
    """Sources that a step of the optimizer edits."""
    max_images: int | None = None
    """Images rendered at once; fewer than `sources` bounds memory and renders twice. Default: all
    of a step."""
