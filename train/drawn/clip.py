"""Train the CLIP model of the bundled world on pictures of faces and their captions.

An ordinary open_clip model with a small configuration, trained contrastively on pictures from the
wide renderer (other styles, attributes the generator never draws) with noise added, so that it
judges pictures it has not seen and is not easily fooled by a texture.

    python -m train.drawn.clip --out runs/clip          # 41 minutes for 1,400 steps; resumes
"""

if __name__ == "__main__":  # before torch is imported, so that Ctrl-C is one line
    from targetclip.command import start

    start("train.drawn.clip")

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from data.drawn.captions import caption
from data.drawn.faces import bank, draw_wide, to_images, wide_face
from data.drawn.sketch import SIZE, Extras, Face, Style, draw
from targetclip import command
from targetclip.command import make_folder, whole_file, write_json
from train.loop import Schedule, plain_settings, train

Described = tuple[Face, Extras, Style]

HELD_OUT_SEED = 1_000_003
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
MODEL: dict[str, Any] = {
    "embed_dim": 128,
    "vision_cfg": {
        "image_size": SIZE,
        "layers": 3,
        "width": 128,
        "head_width": 64,
        "patch_size": 8,
    },
    "text_cfg": {"context_length": 48, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
}
PREPROCESS = {"mean": MEAN, "std": STD, "interpolation": "bicubic", "resize_mode": "shortest"}


@dataclass(frozen=True)
class Config:
    out: Path
    """Folder for checkpoint, log and the model's local directory `model/`."""
    faces: int = 100_000
    """Pictures drawn once and kept to train on."""
    steps: int = 1600
    batch_size: int = 256
    learning_rate: float = 1e-3
    noise: float = 0.15
    """Largest deviation of the noise added to a picture, for values in [-1, 1]."""
    seed: int = 0
    evaluate_every: int = 250


def normalize(images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch 3 h w"]:
    """Images in [-1, 1] as the model takes them."""
    mean, std = (torch.tensor(x)[None, :, None, None] for x in (MEAN, STD))
    return ((images + 1) / 2 - mean) / std


def retrieval(image: Float[Tensor, "n embed"], text: Float[Tensor, "n embed"]) -> float:
    """How often a picture finds its caption among 100."""
    right = [
        (i @ t.T).argmax(dim=1) == torch.arange(len(i))
        for i, t in zip(image.split(100), text.split(100), strict=True)
    ]
    return float(torch.cat(right).float().mean())


def held_out(count: int, styled: bool) -> tuple[list[Described], Tensor]:
    """Faces no training picture shows, plain or in other styles, without extras."""
    faces = [wide_face(HELD_OUT_SEED, i, styled=float(styled), extra=0.0) for i in range(count)]
    return faces, to_images(np.stack([np.asarray(draw(*face)) for face in faces]))


def run(config: Config) -> None:
    import open_clip

    make_folder(config.out)
    torch.manual_seed(config.seed)
    model = open_clip.CLIP(**MODEL)
    tokenize = open_clip.SimpleTokenizer(context_length=MODEL["text_cfg"]["context_length"])
    keys = [(config.seed, i) for i in range(config.faces)]
    pictures = bank(config.out.parent / f"wide-{config.seed}-{config.faces}.npy", keys, draw_wide)
    described = [wide_face(*key) for key in keys]
    tests = {"plain": held_out(1000, styled=False), "styled": held_out(1000, styled=True)}

    def loss_at(step: int) -> Tensor:
        rng = np.random.default_rng([config.seed, step])
        generator = torch.Generator().manual_seed(config.seed * 1_000_000_007 + step)
        chosen = np.sort(rng.choice(len(keys), config.batch_size, replace=False))
        images = to_images(pictures[chosen])
        deviation = config.noise * torch.rand(len(images), 1, 1, 1, generator=generator)
        images = images + deviation * torch.randn(images.shape, generator=generator)
        shown = [described[i] for i in chosen]
        texts = tokenize([caption(face, extras, rng) for face, extras, _ in shown])
        # The fused attention's backward pass is twice as slow on a processor.
        with torch.autocast("cpu", dtype=torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            image, text, scale = model(normalize(images), texts)
        logits = scale.float() * image.float() @ text.float().T
        with torch.no_grad():
            model.logit_scale.clamp_(max=np.log(100))
        truth = torch.arange(len(logits))
        return (F.cross_entropy(logits, truth) + F.cross_entropy(logits.T, truth)) / 2

    def evaluate(average: nn.Module) -> dict[str, float]:
        average.eval()
        figures: dict[str, float] = {}
        rng = np.random.default_rng(config.seed)
        with torch.no_grad():
            for name, (faces, images) in tests.items():
                texts = [caption(face, extras, rng, complete=True) for face, extras, _ in faces]
                image = F.normalize(average.encode_image(normalize(images)), dim=1)  # type: ignore[operator]
                text = F.normalize(average.encode_text(tokenize(texts)), dim=1)  # type: ignore[operator]
                figures[f"{name}_caption"] = retrieval(image, text)
        return figures

    average = train(
        model,
        loss_at,
        config.out,
        Schedule(
            steps=config.steps,
            learning_rate=config.learning_rate,
            decay_from=0.3,
            ema=0.995,
            evaluate_every=config.evaluate_every,
        ),
        evaluate,
        plain_settings(config),
    )
    save_local_directory(average, config.out / "model")
    command.say_next(
        config.out, "model/, log.jsonl", "name model/ as embedder in a world's .toml file"
    )


def save_local_directory(model: nn.Module, folder: Path) -> None:
    """Write a model as open_clip reads it from a local directory; weights in half precision."""
    from safetensors.torch import save_file

    half = {name: t.half().contiguous() for name, t in model.state_dict().items()}
    make_folder(folder)
    with whole_file(folder / "open_clip_model.safetensors") as temporary:
        save_file(half, temporary)
    config = {"model_cfg": MODEL, "preprocess_cfg": PREPROCESS}
    write_json(folder / "open_clip_config.json", config)


def main() -> None:
    """Run the command line."""
    command.main(run, Config, __doc__, "python -m train.drawn.clip")
