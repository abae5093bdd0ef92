"""Checkpoint readers against stored outputs of the public implementations, and hostile files."""

import argparse
import io
import json
import logging
import pickle
import pickletools
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hostile import Touch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from targetclip.generators import Generator, load_generator
from targetclip.generators.rosinality import rosinality_state, save_safetensors
from targetclip.generators.stylegan2 import StyleGAN2, StyleGAN2Config, transposed_convolution

FIXTURES = Path(__file__).parents[1] / "fixtures"
PARITY = 1e-4  # on images that span about [-6, 6]

Checkpoint = dict[str, Any]
Edit = Callable[[Checkpoint], None]


def stored(name: str) -> dict[str, Tensor]:
    with np.load(FIXTURES / name) as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays}


def assert_near(actual: Tensor, expected: Tensor, tolerance: float = PARITY) -> None:
    assert actual.shape == expected.shape
    assert float((actual - expected).abs().max()) <= tolerance


def tiny_network(conv_clamp: float | None = None, resolution: int = 16) -> StyleGAN2:
    """Random weights, every one of them set, so that nothing can be dropped unnoticed."""
    widths = (12, 8, 6, 5)[: int(np.log2(resolution)) - 1]
    network = StyleGAN2(
        StyleGAN2Config(
            resolution=resolution,
            w_dim=16,
            z_dim=10,
            mapping_layers=3,
            channels=widths,
            conv_clamp=conv_clamp,
        )
    )
    random = torch.Generator().manual_seed(0)
    for name, tensor in network.state_dict().items():
        scale = 100.0 if "mapping_network.layers" in name else 1.0
        tensor.copy_(scale * torch.randn(tensor.shape, generator=random))
    return network.eval().requires_grad_(False)


def some_z(network: StyleGAN2, count: int = 3) -> Tensor:
    return torch.randn(count, network.z_dim, generator=torch.Generator().manual_seed(1))


def rosinality_checkpoint(network: StyleGAN2) -> Checkpoint:
    state = rosinality_state(network)
    return {"latent_avg": state.pop("latent_avg"), "g_ema": state}


def saved(checkpoint: object, path: Path) -> Path:
    torch.save(checkpoint, path)
    return path


@pytest.fixture(scope="module")
def small() -> StyleGAN2:
    return load_generator(FIXTURES / "nvidia_ada_32.pkl")


# The public implementations


@pytest.mark.parametrize("size", [64, 256])
def test_a_rosinality_checkpoint_renders_the_reference_images(
    size: int, tmp_path: Path, seeded_weights: ModuleType
) -> None:
    arrays = seeded_weights.seeded_state(FIXTURES / f"rosinality_{size}.keys.json", equalized=True)
    reference = stored(f"rosinality_{size}.npz")
    checkpoint = {
        "g_ema": {name: torch.from_numpy(array) for name, array in arrays.items()},
        "latent_avg": reference["latent_avg"],
    }
    network = load_generator(saved(checkpoint, tmp_path / "network.pt"))
    pool = size // reference["image"].shape[-1]

    assert network.resolution == size
    for w in network.mapping(reference["z"]).unbind(dim=1):
        assert_near(w, reference["w"])
    image = network.synthesis(reference["ws"])
    assert_near(F.avg_pool2d(image, pool), reference["image"])
    truncated = network.synthesis(network.mapping(reference["z"][:1], truncation=0.7))
    assert_near(F.avg_pool2d(truncated, pool), reference["truncated_image"])


@pytest.mark.parametrize(("size", "conv_clamp"), [(32, None), (64, 256.0)])
def test_an_nvidia_pickle_renders_the_reference_images(size: int, conv_clamp: float | None) -> None:
    network = load_generator(FIXTURES / f"nvidia_ada_{size}.pkl")
    reference = stored(f"nvidia_ada_{size}.npz")

    assert (network.resolution, network.config.conv_clamp) == (size, conv_clamp)
    assert_near(network.mapping(reference["z"]), reference["ws_mapping"])
    assert_near(network.mapping(reference["z"], truncation=0.7), reference["ws_truncated"])
    assert_near(network.synthesis(reference["ws"]), reference["image"])


@pytest.mark.parametrize(
    ("size", "num_ws", "last_widths"), [(32, 8, (512, 512)), (1024, 18, (64, 32))]
)
def test_the_public_layout_of_keys_is_read_at_every_size(
    size: int, num_ws: int, last_widths: tuple[int, int], tmp_path: Path, seeded_weights: ModuleType
) -> None:
    keys = FIXTURES / f"rosinality_{size}.keys.json"
    # One number behind every shape: a file of kilobytes stands for one of 120 MB.
    state = {
        name: torch.zeros(1).expand(shape) for name, shape in json.loads(keys.read_text()).items()
    }
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 4
    for name in state:
        if name.endswith("kernel"):
            state[name] = taps[:, None] * taps
    checkpoint = {"g_ema": state, "latent_avg": torch.zeros(512)}
    network = load_generator(saved(checkpoint, tmp_path / "network.pt"))

    assert (network.resolution, network.num_ws) == (size, num_ws)
    assert (network.z_dim, network.w_dim, network.config.mapping_layers) == (512, 512, 8)
    assert network.config.channels[:4] == (512,) * 4
    assert network.config.channels[-2:] == last_widths


def test_all_formats_of_one_network_give_the_same_image(small: StyleGAN2, tmp_path: Path) -> None:
    pt = load_generator(saved(rosinality_checkpoint(small), tmp_path / "network.pt"))
    save_safetensors(small, tmp_path / "network.safetensors")
    safetensors = load_generator(tmp_path / "network.safetensors")

    ws = small.mapping(some_z(small), truncation=0.7)
    for other in (pt, safetensors):
        assert other.fingerprint == small.fingerprint
        assert torch.equal(other.mapping(some_z(small), truncation=0.7), ws)
        assert torch.equal(other.synthesis(ws), small.synthesis(ws))


def test_our_names_are_exactly_those_of_the_public_layout() -> None:
    expected = json.loads((FIXTURES / "rosinality_32.keys.json").read_text())
    with torch.device("meta"):
        network = StyleGAN2(
            StyleGAN2Config(
                resolution=32, w_dim=512, z_dim=512, mapping_layers=8, channels=(512,) * 4
            )
        )
    actual = {name: list(tensor.shape) for name, tensor in rosinality_state(network).items()}
    assert actual == {**expected, "latent_avg": [512]}


# What a loaded network is


def test_a_loaded_network_is_a_frozen_generator_in_eval_mode(small: StyleGAN2) -> None:
    assert isinstance(small, Generator)
    assert not small.training
    assert not any(parameter.requires_grad for parameter in small.parameters())


def test_loading_does_not_move_the_global_random_numbers() -> None:
    before = torch.get_rng_state()
    load_generator(FIXTURES / "nvidia_ada_32.pkl")
    assert torch.equal(torch.get_rng_state(), before)


def test_the_fingerprint_changes_with_any_weight_and_with_the_clamp() -> None:
    prints = {tiny_network().fingerprint, tiny_network(conv_clamp=1.0).fingerprint}
    for name in tiny_network().state_dict():
        changed = tiny_network()
        changed.state_dict()[name].view(-1)[0] += 1e-3
        prints.add(changed.fingerprint)
    assert len(prints) == 2 + len(tiny_network().state_dict())
    assert tiny_network().fingerprint == tiny_network().fingerprint


def test_a_batch_of_images_equals_each_alone(small: StyleGAN2) -> None:
    ws = small.mapping(some_z(small, 4))
    alone = torch.cat([small.synthesis(one[None]) for one in ws])
    assert_near(small.synthesis(ws), alone, 1e-5)


def test_synthesis_can_end_early_with_the_colours_of_the_coarse_levels() -> None:
    sizes = {"w_dim": 8, "z_dim": 8, "mapping_layers": 1}
    whole = StyleGAN2(StyleGAN2Config(resolution=16, channels=(8, 6, 4), **sizes))
    coarse = StyleGAN2(StyleGAN2Config(resolution=8, channels=(8, 6), **sizes))
    coarse.load_state_dict(whole.state_dict(), strict=False)
    ws = torch.randn(2, whole.num_ws, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(whole.synthesis(ws, 8), coarse.synthesis(ws[:, : coarse.num_ws]))
        assert torch.equal(whole.synthesis(ws, 16), whole.synthesis(ws))


def test_the_four_parts_are_the_transposed_convolution() -> None:
    random = torch.Generator().manual_seed(2)
    x = torch.randn(2, 5, 4, 6, generator=random, dtype=torch.float64).requires_grad_(True)
    weight = torch.randn(3, 5, 3, 3, generator=random, dtype=torch.float64).requires_grad_(True)
    expected = F.conv_transpose2d(x, weight.transpose(0, 1), stride=2)
    actual = transposed_convolution(x, weight)
    assert_near(actual.detach(), expected.detach(), 1e-12)
    gradient = torch.randn(expected.shape, generator=random, dtype=torch.float64)
    for ours, theirs in zip(
        torch.autograd.grad(actual, (x, weight), gradient),
        torch.autograd.grad(expected, (x, weight), gradient),
        strict=True,
    ):
        assert_near(ours, theirs, 1e-12)


def test_weights_train_under_autocast_about_as_in_float32() -> None:
    network = tiny_network().requires_grad_(True)
    gradients = []
    for half in (False, True):
        network.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            images = network.synthesis(network.mapping(some_z(network)))
        images.square().mean().backward()
        grown = [parameter.grad for parameter in network.parameters()]
        assert all(gradient is not None for gradient in grown)
        gradients.append(torch.cat([g.flatten() / g.norm() for g in grown if g is not None]))
    assert float(F.cosine_similarity(*gradients, dim=0)) > 0.99


def test_the_image_is_differentiable_in_ws(small: StyleGAN2) -> None:
    ws = small.mapping(some_z(small, 1)).double()
    network = load_generator(FIXTURES / "nvidia_ada_32.pkl").double()
    random = torch.Generator().manual_seed(2)
    weights = torch.randn(1, 3, 32, 32, generator=random)

    def score(latents: Tensor) -> Tensor:
        return (network.synthesis(latents) * weights).double().sum()

    ws.requires_grad_(True)
    (gradient,) = torch.autograd.grad(score(ws), ws)
    assert gradient.isfinite().all()
    for index in range(network.num_ws):  # each layer, along its own gradient
        step = torch.zeros_like(ws)
        step[:, index] = 1e-3 * F.normalize(gradient[:, index], dim=-1)
        with torch.no_grad():
            numeric = (score(ws + step) - score(ws - step)) / 2
        assert float(numeric) == pytest.approx(float((gradient * step).sum()), rel=1e-2)


def test_the_weights_get_no_gradient_but_ws_does(small: StyleGAN2) -> None:
    ws = small.mapping(some_z(small, 1)).requires_grad_(True)
    small.synthesis(ws).square().mean().backward()
    assert ws.grad is not None and (ws.grad != 0).any(dim=-1).all()
    assert all(parameter.grad is None for parameter in small.parameters())


@pytest.mark.parametrize("half", [False, True])
def test_layers_computed_again_give_the_same_gradient(half: bool) -> None:
    network = tiny_network()
    runs: list[nn.Module] = []
    for layer in [*network.convs, *network.to_rgbs]:
        layer.register_forward_pre_hook(lambda layer, _: runs.append(layer))

    def gradient() -> Tensor:
        ws = network.mapping(some_z(network)).requires_grad_()
        with torch.autocast(ws.device.type, torch.bfloat16, enabled=half):
            image = network.synthesis(ws)
        image.square().mean().backward()
        assert ws.grad is not None
        return ws.grad

    kept, once = gradient(), len(runs)
    network.checkpoint_layers = True
    assert torch.equal(gradient(), kept)
    assert len(runs) == 3 * once
    with torch.no_grad():  # nothing to go back through, nothing to compute again
        network.synthesis(network.mapping(some_z(network)).requires_grad_())
    assert len(runs) == 4 * once


def test_bfloat16_autocast_renders_nearly_the_same_image(small: StyleGAN2) -> None:
    ws = small.mapping(some_z(small))
    exact = small.synthesis(ws)
    with torch.autocast(ws.device.type, dtype=torch.bfloat16):
        rough = small.synthesis(ws)
    assert rough.dtype == torch.float32
    assert float((rough - exact).square().mean().sqrt()) < 0.02 * float(exact.std())


def test_truncation_zero_gives_the_mean_and_one_leaves_w(small: StyleGAN2) -> None:
    z = some_z(small)
    assert_near(small.mapping(z, truncation=0.0)[1, 2], small.mean_w, 1e-6)
    assert_near(small.mapping(z, truncation=1.0)[:, 0], small.mapping_network(z), 1e-6)


def test_the_clamp_bounds_every_layer() -> None:
    def largest_outputs(network: StyleGAN2) -> list[float]:
        outputs: list[float] = []
        for layer in [*network.convs, *network.to_rgbs]:
            layer.register_forward_hook(lambda _, __, x: outputs.append(float(x.abs().max())))
        network.synthesis(network.mapping(some_z(network)))
        return outputs

    free, clamped = largest_outputs(tiny_network()), largest_outputs(tiny_network(conv_clamp=0.25))
    assert min(free) > 0.25
    assert clamped == [0.25] * len(free)


def test_latents_of_another_generator_are_refused(small: StyleGAN2) -> None:
    with pytest.raises(ValueError, match=r"expected ws of shape \[batch, 8, 64\]"):
        small.synthesis(torch.zeros(1, 10, 64))


# Writing, and the average w


def test_float16_storage_halves_the_file_and_keeps_the_image(
    small: StyleGAN2, tmp_path: Path
) -> None:
    save_safetensors(small, tmp_path / "full.safetensors")
    save_safetensors(small, tmp_path / "half.safetensors", dtype=torch.float16)
    half = load_generator(tmp_path / "half.safetensors")
    ws = small.mapping(some_z(small))

    sizes = [(tmp_path / f"{name}.safetensors").stat().st_size for name in ("full", "half")]
    assert sizes[1] < 0.55 * sizes[0]
    assert half.const.dtype == torch.float32
    assert_near(half.mapping(some_z(small)), ws, 1e-2)
    assert_near(half.synthesis(ws), small.synthesis(ws), 2e-2)


def test_a_weight_beyond_float16_is_not_written_as_infinity(tmp_path: Path) -> None:
    network = tiny_network()
    network.const[0, 0, 0, 0] = 1e5
    with pytest.raises(ValueError, match=r"input\.input does not fit torch\.float16"):
        save_safetensors(network, tmp_path / "half.safetensors", dtype=torch.float16)
    assert not (tmp_path / "half.safetensors").exists()


@pytest.mark.parametrize("conv_clamp", [None, 0.5])
def test_safetensors_keeps_every_weight_and_the_clamp(
    conv_clamp: float | None, tmp_path: Path
) -> None:
    network = tiny_network(conv_clamp)
    save_safetensors(network, tmp_path / "network.safetensors")
    loaded = load_generator(tmp_path / "network.safetensors")
    assert loaded.config == network.config
    assert loaded.fingerprint == network.fingerprint


@pytest.mark.parametrize("rows", [1, 6])
def test_an_average_repeated_along_w_plus_is_read_as_one(rows: int, tmp_path: Path) -> None:
    network = tiny_network()
    checkpoint = rosinality_checkpoint(network)
    checkpoint["latent_avg"] = checkpoint["latent_avg"].repeat(rows, 1)
    loaded = load_generator(saved(checkpoint, tmp_path / "network.pt"))
    assert torch.equal(loaded.mean_w, network.mean_w)


def test_a_missing_average_is_sampled_and_announced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    network = tiny_network()
    checkpoint = rosinality_checkpoint(network)
    del checkpoint["latent_avg"]
    path = saved(checkpoint, tmp_path / "network.pt")
    with caplog.at_level(logging.WARNING, logger="targetclip"):
        first, second = load_generator(path), load_generator(path)

    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
    assert "latent_avg" in caplog.text
    assert torch.equal(first.mean_w, second.mean_w)
    w = network.mapping_network(some_z(network, 4096))
    assert_near(first.mean_w, w.mean(dim=0), 0.1 * float(w.std(dim=0).max()))
    assert float(first.mean_w.abs().max()) > 0


def test_a_stored_average_is_used_without_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    network = tiny_network()
    loaded = load_generator(saved(rosinality_checkpoint(network), tmp_path / "network.pt"))
    assert torch.equal(loaded.mean_w, network.mean_w)
    assert not caplog.records


@pytest.mark.parametrize("resolution", [8, 32])
def test_missing_noise_is_drawn_from_a_seed_and_announced(
    resolution: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    network = tiny_network(resolution=resolution)
    checkpoint = rosinality_checkpoint(network)
    for name in [name for name in checkpoint["g_ema"] if name.startswith("noises.")]:
        del checkpoint["g_ema"][name]
    path = saved(checkpoint, tmp_path / "network.pt")
    with caplog.at_level(logging.WARNING, logger="targetclip"):
        first, second = load_generator(path), load_generator(path)
    assert "no noise buffers" in caplog.text and "seed 0" in caplog.text
    assert first.fingerprint == second.fingerprint
    own = network.state_dict()
    for name, tensor in first.state_dict().items():
        if name.endswith(".noise"):
            assert tensor.shape == own[name].shape and not torch.equal(tensor, own[name])
            assert tensor.numel() < 256 or 0.8 < float(tensor.std()) < 1.2
        else:
            assert torch.equal(tensor, own[name])


def test_names_of_a_parallel_training_are_read(tmp_path: Path) -> None:
    checkpoint = rosinality_checkpoint(tiny_network())
    checkpoint["g_ema"] = {f"module.{name}": t for name, t in checkpoint["g_ema"].items()}
    loaded = load_generator(saved(checkpoint, tmp_path / "network.pt"))
    assert loaded.fingerprint == tiny_network().fingerprint


def test_a_training_checkpoint_with_its_options_is_read(tmp_path: Path) -> None:
    checkpoint = rosinality_checkpoint(tiny_network())
    checkpoint["args"] = argparse.Namespace(size=16, path="faces.lmdb")
    checkpoint["d"] = {"anything": torch.zeros(1)}
    loaded = load_generator(saved(checkpoint, tmp_path / "network.pt"))
    assert loaded.fingerprint == tiny_network().fingerprint


# Files that are not such checkpoints


def lose_a_weight(c: Checkpoint) -> None:
    del c["g_ema"]["convs.1.conv.weight"]


def lose_the_first_layer(c: Checkpoint) -> None:
    del c["g_ema"]["style.1.weight"]


def lose_a_kernel(c: Checkpoint) -> None:
    del c["g_ema"]["convs.0.conv.blur.kernel"]


def add_a_weight(c: Checkpoint) -> None:
    c["g_ema"]["convs.9.extra"] = torch.zeros(1)


def change_a_shape(c: Checkpoint) -> None:
    c["g_ema"]["style.2.weight"] = torch.zeros(16, 15)


def change_a_kernel(c: Checkpoint) -> None:
    c["g_ema"]["to_rgbs.0.upsample.kernel"] = torch.full((4, 4), 0.25)


def put_a_nan(c: Checkpoint) -> None:
    c["g_ema"]["style.2.bias"][3] = float("nan")


def differ_along_w_plus(c: Checkpoint) -> None:
    c["latent_avg"] = torch.arange(6.0)[:, None].repeat(1, 16)


def shorten_the_average(c: Checkpoint) -> None:
    c["latent_avg"] = torch.zeros(15)


def store_integers(c: Checkpoint) -> None:
    c["g_ema"]["style.2.bias"] = torch.zeros(16, dtype=torch.int64)


def store_text(c: Checkpoint) -> None:
    c["g_ema"]["style.2.bias"] = "text"


def rename(c: Checkpoint) -> None:
    c["generator"] = c.pop("g_ema")


def keep_only_g(c: Checkpoint) -> None:
    c["g"] = c.pop("g_ema")


def lose_a_noise(c: Checkpoint) -> None:
    del c["g_ema"]["noises.noise_2"]


def make_an_encoder(c: Checkpoint) -> None:
    state = {f"decoder.{name}": tensor for name, tensor in c.pop("g_ema").items()}
    c["state_dict"] = {"encoder.input_layer.0.weight": torch.zeros(1), **state}
    c["opts"] = {"encoder_type": "GradualStyleEncoder"}


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lose_a_weight, "missing convs.1.conv.weight, unexpected none"),
        (lose_the_first_layer, "style.1.weight"),
        (lose_a_kernel, "missing key convs.0.conv.blur.kernel"),
        (add_a_weight, "missing none, unexpected convs.9.extra"),
        (change_a_shape, "expected style.2.weight to be floats of shape [16, 16]"),
        (change_a_kernel, "expected to_rgbs.0.upsample.kernel to be the [1, 3, 3, 1]"),
        (put_a_nan, "style.2.bias holds values that are not finite"),
        (differ_along_w_plus, "found 6 different ones"),
        (shorten_the_average, "expected latent_avg of shape [16]"),
        (store_integers, "found torch.int64"),
        (store_text, "values that are not tensors"),
        (rename, "found dict with keys latent_avg, generator"),
        (keep_only_g, 'found "g", the weights of the last step, without "g_ema"'),
        (lose_a_noise, "missing noises.noise_2"),
        (make_an_encoder, "found an encoder of pSp or e4e: give the generator"),
    ],
)
def test_a_rosinality_file_that_does_not_fit_is_refused_by_name(
    edit: Edit, message: str, tmp_path: Path
) -> None:
    checkpoint = rosinality_checkpoint(tiny_network())
    edit(checkpoint)
    path = saved(checkpoint, tmp_path / "network.pt")
    assert_refused(path, message)


def assert_refused(path: Path, message: str) -> None:
    with pytest.raises(ValueError) as refusal:
        load_generator(path)
    assert message in str(refusal.value)
    assert str(refusal.value).startswith(f"{path}: ")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("suffix", [".pt", ".pkl", ".safetensors"])
@pytest.mark.parametrize("kept", [0.0, 0.1, 0.5, 0.999])
def test_a_truncated_file_is_refused(suffix: str, kept: float, tmp_path: Path) -> None:
    whole = tmp_path / f"whole{suffix}"
    if suffix == ".pt":
        saved(rosinality_checkpoint(tiny_network()), whole)
    elif suffix == ".safetensors":
        save_safetensors(tiny_network(), whole)
    else:
        whole.write_bytes((FIXTURES / "nvidia_ada_32.pkl").read_bytes())
    data = whole.read_bytes()
    path = tmp_path / f"cut{suffix}"
    path.write_bytes(data[: int(kept * len(data))])
    assert_refused(path, "expected")


@pytest.mark.parametrize("suffix", [".pt", ".pkl", ".safetensors"])
def test_a_file_of_text_is_refused(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"page{suffix}"
    path.write_text("<html>404: not found</html>\n")
    assert_refused(path, "expected")


@pytest.mark.parametrize("name", ["face.png", "face.pt", "face.pkl", "face.safetensors"])
def test_a_picture_is_no_generator_whatever_its_name(name: str, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / name, format="JPEG")
    with pytest.raises(ValueError, match=r"found a picture \(JPEG\).*--target"):
        load_generator(tmp_path / name)


def test_safetensors_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    save_file({"weight": torch.zeros(3)}, path)
    assert_refused(path, "to_rgb1.conv.modulation.weight")


def test_an_unknown_suffix_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\.pt .*\.pkl .*\.safetensors, found \.ckpt"):
        load_generator(tmp_path / "network.ckpt")


@pytest.mark.parametrize("suffix", [".pt", ".pkl", ".safetensors"])
def test_a_missing_file_or_a_folder_is_not_found(suffix: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="missing"):
        load_generator(tmp_path / f"missing{suffix}")
    folder = tmp_path / f"folder{suffix}"
    folder.mkdir()
    with pytest.raises(FileNotFoundError, match="folder"):
        load_generator(str(folder))


# Files that ask to run code


def test_a_pt_that_asks_to_run_code_is_refused_and_did_not(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    checkpoint = rosinality_checkpoint(tiny_network()) | {"args": Touch(trace)}
    path = saved(checkpoint, tmp_path / "network.pt")
    assert_refused(path, "asks to run code")
    assert not trace.exists()

    torch.load(path, weights_only=False)
    assert trace.exists(), "the file of this test was harmless"


def test_a_pickle_with_a_foreign_global_is_refused_and_did_not_run(tmp_path: Path) -> None:
    trace, path = tmp_path / "trace", tmp_path / "network.pkl"
    path.write_bytes(pickle.dumps({"G_ema": Touch(trace)}))
    assert_refused(path, "refused global")
    assert_refused(path, "asks to run code")
    assert not trace.exists()

    pickle.loads(path.read_bytes())
    assert trace.exists(), "the file of this test was harmless"


HOSTILE, UNKNOWN = "asks to run code", "is not part of such a file"


@pytest.mark.parametrize(
    ("module", "name", "why"),
    [
        ("builtins", "eval", HOSTILE),
        ("__builtin__", "getattr", HOSTILE),
        ("os", "system", HOSTILE),
        ("posix", "system", HOSTILE),
        ("subprocess", "Popen", HOSTILE),
        ("_codecs", "decode", HOSTILE),
        ("collections", "OrderedDict.fromkeys", UNKNOWN),
        ("torch", "load", UNKNOWN),
        ("torch.storage", "torch.load", UNKNOWN),
        ("numpy", "load", UNKNOWN),
        ("numpy._core.multiarray", "_reconstruct", UNKNOWN),
        ("targetclip.generators.nvidia", "_Unpickler", UNKNOWN),
    ],
)
def test_only_the_listed_names_can_be_named(
    module: str, name: str, why: str, tmp_path: Path
) -> None:
    path = tmp_path / "network.pkl"
    texts = b"".join(
        pickle.SHORT_BINUNICODE + bytes([len(text)]) + text.encode() for text in (module, name)
    )
    path.write_bytes(pickle.PROTO + b"\x04" + texts + pickle.STACK_GLOBAL + pickle.STOP)
    assert_refused(path, f"refused global {module}.{name}, which ")
    assert_refused(path, why)


def test_bytes_of_protocol_2_may_be_nothing_but_latin1(tmp_path: Path) -> None:
    path = tmp_path / "network.pkl"
    for encoding in ("rot13", "zip", "utf-8"):
        arguments = b"".join(
            pickle.BINUNICODE + len(text).to_bytes(4, "little") + text.encode()
            for text in ("a", encoding)
        )
        call = pickle.GLOBAL + b"_codecs\nencode\n" + arguments + pickle.TUPLE2 + pickle.REDUCE
        path.write_bytes(pickle.PROTO + b"\x02" + call + pickle.STOP)
        assert_refused(path, f"found the encoding '{encoding}'")


def test_numbers_that_are_really_a_function_are_refused(tmp_path: Path) -> None:
    # torch.load(weights_only=True) may return PyTorch's own functions, which a pickle could call.
    inner = io.BytesIO()
    torch.save(torch._utils._rebuild_tensor_v2, inner)

    class Numbers:
        def __reduce__(self) -> tuple[Callable[[bytes], object], tuple[bytes]]:
            return torch.storage._load_from_bytes, (inner.getvalue(),)

    path = tmp_path / "network.pkl"
    path.write_bytes(pickle.dumps({"G_ema": Numbers()}))
    assert_refused(path, "expected the numbers of a tensor, found a function")


def test_a_tensor_reaching_beyond_its_numbers_is_refused(tmp_path: Path) -> None:
    class Beyond:
        def __reduce__(self) -> tuple[Callable[..., Tensor], tuple[Any, ...]]:
            storage = torch.zeros(4).__reduce_ex__(2)[1][0]
            return torch._utils._rebuild_tensor_v2, (storage, 0, (100, 100), (100, 1), False, {})

    path = tmp_path / "network.pkl"
    path.write_bytes(pickle.dumps({"G_ema": Beyond()}))
    assert_refused(path, "RuntimeError")


def test_the_source_inside_a_pickle_stays_text() -> None:
    path = FIXTURES / "nvidia_ada_32.pkl"
    assert (
        b"raise SystemExit('the source inside this checkpoint was executed')" in path.read_bytes()
    )
    load_generator(path)


# Pickles of other networks


class Persistent:
    """A pickled network as NVIDIA's: its description, handed to a function that runs the source."""

    def __init__(self, meta: Checkpoint) -> None:
        self.meta = meta

    @property
    def state(self) -> Checkpoint:
        state: Checkpoint = self.meta["state"]
        return state

    def child(self, name: str) -> "Persistent":
        child: Persistent = self.state["_modules"][name]
        return child

    def __reduce__(self) -> tuple[Callable[[Checkpoint], "Persistent"], tuple[Checkpoint]]:
        module: Any = sys.modules["torch_utils.persistence"]
        return module._reconstruct_persistent_obj, (self.meta,)


def pretend(monkeypatch: pytest.MonkeyPatch, module: str, thing: Any, name: str) -> None:
    """Let pickle write `thing` as the global `module.name`."""
    thing.__module__, thing.__qualname__ = module, name
    parts = module.split(".")
    for end in range(1, len(parts) + 1):
        package = ".".join(parts[:end])
        monkeypatch.setitem(sys.modules, package, ModuleType(package))
    setattr(sys.modules[module], name, thing)


@pytest.fixture
def edited(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Path]:
    """Write the 32 px pickle again, after a change to its contents: all of it, or one key's."""

    def reconstruct(meta: Checkpoint) -> Persistent:
        return Persistent(meta)

    pretend(monkeypatch, "torch_utils.persistence", reconstruct, "_reconstruct_persistent_obj")

    def write(edit: Edit, protocol: int = pickle.DEFAULT_PROTOCOL, key: str | None = None) -> Path:
        checkpoint = pickle.loads((FIXTURES / "nvidia_ada_32.pkl").read_bytes())
        edit(checkpoint)
        path = tmp_path / "edited.pkl"
        content = checkpoint if key is None else checkpoint[key]
        path.write_bytes(pickle.dumps(content, protocol))
        return path

    return write


def nothing(c: Checkpoint) -> None:
    """The file as it is."""


@pytest.mark.parametrize("key", [None, "G_ema"])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_pickle_of_any_protocol_is_the_same_network_also_alone(
    protocol: int, key: str | None, edited: Callable[..., Path]
) -> None:
    path = edited(nothing, protocol, key)
    names = {arg for _, arg, _ in pickletools.genops(path.read_bytes()) if isinstance(arg, str)}
    sets = {2: {"__builtin__ set", "_codecs encode"}, 3: {"builtins set"}}
    assert names >= sets.get(protocol, set()), "the file of this test is of another protocol"

    network, reference = load_generator(path), stored("nvidia_ada_32.npz")
    assert_near(network.mapping(reference["z"]), reference["ws_mapping"])
    assert_near(network.synthesis(reference["ws"]), reference["image"])


def test_options_of_any_protocol_are_ignored(
    edited: Callable[..., Path], small: StyleGAN2, monkeypatch: pytest.MonkeyPatch
) -> None:
    class EasyDict(dict[str, Any]):
        """The dictionary that NVIDIA's training writes."""

    pretend(monkeypatch, "dnnlib.util", EasyDict, "EasyDict")

    def add_options(c: Checkpoint) -> None:
        c["training_set_kwargs"] = EasyDict(path="faces.zip", kinds={"a", "b"}, raw=b"\xff")

    for protocol in (2, 3, 5):
        assert load_generator(edited(add_options, protocol)).fingerprint == small.fingerprint


def test_weights_stored_in_float16_are_read_as_float32(
    edited: Callable[..., Path], small: StyleGAN2
) -> None:
    def halve(c: Checkpoint) -> None:
        def walk(module: Persistent) -> None:
            for kind in ("_parameters", "_buffers"):
                for name, tensor in module.state[kind].items():
                    module.state[kind][name] = tensor.half() if tensor is not None else None
            for child in module.state["_modules"].values():
                walk(child)

        walk(c["G_ema"])

    network = load_generator(edited(halve))
    assert network.const.dtype == torch.float32 and network.fingerprint != small.fingerprint
    ws = small.mapping(some_z(small))
    assert_near(network.synthesis(ws), small.synthesis(ws), 2e-2)


def test_layers_kept_in_float16_are_rendered_in_float32(
    edited: Callable[..., Path], small: StyleGAN2
) -> None:
    def use_fp16(c: Checkpoint) -> None:
        c["G_ema"].child("synthesis").state["num_fp16_res"] = 4
        c["G_ema"].child("synthesis").child("b32").state["use_fp16"] = True

    assert load_generator(edited(use_fp16)).fingerprint == small.fingerprint


def test_the_clamp_of_the_layers_is_kept(edited: Callable[..., Path]) -> None:
    def clamp(c: Checkpoint) -> None:
        for _, block in c["G_ema"].child("synthesis").state["_modules"].items():
            for _, layer in block.state["_modules"].items():
                layer.state["conv_clamp"] = 2

    assert load_generator(edited(clamp)).config.conv_clamp == 2.0


def test_training_options_beside_the_network_are_ignored(
    edited: Callable[..., Path], small: StyleGAN2, monkeypatch: pytest.MonkeyPatch
) -> None:
    class EasyDict(dict[str, Any]):
        """The dictionary that NVIDIA's training writes."""

    pretend(monkeypatch, "dnnlib.util", EasyDict, "EasyDict")

    def add_options(c: Checkpoint) -> None:
        c["training_set_kwargs"] = EasyDict(path="faces.zip", use_labels=False)

    assert load_generator(edited(add_options)).fingerprint == small.fingerprint


def make_conditional(c: Checkpoint) -> None:
    c["G_ema"].state["c_dim"] = 10


def make_residual(c: Checkpoint) -> None:
    c["G_ema"].child("synthesis").child("b8").state["architecture"] = "resnet"


def make_other_filter(c: Checkpoint) -> None:
    c["G_ema"].child("synthesis").child("b8").state["_buffers"]["resample_filter"] = torch.ones(
        2, 2
    )


def make_other_class(c: Checkpoint) -> None:
    c["G_ema"].meta["class_name"] = "TriPlaneGenerator"


def make_stylegan3(c: Checkpoint) -> None:
    c["G_ema"].child("synthesis").child("b4").meta["class_name"] = "SynthesisInput"
    c["G_ema"].child("synthesis").child("b4").state["size"] = np.array([4, 4])


def make_other_activation(c: Checkpoint) -> None:
    c["G_ema"].child("synthesis").child("b8").child("conv0").state["activation"] = "swish"


def make_other_multiplier(c: Checkpoint) -> None:
    c["G_ema"].child("mapping").child("fc1").state["bias_gain"] = 0.1


def make_uneven_clamp(c: Checkpoint) -> None:
    c["G_ema"].child("synthesis").child("b8").child("conv0").state["conv_clamp"] = 2


def lose_a_bias(c: Checkpoint) -> None:
    del c["G_ema"].child("synthesis").child("b8").child("conv0").state["_parameters"]["bias"]


def lose_g_ema(c: Checkpoint) -> None:
    del c["G_ema"]


def make_a_circle(c: Checkpoint) -> None:
    c["G_ema"].state["_modules"]["synthesis"].state["_modules"]["again"] = c["G_ema"].state


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (make_conditional, "this generator is conditional (c_dim 10)"),
        (make_residual, "architecture of synthesis.b8 is 'resnet', but only 'skip' is supported"),
        (make_other_filter, "synthesis.b8.resample_filter to be the [1, 3, 3, 1] low-pass filter"),
        (make_other_class, "the class of G_ema is 'TriPlaneGenerator', but only 'Generator'"),
        (make_stylegan3, "this is a StyleGAN3 pickle"),
        (make_other_activation, "activation of synthesis.b8.conv0 is 'swish'"),
        (make_other_multiplier, "lr_multiplier of mapping.fc1 is 0.1, but only 0.01"),
        (make_uneven_clamp, "expected one conv_clamp for all layers"),
        (lose_a_bias, "missing synthesis.b8.conv0.bias, unexpected none"),
        (lose_g_ema, "found dict with keys: G, D"),
        (make_a_circle, "expected a StyleGAN2 pickle"),
    ],
)
def test_a_pickle_of_another_network_is_refused_by_name(
    edit: Edit, message: str, edited: Callable[..., Path]
) -> None:
    assert_refused(edited(edit), message)


def test_a_tensorflow_pickle_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Network:
        """The class that the StyleGAN of 2019 pickles."""

    pretend(monkeypatch, "dnnlib.tflib.network", Network, "Network")
    path = tmp_path / "ffhq.pkl"
    path.write_bytes(pickle.dumps((Network(), Network(), Network())))
    assert_refused(path, "this is a TensorFlow pickle (dnnlib.tflib.network.Network)")
