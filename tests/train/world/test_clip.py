"""Training of the world's CLIP: tiny, read back by open_clip, never on styles held out."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("dicebear", reason="needs the extra avatars")
pytest.importorskip("resvg_py", reason="needs the extra avatars")

from safetensors.torch import load_file

from data.illustrated.avatars import HELD_OUT, TRAINED
from data.illustrated.shown import Shown
from targetclip.embedder import ClipEmbedder
from train.world import clip
from train.world.clip import (
    KINDS,
    NOT_ASKED,
    QUESTIONS,
    WORDINGS,
    Config,
    Questions,
    answers_of,
    augment,
    balanced,
    captions_of,
    keys_of,
    made_of,
    margins,
    retrieval,
    run,
    there_of,
    tokenizer,
)

SMALL = {
    **clip.MODEL,
    "embed_dim": 16,
    "vision_cfg": {"image_size": 96, "layers": [1, 1, 1, 1], "width": 8, "head_width": 32},
    "text_cfg": {**clip.MODEL["text_cfg"], "width": 16, "heads": 1, "layers": 1},
}


@pytest.fixture(scope="module", autouse=True)
def small_model() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clip, "MODEL", SMALL)
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("avatars") / "clip"
    run(Config(out=out, pictures=22, steps=2, batch_size=8, tests=2))
    return out


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
    picture, truth = made_of(("dylan", 0, 1))

    assert picture.shape == (96, 96, 3)
    assert Shown(**truth).mouth


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


def test_the_first_caption_of_a_picture_names_no_colour_and_fits_a_grey_copy() -> None:
    item = Shown(hair="afro", hair_colour="green", mouth="smile")
    read = [
        [tokenizer().decode(row.tolist()) for row in captions_of((item, 0, i))] for i in range(20)
    ]

    assert not any("green" in texts[0] for texts in read)
    assert any("green" in text for texts in read for text in texts[1:])


@pytest.mark.parametrize("kind", KINDS)
def test_every_answer_has_as_many_texts_as_there_are_wordings(kind: str) -> None:
    answers, texts = answers_of(kind)

    assert len(set(answers)) == len(answers) == len(texts)
    assert all(len(wordings) == WORDINGS for wordings in texts)


def test_right_answers_cost_nothing_and_what_is_not_known_is_not_asked() -> None:
    truths = [Shown(glasses="sunglasses", hair="afro", hair_colour="red"), Shown(hat="cap")]
    questions = Questions(truths, torch.get_default_device())
    logits = torch.zeros(2, sum(questions.sizes))
    starts = [sum(questions.sizes[:i]) for i in range(len(KINDS))]
    for start, truth in zip(starts, questions.truth, strict=True):
        for picture in range(2):
            if truth[picture] != NOT_ASKED:
                logits[picture, start + truth[picture]] = 50.0
    everyone = torch.arange(2)
    right = questions.loss(logits, everyone, torch.zeros(2).bool())
    wrong = questions.loss(-logits, everyone, torch.zeros(2).bool())

    assert right < 1e-6 and wrong > 1
    colour = KINDS.index("hair_colour")
    assert questions.truth[colour].tolist() == [
        answers_of("hair_colour")[0].index("red"),
        NOT_ASKED,
    ]


def test_a_picture_nearer_to_yes_than_to_no_has_a_positive_margin() -> None:
    sides = [side for question in QUESTIONS.values() for side in question]
    text = torch.cat([torch.eye(6)[i].expand(len(side), -1) for i, side in enumerate(sides)])
    found = margins(torch.eye(6)[[0, 3, 4]], text)

    assert found.sign().tolist() == [[1, 0, 0], [0, -1, 0], [0, 0, 1]]


def test_a_moustache_is_neither_a_beard_nor_a_shaven_chin() -> None:
    truths = [Shown(moustache="moustache"), Shown(beard="goatee", moustache="moustache"), Shown()]
    assert there_of("beard", truths).tolist() == [-1, 1, 0]

    questions = Questions(truths, torch.get_default_device())
    beard = list(QUESTIONS).index("beard")
    one, logits = torch.tensor([0]), torch.zeros(1, len(QUESTIONS))
    before = questions.yes_or_no(logits, one)
    logits[0, beard] = 9.0
    assert torch.equal(questions.yes_or_no(logits, one), before)


def test_yes_counts_as_much_as_no_however_rare_it_is() -> None:
    questions = Questions([Shown(hat="cap"), *[Shown()] * 9], torch.get_default_device())
    hat = list(QUESTIONS).index("hat")

    assert questions.weights[0, hat] == pytest.approx(float(questions.weights[1:, hat].sum()))


def test_a_model_is_trained_further(trained: Path, tmp_path: Path) -> None:
    for path in trained.parent.glob("*.*"):
        (tmp_path / path.name).hardlink_to(path)
    more = Config(
        out=tmp_path / "more", start=trained / "model", pictures=22, steps=1, batch_size=8,
        learning_rate=1e-9, tests=2,
    )  # fmt: skip
    run(more)
    first, second = (load_file(p / "model" / clip.WEIGHTS) for p in (trained, tmp_path / "more"))

    for name, weight in first.items():
        if weight.ndim > 1:  # no statistics of pictures, which every step renews
            assert torch.equal(weight, second[name]), name


def test_a_grey_picture_is_not_asked_for_its_colours() -> None:
    questions = Questions([Shown(hair_colour="red")], torch.get_default_device())
    logits = torch.randn(1, sum(questions.sizes), generator=torch.Generator().manual_seed(0))
    one = torch.zeros(1, dtype=torch.long)
    grey = questions.loss(logits, one, torch.ones(1).bool())
    start = sum(questions.sizes[: KINDS.index("hair_colour")])
    logits[:, start : start + 3] += 5

    assert torch.equal(questions.loss(logits, one, torch.ones(1).bool()), grey)
    assert not torch.equal(questions.loss(logits, one, torch.zeros(1).bool()), grey)
