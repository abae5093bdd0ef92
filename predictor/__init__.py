"""The product: essence transfer as people use it, in Python and on the command line."""

from predictor.direction import Direction, mixed
from predictor.load import load_essence
from predictor.transfer import EssenceTransfer

__all__ = ["Direction", "EssenceTransfer", "load_essence", "mixed"]
