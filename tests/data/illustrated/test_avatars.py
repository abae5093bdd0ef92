"""Pictures of avatars, who drew them, and what may not be trained on."""

import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("dicebear", reason="needs the extra avatars")
pytest.importorskip("resvg_py", reason="needs the extra avatars")

from data.illustrated.avatars import (
    HELD_OUT,
    TRAINED,
    bank,
    by_all_cores,
    credit,
    definition,
    draw,
    render,
)
from data.illustrated.codes import COUNTS, draw_face, face_bank


def test_no_style_is_both_trained_on_and_held_out() -> None:
    assert not set(TRAINED) & set(HELD_OUT)
    assert set(HELD_OUT) == {"personas", "micah", "open-peeps", "lorelei"}


@pytest.mark.parametrize("style", TRAINED + HELD_OUT)
def test_every_style_names_its_illustrator_and_a_free_licence(style: str) -> None:
    found = credit(style)

    assert found.illustrator
    assert re.match(r"CC0 1.0|CC BY 4.0|Free for personal and commercial use", found.licence)


def test_an_unknown_style_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="unknown style 'bottts': expected avataaars"):
        definition("bottts")


@pytest.mark.parametrize("size", [32, 128])
def test_a_picture_has_the_size_asked_for_and_the_background_given(size: int) -> None:
    picture = render(draw("adventurer", {"seed": "1", "backgroundColor": ["#b6e3f4"]})[0], size)

    assert picture.shape == (size, size, 3)
    assert np.abs(picture[0, 0].astype(int) - [0xB6, 0xE3, 0xF4]).max() <= 1


def test_the_options_drawn_are_known() -> None:
    drawn = draw("avataaars", {"seed": "1", "topVariant": "bun"})[1]

    assert drawn["topVariant"] == "bun" and "mouthVariant" in drawn


def test_faces_with_different_values_look_different() -> None:
    first = [1, 1, 1, 0, *[1] * (len(COUNTS) - 4)]  # no glasses, which would hide the eyes
    for attribute in (0, 1, 3, 4, 5, 6, 7, 8, 9, 10, 11):
        other = [2 if i == attribute else value for i, value in enumerate(first)]
        assert (draw_face(first)[0] != draw_face(other)[0]).any(), attribute


def test_many_keys_are_shared_among_processes_and_few_are_not() -> None:
    """The function returns the number of the process that calls it."""
    here = str(os.getpid())

    assert list(by_all_cores(os.readlink, ["/proc/self"] * 64, "few")) == [here] * 64
    many = list(by_all_cores(os.readlink, ["/proc/self"] * 65, "many"))
    assert len(many) == 65 and here not in many


def test_values_of_many_keys_come_in_their_order() -> None:
    assert list(by_all_cores(abs, range(-200, 0), "many")) == list(range(200, 0, -1))


def test_a_bank_is_made_once(tmp_path: Path) -> None:
    z, pictures = face_bank(tmp_path, 3, 0)
    files = {path.name for path in tmp_path.iterdir()}
    again = face_bank(tmp_path, 3, 0)[1]

    assert z.shape[0] == 3 and torch.equal(pictures, again)
    assert {path.name for path in tmp_path.iterdir()} == files
    assert len(files) == 2


def test_a_bank_of_other_faces_is_another_file(tmp_path: Path) -> None:
    first, truths = bank(tmp_path, "faces", [[1] * 12], draw_face, 128)
    second, others = bank(tmp_path, "faces", [[2] * 12], draw_face, 128)

    assert not torch.equal(first, second) and truths != others
    assert len(list(tmp_path.iterdir())) == 4
