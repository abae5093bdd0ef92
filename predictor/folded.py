"""A mapper's answer to one target, in as few operations as it takes.

Knows how a mapper's layers follow each other; nothing of files, of training or of targets.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from predictor.mapper import Mapper


def tensors_of(module: nn.Module) -> list[Tensor]:
    """Copies of a module's parameters, in the order of its layers, weight before bias."""
    return [parameter.detach().clone() for parameter in module.parameters()]


class FoldedMapper:
    """The function of a mapper, as it was when this was made, for one target at a time.

    A single answer hardly waits for arithmetic, but for each operation to begin where caches are
    cold. So what follows each other linearly is one matrix here: the whitening with all that reads
    it, the heads side by side, and the scale with the matrix before it.
    """

    def __init__(self, mapper: Mapper) -> None:
        config = mapper.config
        self.check_size = mapper.check_size
        self.width, self.shape = config.width, (config.num_ws, config.w_dim)
        with torch.no_grad():
            reads = (mapper.enter.weight, mapper.linear.weight, mapper.score_linear.weight)
            first = torch.cat(reads) @ mapper.whitening.T
            added = (mapper.enter.bias, mapper.direction.bias, mapper.score.bias)
            offset = torch.cat(added) - first @ mapper.centre
            last = torch.cat((mapper.direction.weight, mapper.score.weight))
            scale = mapper.scale.flatten()
            if mapper.basis is None:
                first[self.width : -1] *= scale[:, None]
                offset[self.width : -1] *= scale
                last[:-1] *= scale[:, None]
                self.basis = None
            else:
                # The score, the last of the heads, is read past by a row of zeros.
                self.basis = F.pad((mapper.basis.weight * scale[:, None]).T, (0, 0, 0, 1))
            self.first, self.offset, self.last = first.T, offset, last.T.contiguous()
        # Tensors alone: a module looks each of its own up by name, which is felt here.
        self.blocks = [tensors_of(block) for block in mapper.blocks]
        self.norm, self.norm_bias = tensors_of(mapper.norm)

    def __call__(
        self, embedding: Float[Tensor, "1 embed"]
    ) -> tuple[Float[Tensor, "num_ws w_dim"], float]:
        """The direction of a target and the transfer score expected of it, from its embedding, raw
        or unit: as the mapper's forward, but for rounding.

        Raises:
            ValueError: an embedding of another size, or one that is not finite.
        """
        self.check_size(embedding)
        embedding = embedding.detach().float()
        length = math.sqrt(float(embedding @ embedding.T))
        if not math.isfinite(length):
            raise ValueError(f"expected an embedding of finite length, found one of {length}")
        part = 1 / max(length, 1e-12)
        entered = torch.addmm(self.offset, embedding, self.first, alpha=part)
        x, size = entered[:, : self.width], (self.width,)
        for norm, norm_bias, inner, inner_bias, outer, outer_bias in self.blocks:
            hidden = F.silu(F.linear(F.layer_norm(x, size, norm, norm_bias), inner, inner_bias))
            x = x + F.linear(hidden, outer, outer_bias)
        features = F.layer_norm(x, size, self.norm, self.norm_bias)
        heads = torch.addmm(entered[:, self.width :], features, self.last)
        direction = heads[:, :-1] if self.basis is None else heads @ self.basis
        return direction.float().view(self.shape), math.tanh(float(heads[0, -1]))
