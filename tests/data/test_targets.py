"""Targets: the same ones whatever they are called, in whatever order, however many."""

import hashlib
import io
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

import data.targets
from data.illustrated.avatars import HELD_OUT, TRAINED
from data.targets import (
    DRAWN,
    BadTarget,
    DatasetTargets,
    FolderTargets,
    Target,
    TargetSet,
    avatar_at,
    check_trainable,
    default_targets,
    hub_datasets,
    layer_thirds,
    of_split,
    open_targets,
    portable,
    sampled,
    split_of,
)
from targetclip.generators import Generator, load_generator
from targetclip.world import load_world

RED, BLUE, GREEN = (255, 0, 0), (0, 0, 255), (0, 255, 0)
RED_ID = "67e978eb67c3de42"  # sha256(b"6x4/" + 24 red pixels), its first 16 digits

SPLITS = {
    "0000000000000000": "train",
    "0000000000000025": "validation",
    "000000000000002f": "test",
    "f20e502af024571f": "train",
}


def plain(colour: tuple[int, int, int] = RED, width: int = 6, height: int = 4) -> Image.Image:
    return Image.new("RGB", (width, height), colour)


def encoded(picture: Image.Image, format_name: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, format=format_name, **options)
    return stream.getvalue()


def good(targets: Iterable[Target | BadTarget]) -> list[Target]:
    found = list(targets)
    assert all(isinstance(target, Target) for target in found), found
    return [target for target in found if isinstance(target, Target)]


def bad(targets: Iterable[Target | BadTarget]) -> dict[str, str]:
    reasons = {t.origin: t.reason for t in targets if isinstance(t, BadTarget)}
    assert not any("\n" in reason for reason in reasons.values())
    return reasons


def ids(targets: Iterable[Target | BadTarget]) -> list[str]:
    return [target.id for target in good(targets)]


def pixels(target: Target) -> bytes:
    return target.picture.tobytes()


def error_of(spec: str, error: type[Exception] = ValueError) -> str:
    with pytest.raises(error) as caught:
        open_targets(spec)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="session")
def generator(tiny_world: Path) -> Generator:
    return load_generator(tiny_world.parent / "generator.safetensors")


@pytest.fixture
def faces(tmp_path: Path) -> Path:
    """A folder with two pictures, and three files that are none."""
    folder = tmp_path / "faces"
    (folder / "more").mkdir(parents=True)
    (folder / "red.png").write_bytes(encoded(plain()))
    (folder / "more" / "BLUE.Jpg").write_bytes(encoded(plain(BLUE), "JPEG"))
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    whole = encoded(Image.fromarray(noise))
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.webp").write_bytes(b"")
    (folder / "notes.png").write_text("not a picture")
    return folder


# Splits


def test_the_id_alone_decides_the_split() -> None:
    assert {target_id: split_of(target_id) for target_id in SPLITS} == SPLITS
    counts = Counter(split_of(f"{number:016x}") for number in range(20_000))
    assert counts["train"] == pytest.approx(18_000, abs=200)
    assert counts["validation"] == pytest.approx(1000, abs=120)
    assert counts["test"] == pytest.approx(1000, abs=120)


def test_the_first_targets_of_a_split_are_taken_and_bad_ones_left_out(faces: Path) -> None:
    drawn = open_targets("avataaars:60@29")
    for split in ("train", "validation", "test"):
        every = [each.id for each in good(drawn) if split_of(each.id) == split]
        assert every and ids(of_split(drawn, split, 100)) == every
        assert ids(of_split(drawn, split, 2)) == every[:2]
    mixed = open_targets(str(faces))
    assert bad(mixed) and not bad(of_split(mixed, "train", 100))


# Folders


def test_bad_files_are_named_and_the_others_read(faces: Path, tmp_path: Path) -> None:
    targets = open_targets(str(faces))
    found = list(targets)
    assert isinstance(targets, TargetSet) and targets.spec == str(faces)
    assert len(targets) == len(found) == 5
    assert [target.origin for target in found] == [
        "faces/cut.png", "faces/empty.webp", "faces/more/BLUE.Jpg", "faces/notes.png",
        "faces/red.png",
    ]  # fmt: skip
    reasons = bad(found)
    assert "'faces/cut.png' is damaged or cut short" in reasons["faces/cut.png"]
    assert "'faces/empty.webp' is an empty file" in reasons["faces/empty.webp"]
    assert "not a picture of a known kind" in reasons["faces/notes.png"]
    assert not any(str(tmp_path) in reason for reason in reasons.values())
    pictures = [target.picture for target in found if isinstance(target, Target)]
    assert [picture.mode for picture in pictures] == ["RGB", "RGB"]
    assert pictures[1].getcolors() == [(24, RED)]


def test_a_picture_keeps_its_id_under_other_names_and_compressions(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded(plain(), compress_level=0))
    (tmp_path / "b.PNG").write_bytes(encoded(plain(), compress_level=9, optimize=True))
    (tmp_path / "c.bmp").write_bytes(encoded(plain(), "BMP"))
    (tmp_path / "d.png").write_bytes(encoded(plain(width=4, height=6)))  # the same bytes of pixels
    assert ids(open_targets(str(tmp_path)))[:3] == [RED_ID] * 3


def test_the_order_is_that_of_the_names_not_of_the_disk(tmp_path: Path) -> None:
    names = ["b/1.png", "a.png", "z.png", "a/2.png", "B.png", "a-b.png"]
    listed = []
    for order in (names, names[::-1]):
        folder = tmp_path / str(len(listed)) / "faces"
        for name in order:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(encoded(plain()))
        listed.append([target.origin for target in open_targets(str(folder))])
    assert listed[0] == listed[1] == sorted(f"faces/{name}" for name in names)


def test_hidden_and_other_files_and_links_to_folders_are_left_out(
    faces: Path, tmp_path: Path
) -> None:
    (faces / ".cache").mkdir()
    (faces / ".cache" / "x.png").write_bytes(encoded(plain()))
    (faces / "._red.png").write_bytes(encoded(plain()))
    (faces / "red.txt").write_bytes(encoded(plain()))
    (faces / "loop.png").symlink_to(faces)
    (tmp_path / ".hidden").symlink_to(faces)
    assert len(open_targets(str(faces))) == 5
    assert len(open_targets(str(tmp_path / ".hidden"))) == 5  # the user named this one


def test_every_kind_that_is_read_is_taken_and_what_else_is_there_is_counted_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "faces"
    (folder / "more").mkdir(parents=True)
    red = encoded(plain())
    kinds = {"a.gif": "GIF", "b.jfif": "JPEG", "c.JPE": "JPEG", "d.dib": "BMP", "more/e": "WEBP"}
    for name, kind in kinds.items():
        (folder / name).write_bytes(encoded(plain(), kind))
    (folder / "f.tif").write_bytes(encoded(plain(), "TIFF"))
    (folder / "more" / "notes").write_text("not a picture")
    (folder / "g.heic").write_bytes(red)
    os.mkfifo(folder / "pipe")
    (folder / "linked").symlink_to(folder / "more")
    (folder / ".DS_Store").touch()
    targets = open_targets(str(folder))
    assert [target.origin for target in good(targets)] == [f"faces/{name}" for name in kinds]
    assert isinstance(targets, FolderTargets)
    assert targets.others == ("f.tif", "g.heic", "linked", "more/notes", "pipe")
    assert "5 of 10 are not taken: f.tif, g.heic, linked, more/notes, pipe" in caplog.text
    assert "as PNG or JPEG" in caplog.text
    for name in kinds:
        (folder / name).unlink()
    assert "found 5 others: f.tif" in error_of(str(folder))


def test_the_identity_of_a_folder_is_that_of_older_plans(faces: Path) -> None:
    digest = hashlib.sha256()
    for name in ("cut.png", "empty.webp", "more/BLUE.Jpg", "notes.png", "red.png"):
        digest.update(name.encode() + b"\0")
        digest.update(hashlib.sha256((faces / name).read_bytes()).hexdigest().encode() + b"\n")
    (faces / "licence.txt").write_text("none")
    assert open_targets(str(faces)).identity() == digest.hexdigest()


def test_the_default_targets_are_those_of_the_world(tiny_world: Path) -> None:
    own, other = load_world("avatars"), load_world(str(tiny_world))
    assert default_targets(own, 17, 20, 5) == (
        "avataaars:20@17", "styles:20@17", "generated:5@17", "mixed:5@17",
    )  # fmt: skip
    assert default_targets(own, 23, 32) == ("avataaars:32@23", "styles:32@23")
    assert default_targets(other, 17, 20, 5) == ("generated:25@17", "mixed:25@17")
    assert default_targets(other, 23, 32) == ("generated:32@23", "mixed:32@23")


def test_a_spec_is_shown_without_paths_and_names_of_the_hub_are_told_apart(tmp_path: Path) -> None:
    specs = (f"{tmp_path}/", f"dataset:{tmp_path}#test", "dataset:a/b#train#image", "styles:5@3")
    name = tmp_path.name
    shown = [name, f"dataset:{name}#test", "dataset:a/b#train#image", "styles:5@3"]
    assert [portable(spec) for spec in specs] == shown
    assert hub_datasets((*specs, "dataset:a/b")) == ("a/b",)


def test_a_file_that_cannot_be_opened_is_a_bad_target(tmp_path: Path) -> None:
    folder = tmp_path / "faces"
    folder.mkdir()
    (folder / "gone.png").symlink_to(folder / "nowhere")
    os.mkfifo(folder / "pipe.png")
    targets = open_targets(str(folder))
    assert isinstance(targets, FolderTargets)
    assert bad(targets) == {
        f"faces/{name}.png": f"no picture at 'faces/{name}.png'; check the path"
        for name in ("gone", "pipe")
    }
    assert len(targets.stats()) == 2
    before = targets.identity()
    (folder / "nowhere").write_bytes(encoded(plain()))
    assert targets.identity() != before and len(bad(targets)) == 1


def test_any_name_of_a_file_gives_a_line_of_text(tmp_path: Path) -> None:
    folder = tmp_path / "faces"
    folder.mkdir()
    for name in (b"two\nlines.png", b"latin-\xe9.png", "smörgås.png".encode()):
        (folder / os.fsdecode(name)).write_bytes(encoded(plain()) if b"sm" in name else b"")
    targets = open_targets(str(folder))
    assert isinstance(targets, FolderTargets)
    origins = [target.origin for target in targets]
    assert origins == ["faces/latin-\\udce9.png", "faces/smörgås.png", "faces/two\\nlines.png"]
    assert [f"faces/{name}" for name, _, _ in targets.stats()] == origins
    assert len(bad(targets)) == 2 and len(targets.identity()) == 64
    for target in targets:
        f"{target}".encode()


def test_what_a_folder_holds_decides_its_identity_and_its_stats(tmp_path: Path) -> None:
    def make(name: str, colour: tuple[int, int, int] = RED, file: str = "a.png") -> FolderTargets:
        folder = tmp_path / name
        folder.mkdir()
        (folder / file).write_bytes(encoded(plain(colour)))
        targets = open_targets(str(folder))
        assert isinstance(targets, FolderTargets)
        return targets

    first, moved = make("first"), make("moved")
    assert first.identity() == moved.identity()
    others = {make("colour", BLUE).identity(), make("renamed", RED, "b.png").identity()}
    assert len(others | {first.identity()}) == 3

    before = first.stats()
    path = tmp_path / "first" / "a.png"
    assert before == [("a.png", path.stat().st_size, path.stat().st_mtime_ns)]
    os.utime(path, ns=(0, 1))
    assert first.stats() == [("a.png", path.stat().st_size, 1)]
    assert first.identity() == moved.identity()


def test_a_folder_without_pictures_and_a_file_are_refused(faces: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert ".jpeg" in error_of(str(tmp_path / "empty"))
    assert "a file: give its folder" in error_of(str(faces / "red.png"))


def test_a_folder_that_may_not_be_read_is_not_passed_over(
    faces: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scandir = os.scandir

    def refuse(path: str) -> object:
        if Path(path).name == "more":
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)  # a mode of 000 does not stop root
    with pytest.raises(PermissionError, match="more"):
        open_targets(str(faces))


# Samples of a generator


@pytest.mark.parametrize("kind", ["generated", "mixed"])
def test_a_sample_does_not_depend_on_how_many_there_are(kind: str, generator: Generator) -> None:
    three, five = (good(open_targets(f"{kind}:{n}", generator, 0.7)) for n in (3, 5))
    assert [(t.id, t.origin, pixels(t)) for t in three] == [
        (t.id, t.origin, pixels(t)) for t in five[:3]
    ]
    assert [target.origin for target in three] == [f"{kind}:{i}" for i in range(3)]
    assert len({pixels(target) for target in five}) == len({target.id for target in five}) == 5
    assert three[0].picture.size == (16, 16) and three[0].picture.mode == "RGB"


class Renamed:
    """Another generator that makes the same pictures."""

    fingerprint = "other"

    def __init__(self, generator: Generator) -> None:
        self.resolution, self.z_dim = generator.resolution, generator.z_dim
        self.w_dim, self.num_ws = generator.w_dim, generator.num_ws
        self.mean_w = generator.mean_w
        self.mapping, self.synthesis = generator.mapping, generator.synthesis


def test_ids_of_samples_name_all_that_decides_them(generator: Generator) -> None:
    sets = [
        open_targets(spec, of, truncation)
        for spec in ("generated:2", "generated:2@7", "mixed:2", "mixed:2@7")
        for of in (generator, Renamed(generator))
        for truncation in (1.0, 0.5)
    ]
    assert len({target_id for targets in sets for target_id in ids(targets)}) == 2 * len(sets)
    assert len({targets.identity() for targets in sets}) == len(sets)
    assert ids(open_targets("generated:2", generator, 1)) == ids(sets[0])
    assert pixels(good(sets[0])[0]) == pixels(good(sets[2])[0])


def test_another_seed_truncation_or_mixing_gives_another_picture(generator: Generator) -> None:
    sets = [
        open_targets("generated:3", generator), open_targets("generated:3", generator, 0.5),
        open_targets("generated:3@7", generator), open_targets("mixed:3", generator),
        open_targets("mixed:3@7", generator),
    ]  # fmt: skip
    assert len({pixels(target) for targets in sets for target in good(targets)}) == 15
    assert [target.origin for target in sets[2]] == [f"generated:{i}@7" for i in range(3)]


def test_a_mixed_sample_has_three_latents(
    generator: Generator,
) -> None:
    seen = []
    other = Renamed(generator)
    other.synthesis = lambda ws: (seen.append(ws[0]), generator.synthesis(ws))[1]
    list(open_targets("generated:1", other))
    list(open_targets("mixed:1", other))
    distances = [(ws[1:] - ws[:-1]).abs().amax(dim=1) > 1e-3 for ws in seen]
    assert distances[0].tolist() == [False] * 5
    assert distances[1].tolist() == [False, True, False, True, False]


def test_layers_are_parted_as_the_bundled_generator_was_trained() -> None:
    assert layer_thirds(12) == [0] * 4 + [1] * 4 + [2] * 4
    assert layer_thirds(18) == [0] * 6 + [1] * 6 + [2] * 6


def test_a_sample_that_is_not_finite_is_a_bad_target(generator: Generator) -> None:
    other = Renamed(generator)
    other.synthesis = lambda ws: generator.synthesis(ws) * float("nan")
    assert "NaN" in bad(open_targets("generated:1", other))["generated:0"]


# Avatars


@pytest.mark.parametrize("kind", DRAWN)
def test_an_avatar_does_not_depend_on_how_many_there_are(kind: str) -> None:
    three, five = (good(open_targets(f"{kind}:{n}")) for n in (3, 5))
    assert [(t.id, t.origin, pixels(t)) for t in three] == [
        (t.id, t.origin, pixels(t)) for t in five[:3]
    ]
    assert len({pixels(target) for target in five}) == 5
    assert three[0].picture.size == (128, 128) and three[0].picture.mode == "RGB"
    seven = good(open_targets(f"{kind}:3@7"))
    assert not {pixels(target) for target in three} & {pixels(target) for target in seven}
    identities = {open_targets(f"{kind}:{n}").identity() for n in ("3", "5", "3@7")}
    assert len(identities) == 3


def test_ids_of_avatars_are_the_same_for_ever() -> None:
    assert ids(open_targets("avataaars:1")) == ["f341389c94e3b5ab"]
    assert ids(open_targets("styles:1@7")) == ["a92b2d236a949dcd"]
    assert ids(open_targets("held-out:1")) == ["a798d27594071ca6"]


def test_styles_that_are_held_out_are_of_their_own_kind_alone() -> None:
    shown = {kind: {avatar_at(kind, 0, i)[0] for i in range(40)} for kind in DRAWN[1:]}
    assert shown == {"styles": set(TRAINED), "held-out": set(HELD_OUT)}
    assert not set(TRAINED) & set(HELD_OUT)


def test_nothing_is_learned_from_styles_that_are_held_out() -> None:
    check_trainable([*default_targets(load_world("avatars"), 17, 20, 5), "faces/held-out"])
    with pytest.raises(ValueError, match=r"found 'held-out:5@1', .* give 'styles:5@1'"):
        check_trainable(["styles:2", "held-out:5@1"])
    # Of the trainings that draw avatars themselves one names these styles, to measure itself by.
    trainings = Path(__file__).parents[2].joinpath("train").rglob("*.py")
    naming = {p.stem: p.read_text() for p in trainings if re.search(r"HELD_OUT\b", p.read_text())}
    assert set(naming) == {"clip"}
    assert "pictures_of(folder, TRAINED, config.pictures, config.seed)" in naming["clip"]


# Datasets


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No cache but the test's own; the network is never asked in tests."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / ".hf")


def table(*contents: bytes | None, path: str | None = None) -> datasets.Dataset:
    cells = [None if content is None else {"bytes": content, "path": None} for content in contents]
    if path is not None:
        cells.append({"bytes": None, "path": path})
    return datasets.Dataset.from_dict(
        {"name": [str(i) for i in range(len(cells))], "photo": cells, "mask": cells[::-1]},
        features=datasets.Features(
            {"name": datasets.Value("string"), "photo": datasets.Image(), "mask": datasets.Image()}
        ),
    )


def rows(path: str | None = None) -> datasets.Dataset:
    return table(encoded(plain()), b"broken", b"", None, encoded(plain(BLUE)), path=path)


def save_to_disk(dataset: datasets.Dataset, folder: Path) -> None:
    dataset.save_to_disk(folder)


def save_as_parquet(dataset: datasets.Dataset, folder: Path) -> None:
    folder.mkdir(parents=True)
    dataset.to_parquet(folder / "train-00000-of-00001.parquet")


SAVERS = pytest.mark.parametrize("save", [save_to_disk, save_as_parquet])


@SAVERS
def test_a_dataset_is_read_row_by_row_and_broken_rows_are_named(
    save: Callable[[datasets.Dataset, Path], None], faces: Path, tmp_path: Path
) -> None:
    save(rows(str(faces / "red.png")), tmp_path / "people")
    targets = open_targets(f"dataset:{tmp_path / 'people'}")
    assert isinstance(targets, DatasetTargets) and isinstance(targets, TargetSet)
    assert len(targets) == 6
    found = list(targets)
    assert [target.origin for target in found] == [f"people:train:{i}" for i in range(6)]
    reasons = bad(found)
    assert "not a picture of a known kind" in reasons["people:train:1"]
    assert "is an empty file" in reasons["people:train:2"]
    assert reasons["people:train:3"] == "'people:train:3' holds no picture"
    kept = [target for target in found if isinstance(target, Target)]
    assert [target.picture.getpixel((0, 0)) for target in kept] == [RED, BLUE, RED]
    assert [target.id for target in kept][::2] == [RED_ID] * 2  # as in a folder


def test_a_file_that_a_row_only_names_is_opened_here_or_not_at_all(faces: Path) -> None:
    targets = open_targets(f"dataset:{faces}")  # read as a folder of pictures
    assert len(targets) == 4 and len(bad(targets)) == 3
    (faces / "red.png").unlink()
    message = "no picture at 'faces:train:{}'; check the path"
    assert list(bad(targets).values())[-1] == message.format(3)
    online = DatasetTargets("", table(path="https://example.org/a.png"), "faces", "train", "photo")
    assert bad(online) == {"faces:train:0": message.format(0)}


def test_a_sample_of_a_set_is_the_same_for_its_seed_and_keeps_names_and_rows(
    tmp_path: Path,
) -> None:
    colours = [(10 * i, 0, 0) for i in range(20)]
    save_to_disk(table(*(encoded(plain(c)) for c in colours)), tmp_path / "people")
    folder = tmp_path / "faces"
    folder.mkdir()
    for i, colour in enumerate(colours):
        plain(colour).save(folder / f"{i:02}.png")
    for spec in (f"dataset:{tmp_path / 'people'}", str(folder)):
        whole = open_targets(spec)
        few, other = sampled(whole, 5, 0), sampled(whole, 5, 1)
        assert ids(few) == ids(sampled(open_targets(spec), 5, 0)) != ids(other)
        assert few.identity() == sampled(open_targets(spec), 5, 0).identity() != other.identity()
        named = {target.origin: target.id for target in good(whole)}
        assert len(few) == 5 and all(named[t.origin] == t.id for t in good(few))
        assert ids(few.starting_at(3)) == ids(few)[3:]
        assert sampled(whole, 20, 0) is sampled(whole, None, 0) is whole


def test_a_sample_of_pictures_from_seeds_is_the_first_of_them() -> None:
    few, first = sampled(open_targets("avataaars:9@5"), 2, 0), open_targets("avataaars:2@5")
    assert (few.spec, few.identity(), ids(few)) == (first.spec, first.identity(), ids(first))


@SAVERS
def test_a_column_can_be_named(
    save: Callable[[datasets.Dataset, Path], None], tmp_path: Path
) -> None:
    save(table(encoded(plain()), encoded(plain(BLUE))), tmp_path / "people")
    spec = f"dataset:{tmp_path / 'people'}"
    photo, mask = open_targets(f"{spec}##photo"), open_targets(f"{spec}#train#mask")
    assert ids(photo) == ids(open_targets(spec)) == ids(mask)[::-1]
    assert photo.identity() == open_targets(spec).identity() != mask.identity()
    for column in ("name", "nothing"):
        message = error_of(f"{spec}##{column}")
        assert repr(column) in message and "['photo', 'mask']" in message


def test_a_split_can_be_named(tmp_path: Path) -> None:
    parts = {"train": table(encoded(plain())), "test": table(encoded(plain(BLUE)))}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    for split, part in parts.items():
        (tmp_path / "files").mkdir(exist_ok=True)
        part.to_parquet(tmp_path / "files" / f"{split}-00000-of-00001.parquet")
    for name in ("saved", "files"):
        spec = f"dataset:{tmp_path / name}"
        [red], [blue] = good(open_targets(spec)), good(open_targets(f"{spec}#test"))
        assert (red.origin, blue.origin) == (f"{name}:train:0", f"{name}:test:0")
        assert (red.picture.getpixel((0, 0)), blue.picture.getpixel((0, 0))) == (RED, BLUE)
        assert open_targets(spec).identity() != open_targets(f"{spec}#test").identity()
        assert "nowhere" in error_of(f"{spec}#nowhere")


def test_a_split_saved_on_its_own_is_that_split(tmp_path: Path) -> None:
    save_as_parquet(rows(), tmp_path / "files")
    loaded = datasets.load_dataset(str(tmp_path / "files"), split="train[:1]")
    loaded.save_to_disk(tmp_path / "part")
    table(encoded(plain())).save_to_disk(tmp_path / "unnamed")
    spec = f"dataset:{tmp_path / 'part'}"
    assert [t.origin for t in good(open_targets(spec))] == [f"part:{loaded.split}:0"]
    assert "#SPLIT" in error_of(f"{spec}#test")
    assert [t.origin for t in open_targets(f"dataset:{tmp_path / 'unnamed'}#test")] == [
        "unnamed:test:0"
    ]
    sliced = good(open_targets(f"dataset:{tmp_path / 'files'}#train[:1]"))
    assert [target.id for target in sliced] == [RED_ID]


@SAVERS
def test_a_datasets_identity_changes_with_its_rows(
    save: Callable[[datasets.Dataset, Path], None], tmp_path: Path
) -> None:
    identities = []
    for number, colours in enumerate([(RED,), (RED, BLUE), (BLUE, RED)]):
        folder = tmp_path / str(number) / "people"
        save(table(*[encoded(plain(colour)) for colour in colours]), folder)
        identities += [open_targets(f"dataset:{folder}").identity() for _ in range(2)]
    assert identities[::2] == identities[1::2] and len(set(identities)) == 3


def test_a_dataset_that_cannot_be_had_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "train.parquet").write_bytes(b"PAR1 and nothing else")
    table().save_to_disk(tmp_path / "empty", num_shards=1)
    save_to_disk(table(encoded(plain())).select_columns("name"), tmp_path / "names")
    (tmp_path / "file.parquet").write_bytes(b"")
    assert "magic bytes" in error_of(f"dataset:{tmp_path / 'damaged'}")
    assert "found none" in error_of(f"dataset:{tmp_path / 'empty'}")
    assert "Image columns" in error_of(f"dataset:{tmp_path / 'names'}")
    assert "'nobody/nothing'" in error_of("dataset:nobody/nothing")
    for name in ("nowhere", "file.parquet"):
        message = error_of(f"dataset:{tmp_path / name}", FileNotFoundError)
        assert name in message and "check it" in message
    for spec in ("dataset:", "dataset:#train", "dataset:a#b#c#d"):
        assert "dataset:PATH_OR_NAME[#SPLIT[#COLUMN]]" in error_of(spec)


# Specs


@pytest.mark.parametrize("kind", ["folder", "dataset", "generated", "avataaars", "styles"])
def test_an_iteration_can_start_later_without_decoding_what_is_before(
    kind: str, faces: Path, generator: Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows().save_to_disk(tmp_path / "people")
    specs = {"folder": str(faces), "dataset": f"dataset:{tmp_path / 'people'}"}
    targets = open_targets(specs.get(kind, f"{kind}:5"), generator)
    found = list(targets)
    decoded = []
    for name in ("decode_picture", "read_picture", "render_sample", "draw_avatar"):
        whole = getattr(data.targets, name)
        monkeypatch.setattr(
            data.targets, name, lambda *a, whole=whole: (decoded.append(a), whole(*a))[1]
        )
    targets = open_targets(targets.spec, generator)
    for start in range(len(found) + 1):
        decoded.clear()
        later = list(targets.starting_at(start))
        assert [target.origin for target in later] == [t.origin for t in found[start:]]
        assert [getattr(t, "id", t) for t in later] == [getattr(t, "id", t) for t in found[start:]]
        assert len(decoded) <= len(later)


@pytest.mark.parametrize(
    "spec",
    ["", "nowhere", "drawn", "styles:", "styles:0", "styles:-1", "styles:1.5", "styles:1_000",
     "avataaars:٣", "styles:2@", "styles:2@-1", "styles:2@x", "Generated:1", "generated:1 ",
     "mixed:" + 20 * "9", "painted:3", "a\0b"],
)  # fmt: skip
def test_anything_else_is_refused_with_what_there_is(spec: str) -> None:
    message = error_of(spec)
    assert repr(spec) in message
    for form in (
        "a folder",
        "dataset:",
        "generated:N[@SEED]",
        "mixed:N",
        "avataaars:N",
        "held-out:N",
    ):
        assert form in message


@pytest.mark.parametrize("kind", ["generated", "mixed"])
def test_samples_need_a_generator(kind: str) -> None:
    assert "expected a generator" in error_of(f"{kind}:3")


@pytest.mark.parametrize(
    ("spec", "meant"),
    [("style:5", "styles:5"), ("generate:7@3", "generated:7@3"), ("datasets:a/b", "dataset:a/b")],
)
def test_a_misspelt_kind_of_targets_gets_its_nearest_name(spec: str, meant: str) -> None:
    with pytest.raises(ValueError, match=f"did you mean '{meant}'"):
        open_targets(spec)


def test_a_kind_that_is_right_is_not_corrected() -> None:
    with pytest.raises(ValueError, match=r"none of these$"):
        open_targets("avataaars:many")
