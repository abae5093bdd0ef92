"""The methods that are compared, on a tiny world: each answers what its name says."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pairs_made
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from data.card import DatasetInfo
from data.dataset import merge
from data.drawn.faces import faces_from_z
from data.drawn.sketch import Face
from data.pairs import Pair, chunk_bytes, features
from eval import methods
from eval.methods import LACKING, METHODS, Answer, Bench, drawn_answer, needs_of
from eval.pair_methods import PairTable, open_pair_table
from eval.sets import SOURCE_SEED, EvalSet, in_range, source_seeds
from predictor import transfer
from predictor.mapper import Mapper
from predictor.mapper_file import MapperConfig, MapperRecord
from predictor.transfer import EssenceTransfer
from targetclip.encoders.identity import IdentityConfig, SketchIdentity
from targetclip.media.images import picture_to_tensor
from targetclip.recipes import RECIPES
from targetclip.sources import generated_sources
from targetclip.world import Parts, load_parts, load_world

GATE = {"threshold": -1.0, "probes": 2.0, "refine_steps": 2.0, "refine_rate": 0.05}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The cache of datasets is the test's own, and fresh sources come from a small bank."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(methods, "BANK", 12)
    monkeypatch.setattr(transfer, "BANK", 12)


@pytest.fixture(scope="module")
def parts(tiny_world: Path) -> Parts:
    return load_parts(load_world(str(tiny_world)), torch.device("cpu"))


def fresh_mapper(parts: Parts, seed: int, threshold: float = -1.0) -> Mapper:
    """As after training: answers differ from target to target."""
    generator, embedder = parts.generator, parts.embedder
    prints = (generator.fingerprint, embedder.fingerprint)
    sizes = (embedder.embed_dim, generator.num_ws, generator.w_dim)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        mapper = Mapper(MapperConfig(*sizes, *prints, width=8, depth=1))
        torch.nn.init.normal_(mapper.direction.weight)
        torch.nn.init.normal_(mapper.score.weight)
    mapper.record = MapperRecord({}, {**GATE, "threshold": threshold}, "MIT", "nothing", "0")
    return mapper.eval().requires_grad_(False)


Make = Callable[..., Bench]


@pytest.fixture
def bench(parts: Parts) -> Make:
    """Makes benches; anything may be changed."""

    def make(threshold: float = -1.0, max_images: int = 8, **changes: object) -> Bench:
        generator, embedder = parts.generator, parts.embedder
        essence = EssenceTransfer(
            generator,
            embedder,
            parts.inverter,
            fresh_mapper(parts, 0, threshold),
            truncation=1.0,
            max_images=max_images,
        )
        sources = generated_sources(generator, 1.0, 3, 3)
        return dataclasses.replace(Bench(essence, sources, max_steps=3), **changes)  # type: ignore[arg-type]

    return make


@pytest.fixture(scope="module")
def targets() -> EvalSet:
    arrays = [np.random.default_rng(i).integers(0, 256, (4, 5, 3), np.uint8) for i in range(3)]
    pictures = tuple(Image.fromarray(array).resize((40, 24)) for array in arrays)
    return EvalSet("drawn", ("a", "b", "c"), ("a.png", "b.png", "c.png"), pictures)


def answer(name: str, bench: Bench, targets: EvalSet) -> Answer:
    found = METHODS[name].find(bench, targets)
    assert found.edits.isfinite().all() and not found.edits.requires_grad
    return found


def goals(bench: Bench, targets: EvalSet) -> Tensor:
    return F.normalize(bench.essence.embedder.embed_pictures(list(targets.pictures)), dim=1)


# The mapper


def test_the_mapper_answers_as_the_product_does(bench: Make, targets: EvalSet) -> None:
    made = bench()
    found = answer("mapper", made, targets)
    assert found.expected is not None
    for i, picture in enumerate(targets.pictures):
        alone = made.essence.predict(picture)
        torch.testing.assert_close(found.edits[i], alone.vector)
        assert float(found.expected[i]) == pytest.approx(alone.expected)
    assert not torch.allclose(found.edits[0], found.edits[1], atol=1e-3)


def test_auto_says_what_answered(bench: Make, targets: EvalSet) -> None:
    found = answer("auto", bench(threshold=-1.0), targets)
    assert found.notes == ("mapper",) * 3
    torch.testing.assert_close(found.edits, answer("mapper", bench(), targets).edits)
    # Nothing passes, so everything is tried and the best of it kept.
    strict = bench(threshold=2.0)
    assert set(answer("auto", strict, targets.part(0, 1)).notes) <= {
        "mapper", "refined", "optimizer",
    }  # fmt: skip


def test_the_difference_trained_mapper_is_another_one(
    bench: Make, parts: Parts, targets: EvalSet
) -> None:
    other = fresh_mapper(parts, 7)
    found = answer("differences", bench(differences=other), targets)
    with torch.no_grad():
        expected = other(parts.embedder.embed_pictures(list(targets.pictures))).directions
    torch.testing.assert_close(found.edits, expected)


# Optimizers


@pytest.mark.parametrize("name", ["consistent", "release", "paper"])
def test_a_teacher_finds_for_a_target_what_it_finds_without_the_others(
    name: str, bench: Make, targets: EvalSet
) -> None:
    together = answer(name, bench(max_images=100), targets)
    assert together.edits.shape == (3, 6, 8) and together.notes == ("",) * 3
    one_by_one = answer(name, bench(max_images=6), targets)
    alone = answer(name, bench(), targets.part(1, 2))
    for found in (one_by_one.edits[1], alone.edits[0]):
        torch.testing.assert_close(found, together.edits[1], rtol=1e-2, atol=1e-2)
    again = answer(name, bench(seed=1), targets)
    assert not torch.allclose(again.edits, together.edits, atol=1e-2) or name == "release"


def test_the_teacher_of_identity_looks_through_the_model(
    bench: Make, targets: EvalSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = SketchIdentity(IdentityConfig(16, (8, 8), 16, 5)).requires_grad_(False)
    made = bench()
    made.essence.identity = model
    found = answer("identity", made, targets)
    assert found.edits.shape == (3, 6, 8) and found.notes == ("",) * 3
    plain = dataclasses.replace(RECIPES["identity"], identity_weight=0.0)
    monkeypatch.setitem(RECIPES, "identity", plain)
    assert not torch.allclose(answer("identity", made, targets).edits, found.edits, atol=1e-2)


def test_auto_needs_the_identity_model_of_a_mapper_that_was_taught_by_one(
    bench: Make, parts: Parts
) -> None:
    made = bench()
    assert needs_of(METHODS["auto"], made) == ("mapper", "calibration")
    made.essence.trained = RECIPES["identity"]
    assert needs_of(METHODS["auto"], made) == ("mapper", "calibration", "identity")
    assert needs_of(METHODS["mapper"], made) == ("mapper",)


def test_a_search_is_cut_where_it_is_told_to(bench: Make, targets: EvalSet) -> None:
    one, two = (answer("consistent", bench(max_steps=n), targets) for n in (1, 2))
    assert not torch.equal(one.edits, two.edits)
    recipe = RECIPES["paper"]
    assert bench(max_steps=7).cut(recipe) == dataclasses.replace(recipe, steps=7)
    assert bench(max_steps=10**6).cut(recipe) == bench(max_steps=None).cut(recipe) == recipe


def test_clip_blending_brings_each_source_nearer_to_the_mean_of_both(
    bench: Make, targets: EvalSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Random networks are rougher ground than trained ones: smaller steps.
    slower = dataclasses.replace(methods.BLENDING, learning_rate=0.03, steps=20)
    monkeypatch.setattr(methods, "BLENDING", slower)
    made = bench(max_steps=None, max_images=4)
    found = answer("clip-blending", made, targets)
    assert found.edits.shape == (3, 3, 6, 8)
    generator, embedder = made.essence.generator, made.essence.embedder

    def seen(ws: Tensor) -> Tensor:
        with torch.no_grad():
            return F.normalize(embedder.embed_images(generator.synthesis(ws)), dim=1)

    before = seen(made.sources)
    wanted = F.normalize(before[None] + goals(made, targets)[:, None], dim=2)
    after = seen((made.sources + found.edits).flatten(0, 1)).unflatten(0, (3, 3))
    gained = (after * wanted).sum(dim=2) - (before * wanted).sum(dim=2)
    assert gained.min() > 0
    alone = answer("clip-blending", made, targets.part(2, 3)).edits[0]
    torch.testing.assert_close(found.edits[2], alone, rtol=1e-2, atol=1e-2)


# One pass


def test_latent_blending_adds_all_of_the_target(bench: Make, targets: EvalSet) -> None:
    made = bench()
    mean_w = made.essence.generator.mean_w
    found = answer("latent-blending", made, targets).edits
    torch.testing.assert_close(mean_w + found, made.essence.invert(list(targets.pictures)))


def test_an_encoder_answers_with_an_offset_from_its_mean(
    bench: Make, parts: Parts, targets: EvalSet
) -> None:
    assert parts.inverter is not None
    found = answer("encoder", bench(encoder=parts.inverter), targets).edits
    image = picture_to_tensor(targets.pictures[1], 16)
    torch.testing.assert_close(found[1], (parts.inverter(image) - parts.inverter.mean_w)[0])


@pytest.mark.parametrize(
    ("name", "part"),
    [("ridge", "pairs"), ("differences", "differences"), ("encoder", "encoder")],
)
def test_a_missing_part_is_named(name: str, part: str, bench: Make, targets: EvalSet) -> None:
    assert part in METHODS[name].needs
    with pytest.raises(ValueError, match=part):
        METHODS[name].find(bench(), targets)
    assert set(METHODS[name].needs) <= set(LACKING)


# Pairs


def line(embedding: Tensor) -> Tensor:
    """A linear map from embeddings to directions."""
    weights = torch.randn(32, 6 * 8, generator=torch.Generator().manual_seed(5))
    return (embedding @ weights + 0.5).unflatten(-1, (6, 8))


def linear_pair(index: int) -> Pair:
    made = pairs_made.pair(index, 32, 6, 8)
    direction = line(torch.from_numpy(made.embedding))
    return dataclasses.replace(made, direction=direction.numpy())


@pytest.fixture(scope="module")
def info(parts: Parts) -> DatasetInfo:
    return DatasetInfo(
        name="tiny", generator=parts.generator.fingerprint, resolution=16, num_ws=6, w_dim=8,
        embedder="tiny", embedder_fingerprint=parts.embedder.fingerprint, preprocess="consistent",
        recipe="consistent", settings={}, truncation=1.0, precision="no", seed=0,
        targets=("drawn:80",), sources="none", held_out="none", licence="mit",
        licence_text="", command="none",
    )  # fmt: skip


def write_pairs(folder: Path, info: DatasetInfo) -> Path:
    columns = features(32, 6, 8)
    folder.mkdir()
    chunk = folder / "chunk.parquet"
    chunk.write_bytes(chunk_bytes([linear_pair(i) for i in range(80)], [], columns))
    merge([chunk], folder / "pairs", columns, info)
    return folder / "pairs"


@pytest.fixture
def table(tmp_path: Path, info: DatasetInfo, parts: Parts) -> PairTable:
    """64 train pairs of a linear teacher."""
    folder = write_pairs(tmp_path / "made", info)
    return open_pair_table(folder, parts.generator, parts.embedder)


def train_pairs() -> list[Pair]:
    found = [linear_pair(i) for i in range(80)]
    return [pair for pair in found if pair.split == "train"]


def test_the_mean_direction_is_the_same_for_every_target(
    bench: Make, table: PairTable, targets: EvalSet
) -> None:
    found = answer("mean-direction", bench(pairs=table), targets).edits
    mean = np.stack([pair.direction for pair in train_pairs()]).mean(axis=0)
    for each in found:
        np.testing.assert_allclose(each, mean, atol=1e-5)


def test_the_nearest_neighbour_is_the_nearest_training_pair(
    bench: Make, table: PairTable, targets: EvalSet
) -> None:
    pairs = train_pairs()
    asked = torch.from_numpy(np.stack([pairs[7].embedding, pairs[3].embedding])) + 0.01
    found = table.nearest_directions(5 * asked)
    np.testing.assert_array_equal(found, np.stack([pairs[7].direction, pairs[3].direction]))
    made = bench(pairs=table)
    cosines = goals(made, targets) @ torch.from_numpy(np.stack([p.embedding for p in pairs])).T
    for edit, best in zip(
        answer("nearest-neighbour", made, targets).edits, cosines.argmax(dim=1), strict=True
    ):
        np.testing.assert_array_equal(edit, pairs[int(best)].direction)


def test_ridge_finds_a_linear_teacher(bench: Make, table: PairTable, targets: EvalSet) -> None:
    made = bench(pairs=table)
    expected = line(goals(made, targets))
    torch.testing.assert_close(answer("ridge", made, targets).edits, expected, rtol=1e-2, atol=1e-2)
    assert table.ids == {pair.id for pair in train_pairs()}


def test_pairs_of_another_generator_are_refused(
    tmp_path: Path, info: DatasetInfo, parts: Parts
) -> None:
    other = dataclasses.replace(info, generator="0" * 64)
    folder = write_pairs(tmp_path / "other", other)
    with pytest.raises(ValueError, match="build pairs for this world"):
        open_pair_table(folder, parts.generator, parts.embedder)


# The drawn answer


def test_the_drawn_answer_keeps_who_it_is_and_brings_the_essence() -> None:
    truth = in_range(1).truth
    assert truth is not None
    before, edited = drawn_answer(truth.faces, 128, 2)
    assert before.shape == (2, 3, 64, 64) and edited.shape == (1, 2, 3, 64, 64)
    background = (slice(None), slice(None), 0, 0)
    assert torch.equal(edited[0][background], before[background])
    assert not torch.equal(edited[0], before)
    # A source's own essence changes nothing; the latent is that of the generated source.
    seed = source_seeds(SOURCE_SEED, 2)[1]
    z = torch.randn(1, 1, 128, generator=torch.Generator().manual_seed(seed))
    face = Face(*faces_from_z(z.expand(-1, 3, -1))[0].tolist())
    _, edited = drawn_answer((face,), 128, 2)
    assert torch.equal(edited[0, 1], before[1])
