"""Training of the world's generator: every stage on tiny sizes, and going on after a stop."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("dicebear", reason="needs the extra avatars")
pytest.importorskip("resvg_py", reason="needs the extra avatars")

from data.illustrated.codes import VALUES, W_DIM, codes, indices_from_z, strongest
from targetclip.generators import load_generator
from targetclip.generators.stylegan2 import StyleGAN2Config
from train.loop import CHECKPOINT, LOG
from train.world.generator import (
    Config,
    Faces,
    importance,
    new_network,
    psnr,
    run,
)


def config(out: Path, **changes: Any) -> Config:
    sizes: dict[str, Any] = {
        "faces": 8, "exact_steps": 2, "steps": 2, "batch_size": 8, "channels": (8,) * 6,
    }  # fmt: skip
    return Config(out=out, **{**sizes, **changes})


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("avatars") / "generator"
    run(config(out))
    return out


@pytest.fixture(scope="module")
def faces(trained: Path) -> Faces:
    return Faces(trained.parent, 8, 0, torch.get_default_device())


def test_a_trained_generator_makes_pictures_of_128_px_from_z(trained: Path) -> None:
    generator = load_generator(trained / "generator.safetensors")
    images = generator.synthesis(generator.mapping(torch.randn(2, generator.z_dim)))

    assert images.shape == (2, 3, 128, 128)
    assert generator.mean_w.abs().max() > 0


@pytest.mark.parametrize("stage", ["exact", "blends"])
def test_every_stage_on_pictures_logs_three_figures_and_shows_pairs(
    trained: Path, stage: str
) -> None:
    figures = json.loads((trained / stage / LOG).read_text().splitlines()[-1])

    assert {"psnr_exact", "psnr_blended", "psnr_mapped"} <= set(figures)
    assert (trained / stage / "exact.png").is_file()


def test_what_no_code_has_is_without_effect(trained: Path) -> None:
    generator = load_generator(trained / "generator.safetensors")
    w = codes(torch.rand(2, VALUES, generator=torch.Generator().manual_seed(0)))
    changed = w.clone()
    changed[:, VALUES:] = 5.0
    images, others = (
        generator.synthesis(x[:, None].expand(-1, generator.num_ws, -1)) for x in (w, changed)
    )

    assert torch.equal(images, others)


def test_the_same_command_goes_on_where_it_was(trained: Path) -> None:
    before = (trained / "generator.safetensors").read_bytes()
    stamps = [p.stat().st_mtime_ns for p in sorted(trained.glob(f"*/{CHECKPOINT}"))]
    run(config(trained))

    assert (trained / "generator.safetensors").read_bytes() == before
    assert [p.stat().st_mtime_ns for p in sorted(trained.glob(f"*/{CHECKPOINT}"))] == stamps


def test_every_latent_asks_for_the_picture_it_is_trained_on(faces: Faces) -> None:
    network = new_network(
        StyleGAN2Config(resolution=8, w_dim=W_DIM, z_dim=W_DIM, mapping_layers=2, channels=(8, 8))
    )
    chosen = torch.arange(8)
    ws = faces.mixed(network, chosen, torch.Generator().manual_seed(0))

    assert ws.shape == (8, network.num_ws, W_DIM)
    for layer in ws.unbind(dim=1):
        assert torch.equal(strongest(layer), indices_from_z(faces.z))


def test_psnr_of_a_known_error() -> None:
    assert psnr(torch.zeros(2, 3, 4, 4), torch.full((2, 3, 4, 4), 0.2)) == pytest.approx(20.0)


def test_the_middle_of_a_picture_counts_double_and_the_mean_is_one() -> None:
    weight = importance(128)[0, 0]

    assert weight.mean() == pytest.approx(1.0)
    assert weight[64, 64] == pytest.approx(2 * float(weight[0, 0]))


def test_a_trained_generator_is_trained_further(trained: Path, tmp_path: Path) -> None:
    for path in trained.parent.glob("faces-*"):
        (tmp_path / path.name).hardlink_to(path)
    run(config(tmp_path / "more", start=trained / "generator.safetensors"))

    assert not (tmp_path / "more" / "exact").exists()
    assert (tmp_path / "more" / "generator.safetensors").is_file()
    with pytest.raises(ValueError, match="expected StyleGAN2Config"):
        run(config(tmp_path / "x", start=trained / "generator.safetensors", channels=(16,) * 6))
