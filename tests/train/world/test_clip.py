"""Training of the world's CLIP: tiny, read back by open_clip, never on styles held out."""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("dicebear", reason="needs the extra avatars")
pytest.importorskip("resvg_py", reason="needs the extra avatars")

from data.illustrated.avatars import HELD_OUT, TRAINED
from data.illustrated.shown import Shown
from targetclip.embedder import ClipEmbedder
from train.world import clip
from train.world.clip import (
    Config,
    augment,
    balanced,
    keys_of,
    retrieval,
    run,
    shown_by,
    without_colour,
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("avatars") / "clip"
    small = {
        **clip.MODEL,
        "embed_dim": 16,
        "vision_cfg": {"image_size": 96, "layers": [1, 1, 1, 1], "width": 8, "head_width": 32},
        "text_cfg": {**clip.MODEL["text_cfg"], "width": 16, "heads": 1, "layers": 1},
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clip, "MODEL", small)
        patch.setattr(clip, "bank", one_process)
        run(Config(out, pictures=22, steps=2, batch_size=8, tests=2))
    return out


def one_process(path, keys, picture_of, size):  # type: ignore[no-untyped-def]
    """As `bank`, without worker processes: these pictures are few."""
    import numpy as np

    return np.stack([picture_of(key) for key in keys])


def test_the_model_is_read_as_any_open_clip_model(trained: Path) -> None:
    embedder = ClipEmbedder.load(str(trained / "model"))
    image = embedder.embed_images(torch.zeros(1, 3, 128, 128))

    assert image.shape[0] == 1 and image.isfinite().all()


def test_the_report_has_every_style_trained_on_or_held_out(trained: Path) -> None:
    report = json.loads((trained / "report.json").read_text())

    assert set(report["trained"]) == {"all", *TRAINED}
    assert set(report["held_out"]) == {"all", *HELD_OUT}
    assert 0 <= report["trained"]["all"]["caption"] <= 1


def test_no_picture_to_train_on_is_of_a_style_held_out() -> None:
    assert {style for style, _, _ in keys_of(TRAINED, 500, 0)}.isdisjoint(HELD_OUT)


def test_keys_name_different_pictures() -> None:
    assert len(set(keys_of(TRAINED, 100, 0))) == 100


def test_what_a_key_shows_can_be_read_back() -> None:
    assert isinstance(Shown(**shown_by(("dylan", 0, 1))), Shown)


def test_augmented_pictures_stay_in_range_and_repeat_with_the_seed() -> None:
    images = torch.rand(4, 3, 96, 96) * 2 - 1
    first, again, other = (
        augment(images, 0.1, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )

    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.abs().max() <= 1 and first.shape == images.shape


def test_a_picture_that_is_nearest_to_its_caption_finds_it() -> None:
    vectors = torch.eye(200)

    assert retrieval(vectors, vectors) == 1.0
    assert retrieval(vectors, vectors.roll(1, 0)) == 0.0


def test_balanced_accuracy_of_always_saying_yes_is_a_half() -> None:
    assert balanced(torch.ones(10).bool(), torch.arange(10) < 2) == 0.5


def test_a_grey_picture_has_no_colour_in_its_caption() -> None:
    grey = without_colour(Shown(hair="afro", hair_colour="green"))

    assert grey.hair == "afro" and not grey.hair_colour
