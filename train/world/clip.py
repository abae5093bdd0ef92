"""Train the CLIP model of the bundled world on avatars of many styles and their captions.

An ordinary open_clip model with a small configuration, trained contrastively. It must read styles
that nobody showed it, so pictures are turned, recoloured, blurred and made noisy, and a
convolutional network reads them: whole styles are held out to see how far that goes.

    python -m train.world.clip --out runs/avatars/clip          # an hour on one core; resumes
"""

if __name__ == "__main__":  # before torch is imported, so that Ctrl-C is one line
    from targetclip.command import start

    start("train.world.clip")

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from numpy import ndarray
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from data.illustrated.avatars import HELD_OUT, TRAINED, bank, draw, render, to_images
from data.illustrated.captions import caption
from data.illustrated.shown import Shown, colours, sample, shown
from targetclip import command
from targetclip.weights import save_tensors
from train.loop import Schedule, plain_settings, train
from train.world.generator import HELD_OUT_SEED, best_device

SIZE = 96  # px; a multiple of 32, as the image tower needs it
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
MODEL: dict[str, Any] = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": SIZE, "layers": [1, 1, 1, 1], "width": 32, "head_width": 32},
    "text_cfg": {"context_length": 48, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
}
PREPROCESS = {"mean": MEAN, "std": STD, "interpolation": "bicubic", "resize_mode": "shortest"}
# What zero-shot reading asks: with and without, each by the mean of several texts.
QUESTIONS = {
    "glasses": (
        ("a person with glasses", "a face with sunglasses", "a person with round glasses"),
        ("a person with no glasses", "a face without glasses"),
    ),
    "beard": (
        ("a person with a beard", "a face with a full beard", "someone with a long beard"),
        ("a person with no beard", "a face with a shaven chin"),
    ),
    "hat": (
        ("a person with a hat", "a face with a beanie", "a person with a cap", "a turban"),
        ("a person with no hat", "a face with a bare head"),
    ),
}

Key = tuple[str, int, int]  # style, seed, index


@dataclass(frozen=True)
class Config:
    out: Path
    """Folder for checkpoint, log and the model's local directory `model/`."""
    pictures: int = 33_000
    """Pictures rendered once, beside `out`, and kept to train on."""
    steps: int = 4000
    batch_size: int = 128
    learning_rate: float = 1e-3
    noise: float = 0.15
    """Largest deviation of the noise added to a picture, for values in [-1, 1]."""
    seed: int = 0
    tests: int = 200
    """Held-out pictures of each style."""
    evaluate_every: int = 500


def keys_of(styles: tuple[str, ...], count: int, seed: int) -> list[Key]:
    """Return what names each of `count` pictures, the styles in turn."""
    return [(styles[i % len(styles)], seed, i // len(styles)) for i in range(count)]


def picture_of(key: Key) -> UInt8[ndarray, "96 96 3"]:
    """Render the picture that a key names."""
    style, seed, index = key
    return render(draw(style, sample(style, seed, index))[0], SIZE)


def shown_by(key: Key) -> dict[str, str]:
    """Return what the picture that a key names shows."""
    style, seed, index = key
    return asdict(shown(style, draw(style, sample(style, seed, index))[1]))


def avatars(
    folder: Path, styles: tuple[str, ...], count: int, seed: int
) -> tuple[UInt8[ndarray, "count 96 96 3"], list[Shown]]:
    """Return pictures of styles and what they show, made on first use and kept in `folder`."""
    keys = keys_of(styles, count, seed)
    name = f"{'held-out' if styles == HELD_OUT else 'trained'}-{seed}-{count}"
    pictures = bank(folder / f"{name}.npy", keys, picture_of, SIZE)
    path = folder / f"{name}.json"
    if not path.exists():
        text = json.dumps([shown_by(key) for key in keys])
        command.write_file(path, text)
    return pictures, [Shown(**fields) for fields in json.loads(path.read_text())]


def normalize(images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch 3 h w"]:
    """Return images in [-1, 1] as the model takes them."""
    mean, std = (torch.tensor(x, device=images.device)[None, :, None, None] for x in (MEAN, STD))
    return ((images + 1) / 2 - mean) / std


def augment(
    images: Float[Tensor, "batch 3 size size"], noise: float, random: torch.Generator
) -> Float[Tensor, "batch 3 size size"]:
    """Turn, shift, mirror, brighten, blur and add noise; colours keep their names."""
    count, size = len(images), images.shape[-1]

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        drawn = torch.rand(count, *shape, generator=random).to(images.device)
        return low + (high - low) * drawn

    angle, scale = uniform(-0.25, 0.25), uniform(0.75, 1.3)
    mirror = torch.where(uniform(0, 1) < 0.5, -1.0, 1.0)
    across = torch.stack([mirror * angle.cos() * scale, -angle.sin() * scale], dim=1)
    down = torch.stack([mirror * angle.sin() * scale, angle.cos() * scale], dim=1)
    turn = torch.cat([torch.stack([across, down], dim=1), uniform(-0.12, 0.12, 2, 1)], dim=2)
    grid = F.affine_grid(turn, list(images.shape), align_corners=False)
    images = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    images = images * uniform(0.75, 1.15, 1, 1, 1) + uniform(-0.2, 0.2, 1, 1, 1)
    images = images + uniform(-0.07, 0.07, 3, 1, 1)
    grey = images.mean(dim=1, keepdim=True)
    images = grey + uniform(0.75, 1.2, 1, 1, 1) * (images - grey)
    coarse = F.interpolate(F.avg_pool2d(images, 2), size=(size, size), mode="bilinear")
    images = images.lerp(coarse, uniform(0, 1, 1, 1, 1).square())
    grain = torch.randn(images.shape, generator=random).to(images.device)
    return (images + noise * uniform(0, 1, 1, 1, 1).square() * grain).clamp(-1, 1)


def retrieval(image: Float[Tensor, "n embed"], text: Float[Tensor, "n embed"]) -> float:
    """Return how often a picture finds its caption among 100."""
    right = [
        (i @ t.T).argmax(dim=1) == torch.arange(len(i), device=i.device)
        for i, t in zip(image.split(100), text.split(100), strict=True)
    ]
    return float(torch.cat(right).float().mean())


def balanced(found: Bool[Tensor, " n"], truth: Bool[Tensor, " n"]) -> float:
    """Return the mean of how often what is there and what is not is said; nan if one is missing."""
    right = found == truth
    return float((right[truth].float().mean() + right[~truth].float().mean()) / 2)


class Reader:
    """A CLIP model asked in words, with the tokenizer it was trained with."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        import open_clip

        self.model, self.device = model, device
        self.tokenize = open_clip.SimpleTokenizer(
            context_length=MODEL["text_cfg"]["context_length"]
        )

    @torch.no_grad()
    def texts(self, texts: list[str]) -> Float[Tensor, "n embed"]:
        """Return unit embeddings of texts."""
        parts = [self.tokenize(texts[i : i + 200]) for i in range(0, len(texts), 200)]
        found = [self.model.encode_text(part.to(self.device)) for part in parts]  # type: ignore[operator]
        return F.normalize(torch.cat(found).float(), dim=1)

    @torch.no_grad()
    def images(self, images: Float[Tensor, "n 3 size size"]) -> Float[Tensor, "n embed"]:
        """Return unit embeddings of images in [-1, 1]."""
        parts = [normalize(part.to(self.device)) for part in images.split(100)]
        found = [self.model.encode_image(part) for part in parts]  # type: ignore[operator]
        return F.normalize(torch.cat(found).float(), dim=1)

    def mean_text(self, texts: tuple[str, ...]) -> Float[Tensor, " embed"]:
        """Return the mean direction of several texts."""
        return F.normalize(self.texts(list(texts)).mean(dim=0), dim=0)

    def zero_shot(self, image: Float[Tensor, "n embed"], truths: list[Shown]) -> dict[str, float]:
        """Return balanced accuracy of each question, and how often hair colour is right."""
        figures = {}
        for kind, (present, absent) in QUESTIONS.items():
            truth = torch.tensor([bool(getattr(item, kind)) for item in truths])
            clear = torch.tensor([kind != "beard" or not item.moustache for item in truths])
            margin = image @ (self.mean_text(present) - self.mean_text(absent))
            if 0 < truth[clear].sum() < clear.sum():
                figures[kind] = balanced(margin.cpu()[clear] > 0, truth[clear])
        names = list(colours())
        texts = torch.stack(
            [self.mean_text((f"a person with {c} hair", f"short {c} hair", f"long {c} hair"))
             for c in names]
        )  # fmt: skip
        found = (image @ texts.T).argmax(dim=1).cpu()
        asked = [i for i, item in enumerate(truths) if item.hair_colour]
        right = [names[int(found[i])] == truths[i].hair_colour for i in asked]
        return figures | {"hair_colour": sum(right) / max(len(right), 1)}


def figures_of(
    reader: Reader,
    pictures: UInt8[ndarray, "count 96 96 3"],
    truths: list[Shown],
    styles: tuple[str, ...],
) -> dict[str, dict[str, float]]:
    """Return the figures of each style; of `all` of them, with retrieval among 100 captions."""
    image = reader.images(to_images(pictures[:]))
    rng = np.random.default_rng(0)
    text = reader.texts([caption(item, rng, complete=True) for item in truths])
    usable = len(image) // 100 * 100 or len(image)
    figures = {"all": reader.zero_shot(image, truths)}
    figures["all"]["caption"] = retrieval(image[:usable], text[:usable])
    for i, style in enumerate(styles):
        figures[style] = reader.zero_shot(image[i :: len(styles)], truths[i :: len(styles)])
    return figures


def without_colour(item: Shown) -> Shown:
    """Return what a grey picture shows."""
    return replace(item, hair_colour="", hat_colour="")


def run(config: Config) -> None:
    import open_clip

    torch.manual_seed(config.seed)
    device = best_device()
    model = open_clip.CLIP(**MODEL).to(device)
    tokenize = open_clip.SimpleTokenizer(context_length=MODEL["text_cfg"]["context_length"])
    folder = config.out.parent
    pictures, truths = avatars(folder, TRAINED, config.pictures, config.seed)
    tests = {
        name: (avatars(folder, styles, config.tests * len(styles), HELD_OUT_SEED), styles)
        for name, styles in {"trained": TRAINED, "held_out": HELD_OUT}.items()
    }

    def loss_at(step: int) -> Tensor:
        rng = np.random.default_rng([config.seed, step])
        random = torch.Generator().manual_seed(config.seed * 1_000_000_007 + step)
        chosen = np.sort(rng.choice(len(truths), config.batch_size, replace=False))
        images = augment(to_images(pictures[chosen]).to(device), config.noise, random)
        grey = rng.uniform(size=len(chosen)) < 0.05
        images[grey] = images[grey].mean(dim=1, keepdim=True)
        said = [truths[i] if not g else without_colour(truths[i])
                for i, g in zip(chosen, grey, strict=True)]  # fmt: skip
        texts = tokenize([caption(item, rng) for item in said]).to(device)
        inputs = normalize(images).contiguous(memory_format=torch.channels_last)
        model.train()
        # The fused attention's backward pass is twice as slow on a processor.
        with torch.autocast(device.type, dtype=torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            image, text, scale = model(inputs, texts)
        logits = scale.float() * image.float() @ text.float().T
        with torch.no_grad():
            model.logit_scale.clamp_(max=np.log(100))
        truth = torch.arange(len(logits), device=device)
        return (F.cross_entropy(logits, truth) + F.cross_entropy(logits.T, truth)) / 2

    def evaluate(average: nn.Module) -> dict[str, float]:
        reader = Reader(average.eval(), device)
        report = {
            name: figures_of(reader, *drawn, styles) for name, (drawn, styles) in tests.items()
        }
        text = json.dumps(report, indent=1) + "\n"
        command.write_file(config.out / "report.json", text)
        return {f"{name}_{k}": v for name, r in report.items() for k, v in r["all"].items()}

    schedule = Schedule(
        steps=config.steps,
        learning_rate=config.learning_rate,
        decay_from=0.3,
        ema=0.995,
        evaluate_every=config.evaluate_every,
    )
    average = train(model, loss_at, config.out, schedule, evaluate, plain_settings(config))
    save_local_directory(average, config.out / "model")
    command.say_next(config.out, "model/, report.json", "read report.json")


def save_local_directory(model: nn.Module, folder: Path) -> None:
    """Write a model as open_clip reads it from a local directory; weights in half precision."""
    half = {
        name: (t.half() if t.is_floating_point() else t).cpu().contiguous()
        for name, t in model.state_dict().items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(folder / "open_clip_model.safetensors", half, {"format": "pt"})
    text = json.dumps({"model_cfg": MODEL, "preprocess_cfg": PREPROCESS}, indent=2)
    command.write_file(folder / "open_clip_config.json", text + "\n")


def main() -> None:
    command.main(run, Config, __doc__, "python -m train.world.clip")
