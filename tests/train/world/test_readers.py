"""Inverter, identity model and attribute reader: tiny runs, and what they are taught."""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

pytest.importorskip("dicebear", reason="needs the extra avatars")
pytest.importorskip("resvg_py", reason="needs the extra avatars")

from data.illustrated.codes import ATTRIBUTES, COUNTS, HATS, W_DIM, visible
from eval.reader import HAIR_COLOURS, AvatarReader, load_reader
from targetclip.encoders.identity import load_identity
from targetclip.encoders.inverter import load_inverter
from targetclip.generators import load_generator
from targetclip.generators.rosinality import save_safetensors
from targetclip.generators.stylegan2 import StyleGAN2, StyleGAN2Config
from train.loop import LOG
from train.world import identity, inverter, reader
from train.world.generator import new_network
from train.world.identity import FEATURES, IDENTITY, features_of, with_essence_of
from train.world.reader import agreements


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an untrained generator of the world's sizes, and everything trained on it."""
    out = tmp_path_factory.mktemp("avatars")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = new_network(
            StyleGAN2Config(
                resolution=128, w_dim=W_DIM, z_dim=W_DIM, mapping_layers=2, channels=(8,) * 6
            )
        )
        path = out / "generator.safetensors"
        save_safetensors(network, path)
        tiny: dict[str, Any] = {"generator": path, "faces": 8, "steps": 2, "batch_size": 6}
        reader.run(reader.Config(out=out / "reader", **tiny))
        identity.run(identity.Config(out=out / "identity", **tiny))
        inverter.run(inverter.Config(out=out / "inverter", code_steps=2, **tiny))
    return out


@pytest.mark.parametrize("trainer", [reader, identity, inverter])
def test_generators_of_other_pictures_are_refused_before_any_is_drawn(
    trainer: ModuleType, tmp_path: Path
) -> None:
    sizes = {"w_dim": 8, "z_dim": 8, "mapping_layers": 2}
    save_safetensors(
        StyleGAN2(StyleGAN2Config(resolution=16, channels=(8,) * 3, **sizes)),
        tmp_path / "g.safetensors",
    )
    with pytest.raises(ValueError, match=r"--generator: expected one made by train\.world"):
        trainer.run(trainer.Config(generator=tmp_path / "g.safetensors", out=tmp_path / "out"))
    assert not list(tmp_path.glob("faces*"))


def faces(count: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(0)
    return torch.stack([torch.randint(n, (count,), generator=random) for n in COUNTS], dim=1)


def test_the_reader_answers_what_checks_from_outside_ask(folder: Path) -> None:
    found = load_reader(folder / "reader" / "reader.safetensors").present(
        torch.zeros(2, 3, 128, 128)
    )

    assert set(found) == {"glasses", "beard", "hat", "hair_colour"}
    assert found["hat"].dtype == torch.bool and found["hair_colour"].max() < len(HAIR_COLOURS)


def test_the_reader_logs_drawn_and_generated_agreement(folder: Path) -> None:
    figures = json.loads((folder / "reader" / LOG).read_text().splitlines()[-1])

    assert {"drawn_top", "generated_hairColor", "drawn_glasses_there"} <= set(figures)


def test_a_reader_that_says_hat_is_believed() -> None:
    model = AvatarReader()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.encoder.out.bias[ATTRIBUTES[0].values.index("turban")] = 9.0

    assert model.present(torch.zeros(1, 3, 128, 128))["hat"].all()


def test_a_file_of_another_kind_is_no_reader(folder: Path) -> None:
    with pytest.raises(ValueError, match="expected format targetclip-avatar-reader"):
        load_reader(folder / "identity" / "identity.safetensors")


def test_the_right_answers_agree_fully() -> None:
    assert set(agreements(faces(300), faces(300)).values()) == {1.0}


def test_what_a_hat_or_shades_hide_is_not_asked_for() -> None:
    names = [attribute.name for attribute in ATTRIBUTES]
    face = torch.ones(1, len(names), dtype=torch.long)
    face[0, 0] = ATTRIBUTES[0].values.index(HATS[0])
    face[0, names.index("facialHair")] = 0
    seen = dict(zip(names, visible(face)[0].tolist(), strict=True))

    assert seen["hatColor"] and seen["mouth"]
    assert not seen["hairColor"] and not seen["eyes"]  # the first glasses are dark


def test_the_identity_model_is_read_back_and_compares_people(folder: Path) -> None:
    model = load_identity(folder / "identity" / "identity.safetensors")
    found = model.embed_images(torch.rand(2, 3, 128, 128))

    assert found.shape == (2, FEATURES) and torch.allclose(found.norm(dim=1), torch.ones(2))


def test_the_same_person_with_other_essence_has_the_same_features() -> None:
    people = faces(40)
    changed = with_essence_of(people, people.roll(1, 0))

    assert torch.equal(features_of(people), features_of(changed))
    assert (changed != people).any()


def test_features_of_a_person_have_the_same_length_and_are_mean_zero_over_values() -> None:
    lengths = features_of(faces(50)).square().sum(dim=1)

    assert torch.allclose(lengths, torch.full((50,), float(len(IDENTITY))))
    first = torch.zeros(COUNTS[IDENTITY[0]], len(COUNTS), dtype=torch.long)
    first[:, IDENTITY[0]] = torch.arange(len(first))
    assert features_of(first)[:, : len(first)].sum(dim=0).abs().max() < 1e-5


def test_the_inverter_belongs_to_its_generator(folder: Path) -> None:
    generator = load_generator(folder / "generator.safetensors")
    path = folder / "inverter" / "inverter.safetensors"
    ws = load_inverter(path, generator.fingerprint)(torch.zeros(1, 3, 128, 128))

    assert ws.shape == (1, generator.num_ws, generator.w_dim)
    assert (folder / "inverter" / "grid.png").is_file()
