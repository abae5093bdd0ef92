"""The product: essence transfer as people use it, in Python and on the command line."""

from predictor.transfer import Direction, EssenceTransfer

__all__ = ["Direction", "EssenceTransfer"]
