"""The methods that are compared, on a tiny world: each answers what its name says."""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pairs_made
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from data.card import REPORT, DatasetInfo
from data.dataset import merge
from data.illustrated.codes import VALUES, draw_face, indices_from_z
from data.pairs import Pair, chunk_bytes, features
from data.teacher import search_in_batches
from eval.answers import find, keep, kept, settings_of
from eval.methods import (
    BLENDING,
    EACH_SOURCE,
    LACKING,
    METHODS,
    OWN_MAPPER,
    Answer,
    Bench,
    PairTable,
    by_clip_blending,
    by_each_source,
    by_own_mapper,
    needs_of,
    open_pair_table,
    right_answer,
    stacked_corrections,
)
from eval.sets import EvalSet, in_range
from eval.truth import truth_of
from predictor.mapper import Mapper, load_mapper
from predictor.mapper_file import MapperConfig, MapperRecord
from predictor.transfer import EssenceTransfer
from targetclip.encoders.identity import AvatarIdentity, IdentityConfig
from targetclip.generators.stylegan2 import StyleGAN2, StyleGAN2Config
from targetclip.recipes import RECIPES
from targetclip.scene import Scene
from targetclip.seeds import TEST_SOURCES, seed_of, source_seeds
from targetclip.world import load_scene, load_world

GATE = {"threshold": -1.0, "probes": 2.0, "refine_steps": 2.0, "refine_rate": 0.05}


@pytest.fixture(scope="module")
def scene(tiny_world: Path) -> Scene:
    return load_scene(load_world(str(tiny_world)), max_images=8)


def fresh_mapper(
    scene: Scene, seed: int, threshold: float = -1.0, recipe: dict[str, Any] | None = None
) -> Mapper:
    """As after training: answers differ from target to target."""
    config = MapperConfig(
        embed_dim=scene.embedder.embed_dim,
        num_ws=scene.generator.num_ws,
        w_dim=scene.generator.w_dim,
        generator=scene.generator.fingerprint,
        embedder=scene.embedder.fingerprint,
        width=8,
        depth=1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        mapper = Mapper(config)
        torch.nn.init.normal_(mapper.direction.weight)
        torch.nn.init.normal_(mapper.score.weight)
    mapper.record = MapperRecord(
        recipe=recipe or {},
        calibration={**GATE, "threshold": threshold},
        licence="MIT",
        trained_on="nothing",
        version="0",
    )
    return mapper.eval().requires_grad_(False)


Make = Callable[..., Bench]


@pytest.fixture
def bench(scene: Scene) -> Make:
    """Makes benches; anything may be changed."""

    def make(
        mapper: Mapper | None = None,
        max_images: int = 8,
        identity: AvatarIdentity | None = None,
        **changes: Any,
    ) -> Bench:
        own = dataclasses.replace(scene, max_images=max_images, identity=identity)
        essence = EssenceTransfer(own, mapper or fresh_mapper(own, 0))
        return Bench(**{"essence": essence, "sources": own.sources(3, 3), "max_steps": 3} | changes)

    return make


@pytest.fixture(scope="module")
def targets() -> EvalSet:
    arrays = [np.random.default_rng(i).integers(0, 256, (4, 5, 3), np.uint8) for i in range(3)]
    pictures = tuple(Image.fromarray(array).resize((40, 24)) for array in arrays)
    return EvalSet(
        name="drawn",
        ids=("a", "b", "c"),
        origins=("a.png", "b.png", "c.png"),
        pictures=pictures,
    )


def answer(name: str, bench: Bench, targets: EvalSet) -> Answer:
    found = METHODS[name].find(bench, targets)
    assert found.edits.isfinite().all() and not found.edits.requires_grad
    return found


def goals(bench: Bench, targets: EvalSet) -> Tensor:
    return F.normalize(bench.scene.embedder.embed_pictures(list(targets.pictures)), dim=1)


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


def test_a_mapper_that_reads_its_sources_answers_for_any_of_them(
    bench: Make, reading_mapper: Path, targets: EvalSet, tmp_path: Path
) -> None:
    made = bench(load_mapper(reading_mapper)[0])
    settings = settings_of("mapper", dataclasses.replace(made, digests={"mapper": "m"}), targets)
    found = find(METHODS["mapper"], made, targets)
    keep(tmp_path / "mapper", found, settings)
    again = kept(tmp_path / "mapper", settings)
    assert again is not None
    for sources in (made.sources, made.scene.sources(5, 9)):
        for i, picture in enumerate(targets.pictures):
            expected = made.essence.predict(picture).offsets(sources)
            torch.testing.assert_close(found.on(sources)[i], expected, rtol=1e-4, atol=1e-5)
            assert not torch.allclose(expected[0], expected[1], atol=1e-2)
        assert torch.equal(again.on(sources), found.on(sources))
    alone = answer("one-direction", made, targets)
    assert torch.equal(alone.edits, found.edits) and alone.expected is None
    offsets = alone.on(made.sources)
    assert torch.equal(offsets, found.edits[:, None].expand_as(offsets))


def test_auto_answers_with_the_corrections_of_the_product(
    bench: Make, reading_mapper: Path, targets: EvalSet
) -> None:
    mapper, record = load_mapper(reading_mapper)
    made = bench(mapper)
    scores = [
        made.essence.probe_score(
            made.essence.embed_target(picture), made.essence.predict(picture), 2
        )
        for picture in targets.pictures
    ]
    gate = {**GATE, "threshold": sorted(scores)[1]}  # one of three falls short
    mapper.record = dataclasses.replace(record, calibration=gate)
    found = answer("auto", made, targets)
    assert found.notes.count("mapper") == 2
    recipe = made.cut(RECIPES["consistent"])
    for i, (picture, name) in enumerate(zip(targets.pictures, targets.ids, strict=True)):
        seed = seed_of("compare", 0, name)
        expected = made.essence.direction(picture, "auto", recipe, seed).offsets(made.sources)
        torch.testing.assert_close(found.on(made.sources)[i], expected.expand(3, -1, -1))


def test_answers_without_a_correction_stand_beside_those_with_one(
    bench: Make, reading_mapper: Path, targets: EvalSet
) -> None:
    made = bench(load_mapper(reading_mapper)[0])
    one, other = (made.essence.predict(picture).correction for picture in targets.pictures[:2])
    assert one is not None and other is not None
    found = stacked_corrections([one, None, other])
    assert found is not None
    each, ws = found.each(made.sources), made.sources
    torch.testing.assert_close(each, torch.stack([one(ws), torch.zeros_like(ws), other(ws)]))
    assert stacked_corrections([None, None]) is None


def test_a_mapper_of_one_target_learns_to_bring_its_sources_there(
    bench: Make, targets: EvalSet
) -> None:
    recipe = dataclasses.replace(OWN_MAPPER, identity_weight=0.0, steps=60, sources=3)
    made = bench(max_steps=None)
    few = targets.part(0, 2)
    edits = by_own_mapper(made, few, recipe).edits
    assert edits.shape == (2, 3, 6, 8) and not edits.requires_grad
    assert not torch.allclose(edits[0, 0], edits[0, 1], atol=1e-2)  # it reads the source
    goal = made.embed(few, recipe)
    after = made.scene.score(goal, made.sources, edits).transfer
    before = made.scene.score(goal, made.sources, torch.zeros_like(edits)).transfer
    assert (after - before).mean() > 0.05  # a tiny random world may have no room for one of them
    first = dataclasses.replace(recipe, steps=5)
    alone, again = (by_own_mapper(made, few.part(i, 2), first).edits[-1] for i in (1, 0))
    torch.testing.assert_close(alone, again, rtol=0, atol=1e-3)
    other = by_own_mapper(dataclasses.replace(made, seed=1), few, first).edits[-1]
    assert not torch.allclose(other, again, rtol=0, atol=1e-3)


def test_auto_keeps_what_passes_and_else_the_best_on_the_probe(
    bench: Make, scene: Scene, targets: EvalSet
) -> None:
    found = answer("auto", bench(fresh_mapper(scene, 0, threshold=-1.0)), targets)
    assert found.notes == ("mapper",) * 3
    torch.testing.assert_close(found.edits, answer("mapper", bench(), targets).edits)
    # Nothing passes, so that everything is tried.
    strict = bench(fresh_mapper(scene, 0, threshold=2.0))
    essence, recipe = strict.essence, strict.cut(RECIPES["consistent"])
    (picture, *_), seed = targets.pictures, seed_of("compare", 0, targets.ids[0])
    tried = [
        essence.direction(picture, mode, recipe, seed) for mode in ("instant", "refine", "optimize")
    ]
    embedding = essence.embed_target(picture)
    scores = [essence.probe_score(embedding, direction.vector, 2) for direction in tried]
    assert len(set(scores)) == 3
    best = tried[scores.index(max(scores))]
    chosen = answer("auto", strict, targets.part(0, 1))
    assert chosen.notes == (best.method,)
    torch.testing.assert_close(chosen.edits[0], best.vector)


def test_the_difference_trained_mapper_is_another_one(
    bench: Make, scene: Scene, targets: EvalSet
) -> None:
    other = fresh_mapper(scene, 7)
    found = answer("differences", bench(differences=other), targets)
    with torch.no_grad():
        expected = other(scene.embedder.embed_pictures(list(targets.pictures))).directions
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


@pytest.mark.parametrize(
    ("name", "draws"), [("consistent", True), ("paper", True), ("release", False)]
)
def test_the_seed_decides_what_a_teacher_draws(
    name: str, draws: bool, bench: Make, targets: EvalSet
) -> None:
    few = targets.part(0, 2)
    one, other = (answer(name, bench(seed=seed), few).edits for seed in (0, 1))
    assert torch.allclose(one, other, atol=1e-2) != draws


def test_the_teacher_of_identity_uses_the_model(bench: Make, targets: EvalSet) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = IdentityConfig(resolution=16, channels=(8, 8), hidden=16, features=5)
        model = AvatarIdentity(config).requires_grad_(False)
    made = bench(identity=model)
    found = answer("identity", made, targets)
    assert found.edits.shape == (3, 6, 8) and found.notes == ("",) * 3
    plain = dataclasses.replace(made.cut(RECIPES["identity"]), identity_weight=0.0)
    seeds = [seed_of("compare", 0, name) for name in targets.ids]
    without, _ = search_in_batches(
        made.scene,
        made.embed(targets, plain),
        plain,
        made.scene.initial(targets.pictures, plain.initial, seeds),
        seeds,
        label="plain",
    )
    assert not torch.allclose(without, found.edits, rtol=0, atol=1e-3)


def test_auto_needs_the_identity_model_of_a_mapper_that_was_taught_by_one(
    bench: Make, scene: Scene
) -> None:
    made = bench()
    assert needs_of(METHODS["auto"], made) == ("mapper", "calibration")
    by_identity = fresh_mapper(scene, 0, recipe={"recipe": asdict(RECIPES["identity"])})
    made = bench(by_identity)
    assert needs_of(METHODS["auto"], made) == ("mapper", "calibration", "identity")
    assert needs_of(METHODS["mapper"], made) == ("mapper",)


def test_a_search_is_cut_where_it_is_told_to(bench: Make, targets: EvalSet) -> None:
    few = targets.part(0, 1)
    one, two = (answer("consistent", bench(max_steps=n), few) for n in (1, 2))
    assert not torch.equal(one.edits, two.edits)
    recipe = RECIPES["paper"]
    assert bench(max_steps=7).cut(recipe) == dataclasses.replace(recipe, steps=7)
    assert bench(max_steps=10**6).cut(recipe) == bench(max_steps=None).cut(recipe) == recipe


def test_clip_blending_brings_each_source_nearer_to_the_mean_of_both(
    bench: Make, targets: EvalSet
) -> None:
    # Random networks are rougher ground than trained ones: smaller steps.
    slower = dataclasses.replace(BLENDING, learning_rate=0.03, steps=20)
    made = bench(max_steps=None, max_images=4)
    edits = by_clip_blending(made, targets, slower).edits
    assert edits.shape == (3, 3, 6, 8) and not edits.requires_grad
    generator, embedder = made.scene.generator, made.scene.embedder

    def embed(ws: Tensor) -> Tensor:
        with torch.no_grad():
            return F.normalize(embedder.embed_images(generator.synthesis(ws)), dim=1)

    before = embed(made.sources)
    goal = F.normalize(before[None] + goals(made, targets)[:, None], dim=2)
    after = embed((made.sources + edits).flatten(0, 1)).unflatten(0, (3, 3))
    gained = (after * goal).sum(dim=2) - (before * goal).sum(dim=2)
    assert gained.min() > 0
    alone = by_clip_blending(made, targets.part(2, 3), slower).edits[0]
    torch.testing.assert_close(edits[2], alone, rtol=1e-2, atol=1e-2)


def test_a_search_for_each_source_brings_it_nearer_than_one_for_all(
    bench: Make, targets: EvalSet
) -> None:
    few = dataclasses.replace(EACH_SOURCE, identity_weight=0.0, steps=15, learning_rate=0.05)
    made = bench(max_steps=None)
    edits = by_each_source(made, targets, few).edits
    assert edits.shape == (3, 3, 6, 8) and not edits.requires_grad
    goal = made.embed(targets, few)
    mean = edits.mean(dim=1, keepdim=True).expand_as(edits)
    each, one = (made.scene.score(goal, made.sources, moved).transfer for moved in (edits, mean))
    before = made.scene.score(goal, made.sources, torch.zeros_like(edits)).transfer
    assert (each > before).all() and each.mean() > one.mean()
    # Neither other targets nor other sources change a search.
    other = dataclasses.replace(made, sources=made.sources[1:])
    alone = by_each_source(other, targets.part(2, 3), few).edits
    torch.testing.assert_close(alone[0], edits[2, 1:], rtol=1e-2, atol=1e-2)


# One pass


def test_latent_blending_adds_all_of_the_target(bench: Make, targets: EvalSet) -> None:
    made = bench()
    found = answer("latent-blending", made, targets).edits
    inverted = made.scene.invert(targets.pictures)
    torch.testing.assert_close(made.scene.generator.mean_w + found, inverted)


def test_an_encoder_answers_with_an_offset_from_its_mean(
    bench: Make, scene: Scene, targets: EvalSet
) -> None:
    encoder = scene.inverter
    assert encoder is not None
    found = answer("encoder", bench(encoder=encoder), targets).edits
    image = scene.images_of(targets.pictures[1:2])
    torch.testing.assert_close(found[1], (encoder(image) - encoder.mean_w)[0])


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
def info(scene: Scene) -> DatasetInfo:
    return DatasetInfo(
        name="tiny", generator=scene.generator.fingerprint, resolution=16, num_ws=6, w_dim=8,
        embedder="tiny", embedder_fingerprint=scene.embedder.fingerprint, preprocess="consistent",
        recipe="consistent", settings={}, truncation=1.0, precision="no", seed=0,
        targets=("avataaars:80",), sources="none", held_out="none", licence="mit",
        licence_text="", command="none",
    )  # fmt: skip


def write_pairs(folder: Path, info: DatasetInfo) -> Path:
    """Write pairs and the report of their build."""
    columns = features(32, 6, 8)
    folder.mkdir()
    chunk = folder / "chunk.parquet"
    chunk.write_bytes(chunk_bytes([linear_pair(i) for i in range(80)], [], columns))
    merge([chunk], folder / "pairs", columns, info)
    settings = {"generator": info.generator, "embedder": info.embedder_fingerprint}
    (folder / "pairs" / REPORT).write_text(json.dumps({"settings": settings}))
    return folder / "pairs"


@pytest.fixture
def table(tmp_path: Path, info: DatasetInfo, scene: Scene) -> PairTable:
    """64 train pairs of a linear teacher."""
    return open_pair_table(write_pairs(tmp_path / "made", info), scene)


def train_pairs() -> list[Pair]:
    found = [linear_pair(i) for i in range(80)]
    return [pair for pair in found if pair.split == "train"]


def test_the_mean_direction_is_the_same_for_every_target(
    bench: Make, table: PairTable, targets: EvalSet
) -> None:
    found = answer("mean-direction", bench(pairs=table), targets).edits
    mean = np.stack([pair.direction for pair in train_pairs()]).mean(axis=0)
    for direction in found:
        np.testing.assert_allclose(direction, mean, atol=1e-5)


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


@pytest.mark.parametrize("network", ["generator", "embedder_fingerprint"])
def test_pairs_of_another_network_are_refused(
    network: str, tmp_path: Path, info: DatasetInfo, scene: Scene
) -> None:
    other = dataclasses.replace(info, **{network: "0" * 64})
    with pytest.raises(ValueError, match="build pairs for this world"):
        open_pair_table(write_pairs(tmp_path / "other", other), scene)


# The right answer


class Pixels(torch.nn.Module):
    """An inverter whose latents are the pictures themselves."""

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(2)


def test_the_right_answer_keeps_who_it_is_and_brings_the_essence(scene: Scene) -> None:
    truth = in_range(1).truth
    assert truth is not None
    numbers = [torch.Generator().manual_seed(seed) for seed in source_seeds(TEST_SOURCES, 2)]
    z = torch.stack([torch.randn(VALUES, generator=number) for number in numbers])
    faces = [tuple(face) for face in indices_from_z(z).tolist()]
    sizes = StyleGAN2Config(
        resolution=128, w_dim=8, z_dim=VALUES, mapping_layers=1, channels=(8,) * 6
    )
    other = dataclasses.replace(scene, generator=StyleGAN2(sizes), inverter=Pixels())
    drawn = torch.stack([other.images_of([Image.fromarray(draw_face(f)[0])])[0] for f in faces])
    edits = right_answer(other, truth, drawn.flatten(2))
    assert edits.shape == (1, 2, 3, 128 * 128)
    changed = edits[0].unflatten(2, (128, 128)).abs().sum(dim=1) > 0.05
    # The background stays; the source's own essence changes nothing.
    assert changed.any() and not changed[:, 0, 0].any()
    own = right_answer(other, truth_of(faces), drawn.flatten(2))
    assert not own[0, 0].any() and not own[1, 1].any() and own[0, 1].any()
