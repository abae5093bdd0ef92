"""Edits: pictures or latents in, images or pictures out."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from predictor.direction import Direction
from predictor.editing import Editing, beside
from targetclip.media.images import read_picture, tensor_to_pictures, tile_of
from targetclip.scene import Scene
from targetclip.world import load_scene, load_world


@pytest.fixture(scope="module")
def scene(tiny_world: Path) -> Scene:
    return load_scene(load_world(str(tiny_world)))


@pytest.fixture(scope="module")
def editing(scene: Scene) -> Editing:
    return Editing(scene)


def direction(generator: str | None = None) -> Direction:
    vector = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    return Direction(vector=vector, method="mapper", generator=generator)


def images_of(scene: Scene, ws: Tensor, strength: float = 1.0) -> Tensor:
    """What an edit is, by the generator itself."""
    with torch.no_grad():
        return scene.generator.synthesis(ws + strength * direction().vector)


def test_pictures_are_inverted_however_they_are_given(
    scene: Scene, editing: Editing, faces: list[Path]
) -> None:
    pictures = [read_picture(path) for path in faces]
    ws = scene.invert(pictures)
    expected = images_of(scene, ws)
    arrays = [np.asarray(picture) for picture in pictures]
    for given in (faces, [str(path) for path in faces], pictures, np.stack(arrays), tuple(arrays)):
        assert torch.equal(editing.latents_of(given), ws)
        torch.testing.assert_close(editing.edit(given, direction()), expected)
    torch.testing.assert_close(editing.edit(str(faces[1]), direction()), expected[1:2])
    images = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2) / 127.5 - 1
    torch.testing.assert_close(editing.edit(images, direction()), expected)
    torch.testing.assert_close(editing.edit(images[2], direction()), expected[2:])


def test_latents_are_taken_as_they_are(scene: Scene, editing: Editing) -> None:
    ws = scene.sources(3)  # as many as a picture has channels
    assert torch.equal(editing.latents_of(ws), ws)
    torch.testing.assert_close(editing.edit(ws, direction()), images_of(scene, ws))
    torch.testing.assert_close(editing.edit(ws[0], direction()), images_of(scene, ws[:1]))


def test_a_direction_is_itself_its_vector_or_an_offset_for_each(
    scene: Scene, editing: Editing
) -> None:
    ws, vector = scene.sources(2), direction().vector
    expected = editing.edit(ws, vector)
    assert torch.equal(editing.edit(ws, direction()), expected)
    assert torch.equal(editing.edit(ws, direction(scene.generator.fingerprint)), expected)
    offsets = torch.stack([vector, torch.zeros_like(vector)])
    each = editing.edit(ws, offsets)
    torch.testing.assert_close(each[0], expected[0])
    torch.testing.assert_close(each[1], scene.render(ws)[1])


def test_a_direction_of_another_generator_is_refused_though_its_size_fits(
    scene: Scene, editing: Editing
) -> None:
    with pytest.raises(ValueError, match=r"6 x 8, .*belongs to another generator"):
        editing.edit(scene.sources(1), direction("b" * 64))


@pytest.mark.parametrize("strengths", [[0.0, 0.5, -2.0], np.array([0.0, 0.5, -2.0])])
def test_several_strengths_give_an_axis_in_front(
    scene: Scene, editing: Editing, strengths: list[float]
) -> None:
    ws = scene.sources(2)
    images = editing.edit(ws, direction(), strengths)
    assert images.shape == (3, 2, 3, 16, 16)
    for strength, found in zip(strengths, images, strict=True):
        torch.testing.assert_close(found, images_of(scene, ws, float(strength)))
    pictures = editing.edit_pictures(ws, direction(), strengths)
    flat = tensor_to_pictures(images.flatten(0, 1))
    assert [picture.tobytes() for picture in pictures] == [picture.tobytes() for picture in flat]


def test_results_can_be_had_as_pictures(scene: Scene, editing: Editing, faces: list[Path]) -> None:
    found = editing.edit_pictures(faces[1:], direction(), strength=0.5)
    expected = tensor_to_pictures(editing.edit(faces[1:], direction(), 0.5))
    assert [picture.size for picture in found] == [(16, 16)] * 2
    assert [p.tobytes() for p in found] == [p.tobytes() for p in expected]


def test_the_aligner_cuts_pictures_before_they_are_inverted(
    scene: Scene, faces: list[Path]
) -> None:
    def corner(picture: Image.Image) -> Image.Image:
        return picture.crop((0, 0, 20, 20))

    found = Editing(scene, corner).latents_of(faces)
    assert torch.equal(found, scene.invert([corner(read_picture(path)) for path in faces]))


def test_without_an_inverter_only_latents_are_edited(scene: Scene, faces: list[Path]) -> None:
    editing = Editing(dataclasses.replace(scene, inverter=None))
    with pytest.raises(ValueError, match=r"no inverter.*use generated sources"):
        editing.edit(faces, direction())
    assert editing.edit(scene.sources(1), direction()).shape == (1, 3, 16, 16)


def test_a_strip_shows_every_source_at_six_strengths(scene: Scene, editing: Editing) -> None:
    ws = scene.sources(2)
    strip = editing.strip(ws, direction(), 0.8)
    row_height = strip.height - editing.strip(ws[:1], direction()).height
    assert strip.width == 6 * (256 + 12) + 12 and row_height > 256 + 12
    for column, strength in enumerate((0.0, 0.2, 0.4, 0.6, 0.8, 1.0)):
        for row, picture in enumerate(tensor_to_pictures(images_of(scene, ws, strength))):
            left, bottom = 12 + column * (256 + 12), strip.height - 12 - (1 - row) * row_height
            found = np.asarray(strip.crop((left, bottom - 256, left + 256, bottom)))
            assert np.abs(found - np.asarray(tile_of(picture, 256)).astype(int)).max() <= 1
    with_target = editing.strip(ws, direction(), target=Image.new("RGB", (9, 9), "red"))
    assert with_target.width == strip.width + 256 + 12


def test_names_of_a_strip_are_one_for_each_source(scene: Scene, editing: Editing) -> None:
    for names in (["ada"], ["ada", "ada"]):
        with pytest.raises(ValueError, match="expected 2 different names of sources"):
            editing.strip(scene.sources(2), direction(), names=names)


def test_a_morph_is_rendered_at_strengths_that_grow_slowly_at_either_end(
    scene: Scene, editing: Editing
) -> None:
    ws = scene.sources(3)
    pictures = [*editing.morph(ws, direction(), 2.0)]
    assert len(pictures) == 25 and {picture.size for picture in pictures} == {(512, 512)}
    for place, strength in ((0, 0.0), (6, 2 * (1 - 0.5**0.5) / 2), (12, 1.0), (24, 2.0)):
        expected = tensor_to_pictures(images_of(scene, ws, strength))
        found = pictures[place].crop((256, 0, 512, 256))
        wanted = np.asarray(tile_of(expected[1], 256)).astype(int)
        assert np.abs(np.asarray(found) - wanted).max() <= 1
    corner = np.asarray(pictures[0].crop((256, 256, 512, 512)))
    assert (corner == 255).all()  # there is no fourth source


@pytest.mark.parametrize(
    ("count", "side", "size"),
    [(1, 64, (256, 256)), (2, 900, (1024, 512)), (12, 512, (1024, 768)), (5, 512, (1023, 682))],
)
def test_pictures_beside_each_other_are_enlarged_and_not_too_wide(
    count: int, side: int, size: tuple[int, int]
) -> None:
    assert beside([Image.new("RGB", (side, side))] * count).size == size
