"""e4e against stored outputs of the public implementation, and files that are not its."""

import argparse
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hostile import Touch
from PIL import Image
from torch import Tensor
from torch.nn import Module

from targetclip.encoders.arcface import COUNTER, fill
from targetclip.encoders.e4e import E4eInverter, Encoder4Editing, inverter_of, load_e4e
from targetclip.encoders.inverter import LatentInverter
from targetclip.media.images import picture_to_tensor

FIXTURES = Path(__file__).parents[2] / "fixtures"
KEYS: dict[str, list[int]] = json.loads((FIXTURES / "e4e_encoder_1024.keys.json").read_text())
HEADS = 9  # all three levels of the pyramid; the other nine read what the last two of these do
AVERAGE = torch.linspace(-1, 1, 512)

Checkpoint = dict[str, Any]
Edit = Callable[[Checkpoint], object]


@pytest.fixture(scope="module")
def seeded(seeded_weights: ModuleType) -> E4eInverter:
    """The full-size network, cut to nine heads to spare half a gigabyte."""
    state = {}
    for name, shape in KEYS.items():
        parts = name.split(".")
        if parts[-1] == COUNTER or (parts[0] == "styles" and int(parts[1]) >= HEADS):
            continue
        equalized = name.endswith("linear.weight")
        array = seeded_weights.seeded_array(name, tuple(shape), equalized=equalized)
        state[f"encoder.{name}"] = torch.from_numpy(array)
    return inverter_of({"state_dict": state, "latent_avg": AVERAGE}, HEADS, 512)


def shapes(network: Encoder4Editing) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in network.state_dict().items()}


def inputs_of(inverter: E4eInverter, images: Tensor) -> Tensor:
    """Return what the network of an inverter receives for images."""
    inputs: list[Tensor] = []

    def record(network: Module, arguments: tuple[Tensor, ...]) -> None:
        inputs.extend(arguments)

    with inverter.encoder.register_forward_pre_hook(record):
        inverter(images)
    [only] = inputs
    return only


# The public implementation


def test_the_public_weights_give_the_reference_codes(seeded: E4eInverter) -> None:
    with np.load(FIXTURES / "e4e_encoder_1024.npz") as arrays:
        x16, codes = torch.from_numpy(arrays["x16"]), torch.from_numpy(arrays["codes"])
    actual = seeded(x16) - AVERAGE
    assert actual.shape == (1, HEADS, 512)
    assert float((actual - codes[:, :HEADS]).abs().max()) < 1e-4 * float(codes.std())


def test_our_names_are_exactly_those_of_the_public_layout() -> None:
    with torch.device("meta"):
        network = Encoder4Editing(18, 512)
    assert shapes(network) == KEYS


@pytest.mark.parametrize("side", [300, 128])
def test_pictures_are_resized_as_the_public_pipeline_resizes_them(side: int, small: Path) -> None:
    numbers = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    picture = Image.fromarray(numbers)
    actual = inputs_of(load_e4e(small, 8, 8), picture_to_tensor(picture, side))
    expected = picture_to_tensor(picture.resize((256, 256), Image.Resampling.BILINEAR), 256)
    assert float((actual - expected).abs().max()) < 2 / 127.5  # two steps of 8 bits


def test_pictures_of_256_px_are_shown_as_they_are(small: Path) -> None:
    images = torch.rand(2, 3, 256, 256, generator=torch.Generator().manual_seed(0)) * 2 - 1
    actual = inputs_of(load_e4e(small, 8, 8), images)
    torch.testing.assert_close(actual, images, rtol=0, atol=1e-6)


def test_pictures_that_are_not_square_are_refused(small: Path) -> None:
    with pytest.raises(ValueError, match="square"):
        load_e4e(small, 8, 8)(torch.zeros(1, 3, 256, 128))


# Other sizes of generators


def test_the_first_heads_do_not_depend_on_how_many_follow(seeded: E4eInverter) -> None:
    with torch.device("meta"):
        smaller = Encoder4Editing(HEADS - 1, 512)
    state = seeded.encoder.state_dict()
    fill(smaller, {name: state[name] for name in smaller.state_dict()}, "these weights")
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    actual = smaller(images)
    torch.testing.assert_close(actual, seeded.encoder(images)[:, :-1])
    assert float((actual[0] - actual[1]).abs().max()) > 0.1 * float(actual.std())


def test_a_picture_gives_the_same_latents_alone_and_among_others(seeded: E4eInverter) -> None:
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    alone = torch.cat([seeded.encoder(one[None]) for one in images])
    torch.testing.assert_close(
        seeded.encoder(images), alone, rtol=0, atol=1e-4 * float(alone.std())
    )


# Files


def small_checkpoint() -> Checkpoint:
    """Eight heads of 8 numbers. One number behind every shape: kilobytes stand for 120 MB."""
    with torch.device("meta"):
        state = shapes(Encoder4Editing(8, 8))
    encoder = {
        f"encoder.{name}": torch.tensor(0)
        if name.endswith(COUNTER)
        else torch.tensor([index / 1000]).expand(shape)
        for index, (name, shape) in enumerate(state.items())
    }
    decoder = {"decoder.conv1.conv.weight": torch.zeros(2)}
    return {"state_dict": encoder | decoder, "latent_avg": torch.arange(64.0).reshape(8, 8)}


def saved(checkpoint: object, path: Path) -> Path:
    torch.save(checkpoint, path)
    return path


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(small_checkpoint(), tmp_path_factory.mktemp("e4e") / "small.pt")


def test_every_weight_of_a_file_is_in_the_network_which_is_frozen(small: Path) -> None:
    before = torch.get_rng_state()
    inverter = load_e4e(str(small), 8, 8)
    assert torch.equal(torch.get_rng_state(), before)
    stored = small_checkpoint()
    for name, tensor in inverter.encoder.state_dict().items():
        assert torch.equal(tensor, stored["state_dict"][f"encoder.{name}"]), name
    assert torch.equal(inverter.latent_avg, stored["latent_avg"])
    assert isinstance(inverter, LatentInverter)
    assert not any(module.training for module in inverter.modules())
    assert not any(parameter.requires_grad for parameter in inverter.parameters())


@pytest.mark.parametrize("shape", [(8,), (1, 8)])
def test_an_average_of_one_row_is_repeated(shape: tuple[int, ...], tmp_path: Path) -> None:
    checkpoint = small_checkpoint() | {"latent_avg": torch.arange(8.0).reshape(shape)}
    inverter = load_e4e(saved(checkpoint, tmp_path / "e4e.pt"), 8, 8)
    assert torch.equal(inverter.latent_avg, torch.arange(8.0).repeat(8, 1))


@pytest.mark.parametrize("options", [{"lr": 0.1}, argparse.Namespace(lr=0.1)])
def test_a_file_with_the_options_of_its_training_is_read(options: object, tmp_path: Path) -> None:
    path = saved(small_checkpoint() | {"opts": options}, tmp_path / "e4e.pt")
    load_e4e(path, 8, 8)
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


def test_an_encoder_of_psp_is_refused_though_its_names_are_the_same(tmp_path: Path) -> None:
    for options in ({"encoder_type": "GradualStyleEncoder"}, {"encoder_type": "Encoder4Editing"}):
        for kept in (options, argparse.Namespace(**options)):
            path = saved(small_checkpoint() | {"opts": kept}, tmp_path / "psp.pt")
            if options["encoder_type"] == "Encoder4Editing":
                load_e4e(path, 8, 8)
            else:
                assert "GradualStyleEncoder, as of pSp" in error_of(path)


def test_names_of_a_parallel_training_are_read(small: Path, tmp_path: Path) -> None:
    checkpoint = small_checkpoint()
    state = {f"module.{name}": tensor for name, tensor in checkpoint["state_dict"].items()}
    path = saved(checkpoint | {"state_dict": state}, tmp_path / "e4e.pt")
    expected, actual = (load_e4e(p, 8, 8).state_dict() for p in (small, path))
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_old_and_half_precision_files_without_counters_are_read(tmp_path: Path) -> None:
    checkpoint = small_checkpoint()
    checkpoint["state_dict"] = {
        name: tensor.half()
        for name, tensor in checkpoint["state_dict"].items()
        if not name.endswith(COUNTER)
    }
    path = tmp_path / "e4e.pt"
    torch.save(checkpoint, path, _use_new_zipfile_serialization=False)
    inverter = load_e4e(path, 8, 8)
    assert {parameter.dtype for parameter in inverter.parameters()} == {torch.float32}
    assert not any(tensor.is_meta for tensor in inverter.state_dict().values())


# Files that are not such checkpoints


def error_of(path: Path, num_ws: int = 8, w_dim: int = 8) -> str:
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        load_e4e(path, num_ws, w_dim)
    message = str(caught.value)
    assert "\n" not in message and message.startswith(f"{path}: ") and len(message) < 400
    return message


@pytest.mark.parametrize(("num_ws", "w_dim"), [(7, 8), (18, 8), (8, 512)])
def test_an_e4e_of_another_generator_is_refused(num_ws: int, w_dim: int, small: Path) -> None:
    message = error_of(small, num_ws, w_dim)
    assert "gives 8 w vectors of length 8" in message
    assert f"takes {num_ws} of length {w_dim}" in message


def lose_weights(c: Checkpoint) -> None:
    for leaf in ("bias", "weight"):
        del c["state_dict"][f"encoder.latlayer1.{leaf}"]


def spoil(name: str, value: object) -> Edit:
    return lambda c: c["state_dict"].update({f"encoder.{name}": value})


def keep_one_style(c: Checkpoint) -> None:
    c["state_dict"] = {k: v for k, v in c["state_dict"].items() if ".styles." not in k}


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lose_weights, "missing 2 (first latlayer1.bias), unexpected none"),
        (spoil("more", torch.zeros(1)), "missing none, unexpected 1 (first more)"),
        (spoil("styles.8.linear.weight", torch.zeros(8, 8)), "gives 9 w vectors"),
        (spoil("latlayer1.bias", torch.zeros(8)), "latlayer1.bias of shape [512], found [8]"),
        (spoil("latlayer1.bias", torch.zeros(512).long()), "tensor of floats, found torch.int64"),
        (spoil("latlayer1.bias", "text"), "tensor of floats, found str"),
        (spoil("latlayer1.bias", torch.full((512,), torch.nan)), "latlayer1.bias holds NaN"),
        (keep_one_style, "found no encoder.styles.0.linear.weight"),
        (lambda c: c.pop("latent_avg"), "found latent_avg of NoneType"),
        (lambda c: c.update(latent_avg=torch.zeros(9, 8)), "[8] or [8, 8], found [9, 8]"),
        (lambda c: c.update(latent_avg=torch.full((8,), torch.inf)), "latent_avg holds NaN"),
        (lambda c: c.update(state_dict=None), "found dict, keys: 2 (first latent_avg)"),
        (lambda c: c.clear(), "found dict, keys: none"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_by_name(
    edit: Edit, said: str, tmp_path: Path
) -> None:
    checkpoint = small_checkpoint()
    edit(checkpoint)
    assert said in error_of(saved(checkpoint, tmp_path / "e4e.pt"))


def test_a_bare_tensor_is_refused(tmp_path: Path) -> None:
    assert "found Tensor" in error_of(saved(torch.zeros(3), tmp_path / "e4e.pt"))


def test_missing_cut_and_foreign_files_are_refused(small: Path, tmp_path: Path) -> None:
    path = tmp_path / "e4e.pt"
    assert "no such e4e checkpoint" in error_of(path)
    assert "no such e4e checkpoint" in error_of(tmp_path)
    whole = small.read_bytes()
    for content in (b"", whole[:100], whole[: len(whole) // 2], whole[:-4], b"<html>404</html>\n"):
        path.write_bytes(content)
        assert "damaged" in error_of(path)


def test_a_file_that_asks_to_run_code_is_refused_and_did_not(tmp_path: Path) -> None:
    trace, path = tmp_path / "trace", tmp_path / "e4e.pt"
    content = small_checkpoint() | {"opts": Touch(trace)}
    saved(content, path)
    assert "asks to run code" in error_of(path)
    path.write_bytes(pickle.dumps({"opts": Touch(trace)}))
    assert "asks to run code" in error_of(path)
    assert not trace.exists()

    pickle.loads(path.read_bytes())
    assert trace.exists(), "the file of this test was harmless"
