"""The mapper's network, its file, and how the Hub keeps it."""

import dataclasses
import json
import os
import socket
import stat
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_fake import Hub, hub_running
from huggingface_hub import ModelCard, PyTorchModelHubMixin, close_session, constants
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from predictor.mapper import Mapper, load_mapper, save_mapper
from predictor.mapper_file import (
    FIRST_FORMAT,
    FORMAT,
    MapperConfig,
    MapperRecord,
    trained_recipe,
)
from targetclip.command import in_precision
from targetclip.recipes import RECIPES

CONFIG = MapperConfig(
    embed_dim=12, num_ws=6, w_dim=8, generator="a" * 64, embedder="e" * 64, width=16, depth=2
)
RECORD = MapperRecord(
    recipe={"name": "amortized", "weights": {"transfer": 1.0}},
    calibration={"threshold": 0.25},
    licence="MIT",
    trained_on="drawn faces",
    version="0.1.0",
)
MEASURED = dataclasses.replace(
    RECORD,
    command="python -m train.mapper --out mapper\npython -m eval.calibrate --out calibrated",
    validation={"transfer_score": 0.8125},
    datasets=("somebody/faces",),
)

Spoil = Callable[[dict[str, Tensor]], object]


def fresh(config: MapperConfig = CONFIG) -> Mapper:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Mapper(config)


@pytest.fixture
def mapper() -> Mapper:
    """As after training: no weight or buffer is what it was at the start."""
    network = fresh()
    numbers = torch.Generator().manual_seed(1)
    for tensor in network.state_dict().values():
        tensor.add_(0.1 * torch.randn(tensor.shape, generator=numbers))
    return network


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "mapper.safetensors"


def embeddings(count: int = 4, size: int = 12) -> Tensor:
    return 5 * torch.randn(count, size, generator=torch.Generator().manual_seed(2))


def error_of(path: Path, generator: str | None = None, embedder: str | None = None) -> str:
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        load_mapper(path, generator, embedder)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message
    return message


@pytest.mark.parametrize(("num_ws", "w_dim", "embed_dim"), [(10, 128, 128), (18, 512, 512)])
def test_a_batch_of_embeddings_becomes_directions_and_scores(
    num_ws: int, w_dim: int, embed_dim: int
) -> None:
    sizes = {"embed_dim": embed_dim, "num_ws": num_ws, "w_dim": w_dim, "width": 32, "depth": 1}
    network = fresh(dataclasses.replace(CONFIG, **sizes))
    found = network(embeddings(3, embed_dim))
    assert found.directions.shape == (3, num_ws, w_dim) and found.expected.shape == (3,)
    assert found.directions.dtype == found.expected.dtype == torch.float32
    assert found.expected.abs().max() <= 1


def test_directions_of_a_rank_are_mixtures_of_so_many() -> None:
    network = fresh(dataclasses.replace(CONFIG, rank=3)).requires_grad_(False)
    numbers = torch.Generator().manual_seed(1)
    for name, tensor in network.state_dict().items():
        if name not in ("scale", "centre"):
            tensor.add_(torch.randn(tensor.shape, generator=numbers))
    found = (network(embeddings(40)).directions / network.scale).flatten(1)
    assert int(torch.linalg.matrix_rank(found, rtol=1e-4)) == 3
    whole = fresh(CONFIG).requires_grad_(False)
    for name, tensor in whole.state_dict().items():
        if name not in ("scale", "centre"):
            tensor.add_(torch.randn(tensor.shape, generator=numbers))
    found = (whole(embeddings(40)).directions / whole.scale).flatten(1)
    assert int(torch.linalg.matrix_rank(found, rtol=1e-4)) > 3


def test_a_mapper_of_a_rank_outlives_its_file(path: Path) -> None:
    network = fresh(dataclasses.replace(CONFIG, rank=3)).requires_grad_(False)
    save_mapper(network, path, RECORD)
    found, _ = load_mapper(path)
    assert found.config.rank == 3
    assert torch.equal(found(embeddings()).directions, network(embeddings()).directions)


def test_a_row_is_the_same_alone_and_among_others(mapper: Mapper) -> None:
    together = mapper(embeddings())
    for i in range(4):
        alone = mapper(embeddings()[i : i + 1])
        torch.testing.assert_close(alone.directions[0], together.directions[i])
        torch.testing.assert_close(alone.expected[0], together.expected[i])
    assert not torch.allclose(together.directions[0], together.directions[1], atol=1e-3)
    assert not torch.allclose(together.expected[0], together.expected[1], atol=1e-3)


def test_raw_and_unit_embeddings_give_the_same(mapper: Mapper) -> None:
    raw = mapper(embeddings())
    unit = mapper(torch.nn.functional.normalize(embeddings(), dim=1))
    torch.testing.assert_close(raw.directions, unit.directions)
    torch.testing.assert_close(raw.expected, unit.expected)


def test_a_target_is_read_as_its_difference_from_the_centre(mapper: Mapper) -> None:
    difference = torch.nn.functional.normalize(embeddings(), dim=1) - mapper.centre
    torch.testing.assert_close(
        mapper.directions_of_differences(difference), mapper(embeddings()).directions
    )


def test_the_network_reads_differences_whitened(mapper: Mapper) -> None:
    difference = torch.nn.functional.normalize(embeddings(), dim=1) - mapper.centre
    before = mapper.directions_of_differences(difference)
    white = difference @ mapper.whitening
    mapper.whitening.copy_(torch.eye(12))
    torch.testing.assert_close(mapper.directions_of_differences(white), before)
    assert not torch.allclose(mapper.directions_of_differences(difference), before, atol=1e-3)


def test_until_set_the_whitening_brings_unit_vectors_to_coordinates_of_about_one() -> None:
    unit = torch.nn.functional.normalize(embeddings(), dim=1)
    white = fresh().whitened_targets(unit)  # the centre is zeros until set
    torch.testing.assert_close(white.square().mean(dim=1), torch.ones(4))


def test_half_precision_embeddings_are_read(mapper: Mapper) -> None:
    half = embeddings().half()
    assert torch.equal(mapper(half).directions, mapper(half.float()).directions)


def test_computed_in_bfloat16_the_answer_is_still_float32(mapper: Mapper) -> None:
    with torch.no_grad():
        exact = mapper(embeddings())
        with in_precision(mapper.scale.device, "bf16"):
            found = mapper(embeddings())
    assert found.directions.dtype == found.expected.dtype == torch.float32
    torch.testing.assert_close(found.directions, exact.directions, rtol=0.1, atol=0.05)


def test_directions_grow_with_scale(mapper: Mapper) -> None:
    before = mapper(embeddings()).directions
    mapper.scale[1, 2] *= 3
    after = mapper(embeddings()).directions
    torch.testing.assert_close(after[:, 1, 2], 3 * before[:, 1, 2])
    assert torch.equal(after[:, 0], before[:, 0])


def test_a_fresh_mapper_moves_sources_hardly_but_not_nowhere() -> None:
    network = fresh(dataclasses.replace(CONFIG, width=256)).requires_grad_(False)
    found = network(embeddings(64))
    assert found.directions.isfinite().all() and found.expected.isfinite().all()
    assert 0.002 < float(found.directions.std()) < 0.03


def test_an_embedding_of_zeros_gives_finite_numbers(mapper: Mapper) -> None:
    found = mapper(torch.zeros(1, 12))
    assert found.directions.isfinite().all() and found.expected.isfinite().all()


def test_the_same_embeddings_give_the_same_bits_in_training_too(mapper: Mapper) -> None:
    mapper.train()
    assert torch.equal(mapper(embeddings()).directions, mapper(embeddings()).directions)


def test_knowing_the_score_changes_nothing_but_its_own_head(mapper: Mapper) -> None:
    mapper(embeddings()).expected.sum().backward()
    moved = {name for name, weight in mapper.named_parameters() if weight.grad is not None}
    assert moved == {"score.weight", "score.bias", "score_linear.weight"}


def test_the_direction_changes_everything_but_the_scores_head(mapper: Mapper) -> None:
    mapper(embeddings()).directions.square().sum().backward()
    still = {
        name
        for name, weight in mapper.named_parameters()
        if weight.grad is None or not weight.grad.any()
    }
    assert still == {"score.weight", "score.bias", "score_linear.weight"}


def test_embeddings_of_another_size_are_refused(mapper: Mapper) -> None:
    for call in (mapper, mapper.directions_of_differences):
        for size in (1, 13):
            with pytest.raises(ValueError, match=r"\[batch, 12\].*eeeeeeeeeeee"):
                call(torch.zeros(2, size))


# Its file


@pytest.mark.parametrize(
    "change", [{"width": 0}, {"depth": -1}, {"num_ws": True}, {"embedder": ""}]
)
def test_a_config_without_sense_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        dataclasses.replace(CONFIG, **change)


def test_a_saved_mapper_is_the_same_to_the_bit(mapper: Mapper, path: Path) -> None:
    save_mapper(mapper, path, RECORD)
    loaded, record = load_mapper(path, CONFIG.generator, CONFIG.embedder)
    assert loaded.config == CONFIG and record == loaded.record == RECORD
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    state = mapper.state_dict()
    assert {"centre", "scale"} < state.keys() == loaded.state_dict().keys()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, state[name]) and tensor.dtype == torch.float32, name
    assert torch.equal(loaded(embeddings()).directions, mapper(embeddings()).directions)
    assert torch.equal(loaded(embeddings()).expected, mapper(embeddings()).expected)


def test_a_fingerprint_is_of_the_weights_alone_and_outlives_a_file(
    mapper: Mapper, path: Path
) -> None:
    save_mapper(mapper, path, RECORD)
    loaded, _ = load_mapper(path)
    assert mapper.fingerprint == loaded.fingerprint and len(loaded.fingerprint) == 64
    assert fresh().fingerprint == fresh().fingerprint != mapper.fingerprint


@pytest.mark.parametrize("name", ["centre", "whitening", "scale", "linear.weight", "score.bias"])
def test_another_weight_or_buffer_is_another_fingerprint(name: str) -> None:
    other = fresh()
    other.state_dict()[name].view(-1)[0] += 1e-3
    assert other.fingerprint != fresh().fingerprint


def test_loading_uses_no_random_numbers(mapper: Mapper, path: Path) -> None:
    save_mapper(mapper, path, RECORD)
    before = torch.get_rng_state()
    load_mapper(path)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_loaded_mapper_outlives_a_change_of_its_file(mapper: Mapper, path: Path) -> None:
    save_mapper(mapper, path, RECORD)
    loaded, _ = load_mapper(path)
    with path.open("r+b") as file:
        file.truncate(10)
    assert torch.equal(loaded(embeddings()).directions, mapper(embeddings()).directions)


def test_half_precision_rounds_the_weights_but_not_the_buffers(mapper: Mapper, path: Path) -> None:
    save_mapper(mapper, path, RECORD, half=True)
    assert load_file(path)["enter.weight"].dtype == torch.float16
    loaded, _ = load_mapper(path)
    assert torch.equal(loaded.enter.weight, mapper.enter.weight.half().float())
    for name in ("scale", "centre", "whitening"):
        assert torch.equal(getattr(loaded, name), getattr(mapper, name)), name


def test_the_file_says_what_it_is(mapper: Mapper, path: Path) -> None:
    save_mapper(mapper, path, RECORD)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    config = {name: value for name, value in asdict(CONFIG).items() if name != "tradeoff"}
    assert metadata["format"] == FORMAT and json.loads(metadata["config"]) == config
    assert json.loads(metadata["recipe"]) == RECORD.recipe
    assert json.loads(metadata["calibration"]) == RECORD.calibration
    texts = [metadata[name] for name in ("licence", "trained_on", "version")]
    assert texts == ["MIT", "drawn faces", "0.1.0"]


def test_the_recipe_of_its_training_is_in_the_record_or_else_ours() -> None:
    paper = dataclasses.replace(RECIPES["paper"], steps=7)
    record = dataclasses.replace(RECORD, recipe={"name": "paper", "recipe": asdict(paper)})
    assert trained_recipe(record) == paper
    assert trained_recipe(RECORD) == trained_recipe(None) == RECIPES["consistent"]


@pytest.mark.parametrize(
    "recipe", [{"colour": 1}, "paper", {**asdict(RECIPES["paper"]), "steps": 0}]
)
def test_a_recipe_that_is_none_is_refused_in_one_line(recipe: object) -> None:
    record = dataclasses.replace(RECORD, recipe={"recipe": recipe})
    with pytest.raises(ValueError, match=r"^the mapper was trained by a recipe unknown[^\n]+$"):
        trained_recipe(record)


def broken_replace(source: object, target: object) -> None:
    raise OSError("the disk is gone")


def test_a_save_that_fails_leaves_the_old_file(
    mapper: Mapper, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_mapper(mapper, path, RECORD)
    whole = path.read_bytes()
    mapper.centre += 1
    with monkeypatch.context() as patched, pytest.raises(OSError, match="disk is gone"):
        patched.setattr(os, "replace", broken_replace)
        save_mapper(mapper, path, RECORD)
    mapper.scale[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinity in scale"):
        save_mapper(mapper, path, RECORD)
    assert path.read_bytes() == whole and os.listdir(path.parent) == [path.name]


def test_weights_too_great_for_half_precision_are_not_written(mapper: Mapper, path: Path) -> None:
    mapper.score.bias.data.fill_(1e6)
    with pytest.raises(ValueError, match=r"score\.bias"):
        save_mapper(mapper, path, RECORD, half=True)
    assert not path.exists()


@pytest.mark.parametrize(
    "change", [{"recipe": {"path": Path("a")}}, {"calibration": {"threshold": float("nan")}}]
)
def test_a_record_that_json_cannot_hold_is_refused(
    mapper: Mapper, path: Path, change: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match="JSON"):
        save_mapper(mapper, path, dataclasses.replace(RECORD, **change))
    assert not path.exists()


@pytest.mark.parametrize("which", ["generator", "embedder"])
def test_a_mapper_of_another_generator_or_embedder_is_refused(
    mapper: Mapper, path: Path, which: str
) -> None:
    save_mapper(mapper, path, RECORD)
    message = error_of(path, **{which: "b" * 64})
    for said in ("a" * 12 + " (6 x 8)", "embedder " + "e" * 12, f"the {which} loaded is bbb"):
        assert said in message
    assert "a" * 13 not in message and "python -m train.mapper --help" in message


def change(path: Path, state: dict[str, Tensor], **metadata: str | None) -> None:
    """Write a file like a mapper's, with other metadata; None leaves an entry out."""
    whole: dict[str, str | None] = {
        "format": FORMAT,
        **{name: json.dumps(getattr(RECORD, name)) for name in ("recipe", "calibration")},
        **{name: getattr(RECORD, name) for name in ("licence", "trained_on", "version")},
        "config": json.dumps(asdict(CONFIG)),
    }
    whole |= metadata
    save_file(state, path, {key: value for key, value in whole.items() if value is not None})


def config_with(**fields: object) -> str:
    return json.dumps({**asdict(CONFIG), **fields})


def test_a_file_made_by_hand_is_read(mapper: Mapper, path: Path) -> None:
    change(path, mapper.state_dict())
    assert load_mapper(path)[1] == RECORD


def test_a_file_of_the_first_format_is_read_its_score_of_features_alone(
    mapper: Mapper, path: Path
) -> None:
    state = dict(mapper.state_dict())
    state.pop("score_linear.weight")
    change(path, state, format=FIRST_FORMAT)
    loaded, record = load_mapper(path)
    with torch.no_grad():
        mapper.score_linear.weight.zero_()
    assert record == RECORD
    assert torch.equal(loaded(embeddings()).expected, mapper(embeddings()).expected)
    assert torch.equal(loaded(embeddings()).directions, mapper(embeddings()).directions)
    change(path, state)
    assert "weights do not fit" in error_of(path)


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ({"format": "another/1"}, "found another/1"),
        ({"format": None}, "found None"),
        ({"config": None}, "metadata is damaged"),
        ({"config": "{"}, "metadata is damaged"),
        ({"config": "[]"}, "metadata is damaged"),
        ({"config": "3"}, "metadata is damaged"),
        ({"config": config_with(colour=1)}, "metadata is damaged"),
        ({"config": config_with(width=0)}, "metadata is damaged"),
        ({"config": config_with(width=17)}, "weights do not fit"),
        ({"config": config_with(depth=1)}, "weights do not fit"),
        ({"config": config_with(depth=3)}, "weights do not fit"),
        ({"config": config_with(num_ws=8, w_dim=6)}, "weights do not fit"),
        ({"recipe": None}, "metadata is damaged"),
        ({"recipe": "[]"}, "metadata is damaged"),
        ({"recipe": "[" * 100_000}, "metadata is damaged"),
        ({"calibration": '{"threshold": NaN}'}, "metadata is damaged"),
        ({"calibration": '{"threshold": "0.5"}'}, "metadata is damaged"),
        ({"calibration": "[]"}, "metadata is damaged"),
        ({"licence": None}, "metadata is damaged"),
    ],
)
def test_a_file_that_is_not_a_mapper_is_refused(
    mapper: Mapper, path: Path, metadata: dict[str, str | None], said: str
) -> None:
    change(path, mapper.state_dict(), **metadata)
    assert said in error_of(path)


SPOILS: list[tuple[Spoil, str]] = [
    (lambda state: state.pop("enter.weight"), "weights do not fit"),
    (lambda state: state.pop("score.bias"), "weights do not fit"),
    (lambda state: state.pop("score_linear.weight"), "weights do not fit"),
    (lambda state: state.pop("centre"), "weights do not fit"),
    (lambda state: state.pop("scale"), "weights do not fit"),
    (lambda state: state.update(more=torch.zeros(1)), "weights do not fit"),
    (lambda state: state.update(centre=torch.zeros(12, dtype=torch.int64)), "weights do not fit"),
    (lambda state: state.update(centre=torch.full((12,), float("nan"))), "NaN"),
    (lambda state: state.update({"score.bias": torch.full((1,), float("inf"))}), "NaN"),
]


@pytest.mark.parametrize(("spoil", "said"), SPOILS)
def test_spoilt_weights_are_refused_by_file_and_by_folder(
    mapper: Mapper, tmp_path: Path, spoil: Spoil, said: str
) -> None:
    state = dict(mapper.state_dict())
    spoil(state)
    path = tmp_path / "model.safetensors"
    change(path, state)
    assert said in error_of(path)
    with pytest.raises(ValueError, match=said):
        Mapper.from_pretrained(tmp_path)


def test_missing_cut_and_foreign_files_are_refused(mapper: Mapper, path: Path) -> None:
    assert "no such" in error_of(path)
    assert "no such" in error_of(path.parent)
    save_mapper(mapper, path, RECORD)
    whole = path.read_bytes()
    for content in (b"", whole[:100], whole[:-4], b"not safetensors at all"):
        path.write_bytes(content)
        assert "safetensors" in error_of(path)


def test_a_folder_holds_a_mapper_and_its_card(mapper: Mapper, tmp_path: Path) -> None:
    mapper.record = RECORD
    folder = tmp_path / "some" / "folder"
    mapper.save_pretrained(folder)
    assert sorted(os.listdir(folder)) == ["README.md", "config.json", "model.safetensors"]
    assert json.loads((folder / "config.json").read_text()) == asdict(CONFIG)
    for name in (folder, str(folder), folder / "model.safetensors"):
        loaded = Mapper.from_pretrained(name, generator="a" * 64, embedder="e" * 64)
        assert loaded.config == CONFIG and loaded.record == RECORD
        assert torch.equal(loaded(embeddings()).directions, mapper(embeddings()).directions)
    card = (folder / "README.md").read_text("utf-8")
    assert card.startswith("---\nlibrary_name: targetclip\nlicense: mit\npipeline_tag: ")
    for said in ("Licence: MIT", "a" * 64, "e" * 64, "Mapper.from_pretrained(", '"amortized"'):
        assert said in card


def test_a_folder_can_be_written_again_and_keeps_what_else_is_there(
    mapper: Mapper, tmp_path: Path
) -> None:
    mapper.record = RECORD
    mapper.save_pretrained(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    loaded = Mapper.from_pretrained(tmp_path)
    loaded.record = dataclasses.replace(RECORD, licence="Research only", version="2")
    loaded.save_pretrained(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [
        "README.md",
        "config.json",
        "model.safetensors",
        "notes.txt",
    ]
    assert Mapper.from_pretrained(tmp_path).record == loaded.record
    card = (tmp_path / "README.md").read_text("utf-8")
    assert "license: other" in card and "Licence: Research only" in card and "Version: 2" in card
    assert stat.S_IMODE((tmp_path / "model.safetensors").stat().st_mode) == stat.S_IMODE(
        (tmp_path / "notes.txt").stat().st_mode
    )


def test_a_folder_is_as_it_was_when_a_save_fails(mapper: Mapper, tmp_path: Path) -> None:
    mapper.record = RECORD
    mapper.save_pretrained(tmp_path)
    before = {name.name: name.read_bytes() for name in tmp_path.iterdir()}
    mapper.centre[0] = float("inf")
    with pytest.raises(ValueError, match="centre"):
        mapper.save_pretrained(tmp_path)
    assert {name.name: name.read_bytes() for name in tmp_path.iterdir()} == before


def test_a_folder_needs_a_record(mapper: Mapper, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"set mapper\.record"):
        mapper.save_pretrained(tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_a_folder_of_another_generator_is_refused(mapper: Mapper, tmp_path: Path) -> None:
    mapper.record = RECORD
    mapper.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="generator loaded is bbbbbbbbbbbb"):
        Mapper.from_pretrained(tmp_path, generator="b" * 64)


@pytest.mark.parametrize("name", ["nobody/nothing", "no/such/folder"])
def test_a_repository_that_cannot_be_had_is_one_clear_line(name: str) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        Mapper.from_pretrained(name)
    message = str(caught.value)
    assert "\n" not in message and message.startswith(f"{name}: ") and "the network" in message


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors: no such"):
        Mapper.from_pretrained(tmp_path)


def test_the_card_says_what_the_record_measured_and_nothing_else(
    mapper: Mapper, tmp_path: Path
) -> None:
    mapper.record = MEASURED
    mapper.save_pretrained(tmp_path)
    loaded = Mapper.from_pretrained(tmp_path)
    assert loaded.record == MEASURED
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.pipeline_tag == "image-to-image" and "stylegan2" in card.data.tags
    assert card.data.datasets == ["somebody/faces"]
    results = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert results == MEASURED.validation
    for said in (
        "| transfer_score | 0.8125 |",
        "| threshold | 0.25 |",
        "python -m train.mapper --out mapper\npython -m eval.calibrate --out calibrated",
    ):
        assert said in card.text
    mapper.record = dataclasses.replace(RECORD, calibration={})
    mapper.save_pretrained(tmp_path)
    bare = ModelCard.load(tmp_path / "README.md")
    assert "no figures are in its file" in bare.text and "transfer_score" not in bare.content
    assert bare.data.eval_results is None and bare.data.datasets is None


def test_a_record_without_measurements_is_written_as_before_there_were_any(
    mapper: Mapper, path: Path
) -> None:
    save_mapper(mapper, path, RECORD)
    with safe_open(path, framework="pt") as file:
        assert {"command", "validation", "datasets"}.isdisjoint(file.metadata())


@pytest.mark.parametrize(
    "metadata",
    [{"validation": '{"transfer_score": NaN}'}, {"validation": "[]"}, {"datasets": "[1]"}],
)
def test_damaged_measurements_are_refused(
    mapper: Mapper, path: Path, metadata: dict[str, str | None]
) -> None:
    change(path, mapper.state_dict(), **metadata)
    assert "metadata is damaged" in error_of(path)


def test_a_folder_of_former_versions_has_no_config_and_is_read(
    mapper: Mapper, tmp_path: Path
) -> None:
    save_mapper(mapper, tmp_path / "model.safetensors", RECORD)
    loaded = Mapper.from_pretrained(tmp_path, generator="a" * 64)
    assert loaded.record == RECORD and loaded.fingerprint == mapper.fingerprint


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (config_with(embedder="f" * 64), "of one mapper, found those of two"),
        (config_with(num_ws=7), "of one mapper, found those of two"),
        (config_with(generator="b" * 64), "was trained for generator bbbbbbbbbbbb"),
        (config_with(width=0), None),  # not one of what tells mappers apart
        ("{", "config.json: it is damaged"),
        ("[]", "config.json: it is damaged"),
    ],
)
def test_a_config_that_is_not_of_the_weights_is_refused(
    mapper: Mapper, tmp_path: Path, content: str, said: str | None
) -> None:
    mapper.record = RECORD
    mapper.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(content)
    with nullcontext() if said is None else pytest.raises(ValueError, match=said) as refused:
        Mapper.from_pretrained(tmp_path, generator="a" * 64)
    assert refused is None or "\n" not in str(refused.value)


class ByTheMixin(PyTorchModelHubMixin, Mapper):
    """A mapper as the Hub's own mixin loads it."""


def test_the_hubs_own_mixin_reads_what_is_written(mapper: Mapper, tmp_path: Path) -> None:
    mapper.record = RECORD
    mapper.save_pretrained(tmp_path)
    loaded = PyTorchModelHubMixin.from_pretrained.__func__(ByTheMixin, tmp_path, strict=True)
    assert loaded.config == CONFIG and loaded.fingerprint == mapper.fingerprint


# The Hub

# The Hub's library uploads by a deprecated argument of httpx.
UPLOADS = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub on this machine, which is asked instead of the real one; nothing else can be."""
    connect = socket.socket.connect

    def loopback_alone(self: socket.socket, address: Any) -> None:
        assert address[0] == "127.0.0.1", f"the network was asked: {address}"
        connect(self, address)

    with hub_running() as running:
        monkeypatch.setattr(socket.socket, "connect", loopback_alone)
        for name, value in (
            ("ENDPOINT", running.address),
            (
                "HUGGINGFACE_CO_URL_TEMPLATE",
                f"{running.address}/{{repo_id}}/resolve/{{revision}}/{{filename}}",
            ),
            ("HF_HUB_OFFLINE", False),
            ("HF_HUB_DISABLE_XET", True),  # a transfer of the Hub's own, not HTTP alone
        ):
            monkeypatch.setattr(constants, name, value)
        close_session()  # one made offline answers nothing
        yield running
        close_session()


@UPLOADS
def test_a_mapper_pushed_and_loaded_back_is_the_same_to_the_bit(
    mapper: Mapper, tmp_path: Path, hub: Hub
) -> None:
    with pytest.raises(ValueError, match=r"set mapper\.record"):
        mapper.push_to_hub("mapper", token="hf_none")
    assert hub.asked == []
    mapper.record = MEASURED
    address = mapper.push_to_hub("mapper", token="hf_none", private=True)
    assert address.startswith(f"{hub.address}/somebody/mapper/commit/")
    [asked], [commit] = hub.made, hub.commits
    assert asked["name"] == "mapper" and asked.get("visibility", "private") == "private"
    assert commit["summary"] == "Push mapper" and commit["branch"] == "main"
    files = hub.repositories["somebody/mapper"]
    assert sorted(files) == ["README.md", "config.json", "model.safetensors"]
    assert json.loads(files["config.json"]) == asdict(CONFIG)
    assert ModelCard(files["README.md"].decode()).data.library_name == "targetclip"

    names = {"generator": CONFIG.generator, "embedder": CONFIG.embedder}
    loaded = Mapper.from_pretrained("somebody/mapper", cache_dir=tmp_path, **names)
    assert loaded.config == CONFIG and loaded.record == MEASURED
    for name, tensor in mapper.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    found, expected = loaded(embeddings()), mapper(embeddings())
    assert torch.equal(found.directions, expected.directions)
    assert torch.equal(found.expected, expected.expected)

    hub.asked.clear()
    again = Mapper.from_pretrained("somebody/mapper", cache_dir=tmp_path, local_files_only=True)
    assert again.fingerprint == loaded.fingerprint and hub.asked == []


@UPLOADS
def test_a_pushed_mapper_of_another_generator_is_refused_before_its_weights_are_asked_for(
    mapper: Mapper, tmp_path: Path, hub: Hub
) -> None:
    mapper.record = RECORD
    mapper.push_to_hub("somebody/mapper", token="hf_none", branch="try", create_pr=False)
    assert hub.commits[0]["branch"] == "try"
    with pytest.raises(
        ValueError, match=r"^somebody/mapper was trained for generator aaaaaaaaaaaa"
    ):
        Mapper.from_pretrained("somebody/mapper", generator="b" * 64, cache_dir=tmp_path)
    assert not any("model.safetensors" in request for request in hub.asked)


def test_a_repository_of_a_former_version_is_loaded(
    mapper: Mapper, tmp_path: Path, hub: Hub
) -> None:
    save_mapper(mapper, tmp_path / "file", RECORD)
    hub.repositories["somebody/old"] = {"model.safetensors": (tmp_path / "file").read_bytes()}
    loaded = Mapper.from_pretrained("somebody/old", cache_dir=tmp_path / "cache")
    assert loaded.fingerprint == mapper.fingerprint
    for name in ("somebody/none", "somebody/empty"):
        hub.repositories["somebody/empty"] = {}
        with pytest.raises(FileNotFoundError, match=f"^{name}: expected a folder with"):
            Mapper.from_pretrained(name, cache_dir=tmp_path / "cache")
