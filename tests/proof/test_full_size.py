"""Full size, small: the files and every command once at 64 px, and what is counted and measured."""

import dataclasses
import importlib
import json
import signal
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_runs import module_exit_code
from PIL import Image
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from eval.studies.scale import FFHQ_CHANNELS
from targetclip.command import Precision, in_precision
from targetclip.directions import load_direction
from targetclip.embedder import embed_latents
from targetclip.generators import load_generator
from targetclip.scene import random_latents
from tests.proof.full_size import (
    LAST,
    MEASURED,
    PRECISIONS,
    STEPS,
    Config,
    kept_bytes,
    network_sizes,
    networks,
    run,
    run_command,
    seeded_generator,
)


@pytest.fixture
def tiny(tmp_path: Path, clip_dir: Path) -> Config:
    return Config(out=tmp_path / "full", resolution=64, width=8, clip=clip_dir)


@pytest.fixture
def handlers() -> Iterator[None]:
    """What commands listen to is given back."""
    before = {number: signal.getsignal(number) for number in signal.valid_signals()}
    yield
    for number, handler in before.items():
        if signal.getsignal(number) is not handler:
            signal.signal(number, handler)


def run_here(words: list[str], log: Path) -> float:
    """Run a command in this process, whose imports are done."""
    if words[1] == "eval.compare":
        # The identity model is of full size here too, and would look at hundreds of images.
        world = Path(words[words.index("--world") + 1])
        world.write_text(world.read_text().replace('identity = "model_ir_se50.pth"\n', ""))
    # Two images at once are for large networks: tiny ones take as long for two as for many.
    rest = ["32" if before == "--max-images" else word for before, word in pairwise(words[1:])]
    assert module_exit_code(importlib.import_module(words[1]), *rest) == 0
    return 0.5


class Pretended:
    """Stands in for processes: only leaves a step's last file, and lists the commands."""

    def __init__(self, peak: float = 0.5) -> None:
        self.peak = peak
        self.commands: list[list[str]] = []

    def run_command(self, words: list[str], log: Path) -> float:
        self.commands.append(words)
        self.finish(Path(words[-1]))
        return self.peak

    def alone(self, function: object, config: Config) -> float:
        self.finish(config.out / "weights")
        return 0.5

    def finish(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        (folder / LAST.get(folder.name, "report.json")).touch()

    def run(self, config: Config) -> dict[str, Any]:
        return run(config, self.run_command, self.alone)


def here(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in this process."""
    return function(*arguments)


# The road


def test_every_step_from_files_to_an_edit_works(tiny: Config, handlers: None) -> None:
    report = run(tiny, run_here, here)
    assert list(report["steps"]) == list(STEPS)
    judged = json.loads((tiny.out / "compare" / "report.json").read_text())
    assert "mapper" in judged["sets"]["in-range"]["methods"]
    generator = load_generator(tiny.out / "weights" / "stylegan2.pt")
    stored = load_direction(tiny.out / "transfer" / "direction.safetensors", generator)
    assert stored.direction.shape == (10, 8)
    pictures = [tiny.out / "weights" / "0.png", *(tiny.out / "edit").glob("*.png")]
    assert len(pictures) > 2
    assert all(np.asarray(Image.open(path)).std() > 1 for path in pictures)


def test_finished_steps_are_not_run_again(tiny: Config) -> None:
    pretended = Pretended()
    pretended.run(tiny)
    assert [words[-1] for words in pretended.commands] == [
        str(tiny.out / name) for name in STEPS if name != "weights"
    ]
    (tiny.out / "edit" / "report.json").unlink()
    pretended.run(tiny)
    assert pretended.commands[6:] == [pretended.commands[4]]
    assert "| compare |" in (tiny.out / "report.md").read_text()


def test_a_step_that_holds_too_much_is_named(tiny: Config) -> None:
    for _ in range(2):  # it does not pass by being done
        with pytest.raises(ValueError, match=r"step transfer: expected 20 GiB at most.*20\.50"):
            Pretended(peak=20.5).run(tiny)


def test_a_folder_of_other_settings_is_refused(tiny: Config) -> None:
    Pretended().run(tiny)
    with pytest.raises(ValueError, match=r"'seed': 0.*another folder"):
        Pretended().run(dataclasses.replace(tiny, seed=1))


@pytest.mark.parametrize(
    "change", [{"resolution": 16}, {"resolution": 100}, {"width": 0}, {"limit": 0.0}]
)
def test_settings_that_cannot_be_are_refused(tiny: Config, change: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"resolution|--width"):
        run(dataclasses.replace(tiny, **change))
    assert not tiny.out.exists()


def test_the_peak_is_that_of_the_command(tmp_path: Path) -> None:
    # A process begins with the peak of the one that started it.
    least = run_command(["-c", "pass"], tmp_path / "log.txt")
    size = int((least + 0.3) * 2**30)
    peak = run_command(["-c", f"b'x' * {size}"], tmp_path / "log.txt")
    assert least + 0.29 < peak < least + 0.5


def test_the_last_line_of_a_command_that_fails_is_the_message(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"code 3, see .*log\.txt: no luck"):
        run_command(["-c", "print('no luck'); raise SystemExit(3)"], tmp_path / "log.txt")
    assert (tmp_path / "log.txt").read_text().startswith("\n$ python -c ")


# Weights


def test_full_size_is_config_f() -> None:
    sizes = network_sizes(Config(out=Path("unused")))
    assert (sizes.num_ws, sizes.w_dim, sizes.channels) == (18, 512, FFHQ_CHANNELS)


def test_images_of_seeded_weights_are_tame_and_differ_with_the_latent(tiny: Config) -> None:
    torch.manual_seed(0)
    with torch.no_grad():
        sizes = network_sizes(dataclasses.replace(tiny, resolution=256, width=16))
        generator = seeded_generator(sizes)
        one, two = generator.synthesis(random_latents(generator, [1, 2]))
    assert one.shape == (3, 256, 256)
    assert 0.1 < one.std() < 1.5
    assert (one - two).std() > 0.1


# Memory


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_is_counted_is_what_a_step_keeps(tiny: Config, precision: Precision) -> None:
    generator, embedder = networks(tiny)
    kept = kept_bytes(generator, embedder, 2, precision)
    del kept["outputs"]
    real: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        real[storage.data_ptr()] = storage.nbytes()
        return tensor

    ws = torch.zeros(2, generator.num_ws, generator.w_dim, requires_grad=True)
    with in_precision(ws.device, precision), saved_tensors_hooks(pack, lambda tensor: tensor):
        embeddings = embed_latents(generator, embedder, ws, "release", 2)
    assert embeddings.isfinite().all()  # no matrix without numbers is left behind
    assert kept.total() == pytest.approx(sum(real.values()), rel=0.01)


def test_the_tables_give_what_fits(tiny: Config) -> None:
    config = dataclasses.replace(tiny, resolution=32, memory=True)
    memory = run(config, alone=here)["memory"]
    assert len(memory["measured"]) == len(PRECISIONS) * len(MEASURED) == 12
    for row in memory["measured"].values():
        assert 0 < row["before"] < row["peak"] + 0.01  # the system counts in batches
    count = memory["counted"]
    assert count["bf16"] < count["fp32"]
    assert count["fp32, layers again"] < count["fp32"]
    a_source, *most = memory["fits"]["fp32, counted"]
    assert a_source == round(count["fp32"], 3)
    assert most == sorted(most)
    assert most[-1] == int((0.9 * 80 - count["weights"]) / count["fp32"])
    text = (tiny.out / "report.md").read_text()
    assert "| bf16, 4 sources, 1 at once |" in text
    assert "| fp32, measured |" in text
    assert "| bf16, 4 sources, 4 at once, layers again |" in text
    assert memory["fits"]["fp32, layers again, counted"][1:] >= most
