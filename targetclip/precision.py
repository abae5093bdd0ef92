"""Half precision where it pays. Knows devices; nothing of what is computed."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


def plain_attention(device: torch.device) -> AbstractContextManager[Any]:
    """On a CPU in half precision the backward pass of fused attention is the slower one."""
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()


@contextmanager
def in_bfloat16(device: torch.device) -> Iterator[None]:
    """Compute convolutions, matrix products and attention in bfloat16; weights stay as they are."""
    with torch.autocast(device.type, torch.bfloat16), plain_attention(device):
        yield
