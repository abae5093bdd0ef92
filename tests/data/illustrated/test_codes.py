"""Codes of faces: what latents stand for, and that w says what its picture shows."""

import pytest
import torch
from torch import Tensor

from data.illustrated.codes import (
    ATTRIBUTES,
    VALUES,
    W_DIM,
    blend,
    codes,
    indices_from_z,
    one_hot,
    options_of,
    set_mapping,
    shares,
    strongest,
)
from targetclip.generators.stylegan2 import Mapping, StyleGAN2Config


@pytest.fixture(scope="module")
def z() -> Tensor:
    return torch.randn(500, W_DIM, generator=torch.Generator().manual_seed(1))


def mapping(layers: int = 2) -> Mapping:
    return Mapping(
        StyleGAN2Config(
            resolution=4, w_dim=W_DIM, z_dim=W_DIM, mapping_layers=layers, channels=(8,)
        )
    )


def test_every_value_is_common_enough_to_be_learned(z: Tensor) -> None:
    many = torch.randn(4000, W_DIM, generator=torch.Generator().manual_seed(2))

    assert one_hot(indices_from_z(many)).mean(dim=0).min() > 0.02
    assert torch.allclose(one_hot(indices_from_z(many)).mean(dim=0), shares(), atol=0.025)


def test_about_half_of_the_faces_wear_no_glasses(z: Tensor) -> None:
    at = [attribute.name for attribute in ATTRIBUTES].index("accessories")

    assert 0.4 < (indices_from_z(z)[:, at] == 0).float().mean() < 0.6


def test_a_longer_latent_stands_for_the_same_face(z: Tensor) -> None:
    assert torch.equal(indices_from_z(z), indices_from_z(3 * z))


def test_the_mapping_turns_z_into_the_code_of_the_face_it_stands_for(z: Tensor) -> None:
    network = mapping()
    set_mapping(network)
    w, expected = network(z), codes(one_hot(indices_from_z(z)))
    pure = (w - expected).abs().amax(dim=1) < 1e-3

    assert torch.equal(strongest(w), indices_from_z(z))
    assert 0.4 < pure.float().mean() < 0.8  # the others are where one value fades into the next
    assert w.min() > -1e-3 and w[:, VALUES:].abs().max() == 0


def test_the_mean_of_the_mapping_is_that_of_its_values() -> None:
    network = mapping()
    set_mapping(network)
    many = torch.randn(20_000, W_DIM, generator=torch.Generator().manual_seed(3))

    assert torch.allclose(network(many).mean(dim=0), network.w_avg, atol=0.03)


def test_a_mapping_of_other_sizes_is_refused() -> None:
    with pytest.raises(ValueError, match="expected a mapping of 2 layers, found 3"):
        set_mapping(mapping(3))


def test_a_code_says_exactly_which_face_it_stands_for(z: Tensor) -> None:
    assert torch.equal(strongest(codes(one_hot(indices_from_z(z)))), indices_from_z(z))


@pytest.mark.parametrize("layers", [1, 4])
def test_a_blend_shows_the_face_it_is_made_for_in_every_layer(z: Tensor, layers: int) -> None:
    indices = indices_from_z(z)
    drawn = blend(indices, indices.roll(1, 0), torch.Generator().manual_seed(0), layers)

    assert drawn.shape == (len(z), layers, VALUES)
    for layer in codes(drawn).unbind(dim=1):
        assert torch.equal(strongest(layer), indices)


def test_a_blend_has_less_than_nothing_of_some_values(z: Tensor) -> None:
    indices = indices_from_z(z)
    drawn = blend(indices, indices.roll(1, 0), torch.Generator().manual_seed(0))

    assert -1 <= drawn.min() < -0.5 and 2 < drawn.max() <= 3
    assert drawn[:, 0].where(one_hot(indices).bool(), torch.tensor(9.0)).min() >= 1


def test_half_of_the_blends_differ_between_layers(z: Tensor) -> None:
    indices = indices_from_z(z)
    drawn = blend(indices, indices.roll(1, 0), torch.Generator().manual_seed(0), 2)
    same = (drawn[:, 0] == drawn[:, 1]).all(dim=1)

    assert same[::2].all() and not same[1::2].any()


def test_an_absent_thing_is_switched_off_in_the_options() -> None:
    options = options_of([0] * len(ATTRIBUTES))

    assert options["topProbability"] == options["accessoriesProbability"] == 0
    assert "topVariant" not in options


def test_a_beard_has_the_colour_of_the_hair() -> None:
    options = options_of([1, 5] + [1] * (len(ATTRIBUTES) - 2))

    assert options["facialHairColor"] == options["hairColor"]
