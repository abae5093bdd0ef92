"""Shim: use targetclip.directions."""

from targetclip.directions import RELEASED_SUFFIXES as SUFFIXES
from targetclip.directions import read_released, released_direction, released_latents

__all__ = ["SUFFIXES", "read_released", "released_direction", "released_latents"]
