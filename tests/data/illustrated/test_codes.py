"""Codes of faces: what latents stand for, and that w says what its picture shows."""

import pytest
import torch
from torch import Tensor

from data.illustrated.codes import (
    ATTRIBUTES,
    COUNTS,
    VALUES,
    W_DIM,
    Codebook,
    amounts_from_z,
    basis,
    blend,
    indices_from_z,
    one_hot,
    options_of,
)


@pytest.fixture(scope="module")
def z() -> Tensor:
    return torch.randn(500, W_DIM, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def book() -> Codebook:
    return Codebook()


def test_every_value_is_common_enough_to_be_learned(z: Tensor) -> None:
    many = torch.randn(4000, W_DIM, generator=torch.Generator().manual_seed(2))

    assert one_hot(indices_from_z(many)).mean(dim=0).min() > 0.02


def test_about_half_of_the_faces_wear_no_glasses(z: Tensor) -> None:
    at = [attribute.name for attribute in ATTRIBUTES].index("accessories")

    assert 0.4 < (indices_from_z(z)[:, at] == 0).float().mean() < 0.6


def test_a_longer_latent_stands_for_the_same_face(z: Tensor) -> None:
    assert torch.equal(indices_from_z(z), indices_from_z(3 * z))


def test_the_largest_amount_is_the_value_that_shows(z: Tensor) -> None:
    groups = amounts_from_z(z).split(COUNTS, dim=1)

    assert torch.equal(torch.stack([g.argmax(dim=1) for g in groups], 1), indices_from_z(z))


def test_a_short_latent_is_refused_with_what_was_expected() -> None:
    with pytest.raises(ValueError, match=f"expected z of {VALUES} coordinates or more, found 8"):
        indices_from_z(torch.zeros(1, 8))


def test_codes_are_orthonormal() -> None:
    assert torch.allclose(basis() @ basis().T, torch.eye(VALUES), atol=1e-5)


def test_a_code_says_exactly_which_face_it_stands_for(z: Tensor, book: Codebook) -> None:
    amounts = one_hot(indices_from_z(z))

    assert torch.allclose(book.amounts(book.codes(amounts)), amounts, atol=1e-5)


def test_codes_have_mean_zero_over_all_faces(book: Codebook) -> None:
    assert book.codes(book.shares[None]).abs().max() < 1e-5


@pytest.mark.parametrize("layers", [1, 4])
def test_a_blend_shows_the_face_it_is_made_for_in_every_layer(
    z: Tensor, book: Codebook, layers: int
) -> None:
    indices = indices_from_z(z)
    drawn = blend(indices, indices.roll(1, 0), torch.Generator().manual_seed(0), layers)

    assert drawn.shape == (len(z), layers, VALUES)
    for layer in book.codes(drawn).unbind(dim=1):
        assert torch.equal(book.strongest(layer), indices)


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
