"""The product: essence transfer as people use it, in Python and on the command line.

Names are imported when they are asked for, so that a command answers before torch is there.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from predictor.direction import Direction, mixed
    from predictor.inputs import Text
    from predictor.transfer import EssenceTransfer, load_essence

Mode = Literal["instant", "auto", "refine", "optimize"]
"""How a direction is found; see `EssenceTransfer.direction`."""

EXPORTS = {
    "Direction": "direction",
    "EssenceTransfer": "transfer",
    "Text": "inputs",
    "load_essence": "transfer",
    "mixed": "direction",
}
__all__ = ["Direction", "EssenceTransfer", "Mode", "Text", "load_essence", "mixed"]

if not TYPE_CHECKING:  # a type checker knows the names, and that there are no others

    def __getattr__(name: str) -> Any:
        if name not in EXPORTS:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"{__name__}.{EXPORTS[name]}"), name)
