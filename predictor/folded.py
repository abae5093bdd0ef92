"""The mapper's folded form, which answers one target at a time in as few operations as it takes.

A single answer spends its time on starting operations, not on arithmetic. So linear layers in a row
become one matrix: the whitening with the layers that read it, the heads side by side, and the scale
with the matrix before it. Answers equal the mapper's but for rounding.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from predictor.correction import Correction, SourceCorrection, joined_layers
from predictor.mapper import Mapper
from predictor.tradeoff import DEGREES

REMEMBERED = 8  # places on the trade-off whose folded form is kept


def transposed(matrix: Float[Tensor, "rows columns"]) -> Float[Tensor, "columns rows"]:
    """Return a transposed copy, which a file can hold."""
    return matrix.T.clone(memory_format=torch.contiguous_format)


class FoldedCorrection:
    """A copy of a mapper's correction, from the unit embedding of a target to its correction."""

    @torch.no_grad()
    def __init__(
        self,
        correction: Correction,
        centre: Float[Tensor, " embed"],
        whitening: Float[Tensor, "embed embed"],
        scale: Float[Tensor, "num_ws w_dim"],
    ) -> None:
        mean, deviation = (
            joined_layers(units, correction.reads)
            for units in (correction.mean, correction.deviation)
        )
        first = transposed(correction.source.weight / deviation)
        self.target = whitening @ correction.target.weight.T
        self.bias = correction.target.bias - centre @ self.target - mean @ first
        self.shared = {
            "first": first,
            "hidden": transposed(correction.hidden.weight),
            "hidden_bias": correction.hidden.bias.clone(),
            "mix": transposed(correction.mix.weight),
            "mix_bias": correction.mix.bias.clone(),
            "basis": transposed(correction.basis.weight * scale.flatten()[:, None]),
        }
        self.weights = torch.ones(1, len(scale), device=scale.device)
        layers = (correction.keep_enter, correction.keep_gain)
        self.keep = [transposed(layer.weight) for layer in layers if layer is not None]

    @torch.no_grad()
    def __call__(
        self, unit: Float[Tensor, "1 embed"], places: Float[Tensor, "1 degrees"] | None = None
    ) -> SourceCorrection:
        """Return the correction for a target, at a place on the trade-off where it is read."""
        bias, weights = self.bias, self.weights
        if places is not None:
            enter, gain = self.keep
            bias, weights = bias + places @ enter, weights + places @ gain
        biases = torch.addmm(bias, unit, self.target).float()
        return SourceCorrection(**self.shared, biases=biases, weights=weights)


@dataclass(frozen=True)
class Place:
    """What a folded mapper computes of a place on the trade-off, for all targets."""

    features: Float[Tensor, "1 degrees"] | None
    """See `Mapper.places`; None where the mapper reads none."""
    offset: Float[Tensor, " outputs"]
    """Bias of the first layer."""
    first: Float[Tensor, "outputs embed"]
    """What features, heads and, as the last head, the score read of the embedding."""
    last: Float[Tensor, "width heads"]
    """What heads read of features."""


class FoldedMapper:
    """A copy of a mapper that answers one target at a time; later changes do not reach it.

    Places on the trade-off have matrices of their own, which are made once for those in use.
    """

    def __init__(self, mapper: Mapper) -> None:
        def tensors_of(module: nn.Module) -> list[Tensor]:
            return [parameter.detach().clone() for parameter in module.parameters()]

        config = mapper.config
        self.check_size, self.places, self.keep = mapper.check_size, mapper.places, mapper.keep
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
                # A row of zeros leaves out the score, the last of the heads.
                self.basis = F.pad((mapper.basis.weight * scale[:, None]).T, (0, 0, 0, 1))
            self.first, self.offset, self.last = first, offset, last.T.contiguous()
            self.centre, self.keep_layers = mapper.centre.clone(), None
            if mapper.keep_enter is not None:
                self.keep_layers = self.folded_places(mapper)
        self.at = lru_cache(REMEMBERED)(self.place)
        # Plain tensors: a module finds its parameters by name at every call, which takes time here.
        self.blocks = [tensors_of(block) for block in mapper.blocks]
        self.norm, self.norm_bias = tensors_of(mapper.norm)
        self.corrections = None
        if mapper.correction is not None:
            units = (mapper.centre, mapper.whitening, mapper.scale)
            self.corrections = FoldedCorrection(mapper.correction, *units)

    @staticmethod
    def folded_places(mapper: Mapper) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return what shifts the first layer, what stretches all heads but the score, and both
        matrices of what is added to them, the first with the whitening."""
        assert mapper.keep_enter and mapper.keep_gain and mapper.keep_score
        assert mapper.keep_read and mapper.keep_heads, "they come together"
        gain, width = mapper.keep_gain.weight, mapper.config.width
        shift = mapper.keep_enter.weight, torch.zeros_like(gain), mapper.keep_score.weight
        added = mapper.keep_heads.weight
        if mapper.basis is None:
            added = added * mapper.scale.flatten()[:, None]
        read = (mapper.keep_read.weight / mapper.keep_units[0]).unflatten(1, (DEGREES, -1))
        read = torch.cat((read[..., :width], read[..., width:] @ mapper.whitening.T), dim=2)
        row = (0, 0, 0, 1)  # of the score
        return torch.cat(shift).T.clone(), F.pad(gain, row).T.clone(), read, F.pad(added, row)

    @torch.no_grad()
    def place(self, keep: float | None) -> Place:
        """Return what depends on a place on the trade-off alone. ValueError: see
        `Mapper.places`."""
        features = self.places(self.keep if keep is None else keep, 1)
        if features is None or self.keep_layers is None:
            return Place(None, self.offset, self.first, self.last)
        (shift, gain, read, added), width = self.keep_layers, self.width
        with torch.autocast(features.device.type, enabled=False):  # the next call may have another
            factor = F.pad(1 + (features @ gain)[0], (width, 0), value=1.0)
            own = added @ torch.einsum("k,rki->ri", features[0], read)
            seen = F.pad(own[:, width:], (0, 0, width, 0))
            offset = self.offset * factor + (features @ shift)[0] - seen @ self.centre
            last = self.last * factor[width:] + own[:, :width].T
            return Place(features, offset, self.first * factor[:, None] + seen, last)

    def __call__(
        self, embedding: Float[Tensor, "1 embed"], keep: float | None = None
    ) -> tuple[Float[Tensor, "num_ws w_dim"], float]:
        """Return the direction of a target and its expected transfer score, from its embedding, raw
        or unit.
        ValueError: an embedding of another size, or one that is not finite; see `place`."""
        embedding, factor = self.checked(embedding)
        place = self.at(keep)
        entered = torch.addmm(place.offset, embedding, place.first.T, alpha=factor)
        x, size = entered[:, : self.width], (self.width,)
        for norm, norm_bias, inner, inner_bias, outer, outer_bias in self.blocks:
            hidden = F.silu(F.linear(F.layer_norm(x, size, norm, norm_bias), inner, inner_bias))
            x = x + F.linear(hidden, outer, outer_bias)
        features = F.layer_norm(x, size, self.norm, self.norm_bias)
        heads = torch.addmm(entered[:, self.width :], features, place.last)
        direction = heads[:, :-1] if self.basis is None else heads @ self.basis
        return direction.float().view(self.shape), math.tanh(float(heads[0, -1]))

    def checked(
        self, embedding: Float[Tensor, "1 embed"]
    ) -> tuple[Float[Tensor, "1 embed"], float]:
        """Return an embedding in float32, and the factor that makes it unit."""
        self.check_size(embedding)
        embedding = embedding.detach().float()
        length = math.sqrt(float(embedding @ embedding.T))
        if not math.isfinite(length):
            raise ValueError(f"expected an embedding of finite length, found one of {length}")
        return embedding, 1 / max(length, 1e-12)

    def correction(
        self, embedding: Float[Tensor, "1 embed"], keep: float | None = None
    ) -> SourceCorrection | None:
        """Return the correction for a target, from its embedding, raw or unit; None where the
        mapper has none. ValueError: see `__call__`."""
        embedding, factor = self.checked(embedding)
        place = self.at(keep)
        if self.corrections is None:
            return None
        return self.corrections(factor * embedding, place.features)
