"""Train the CLIP model of the bundled world on avatars of many styles and their captions.

An ordinary open_clip model with a small configuration. It learns to find the caption of a picture
among those of others (contrastive loss), and which of several texts says what is there, kind by
kind: glasses, beard, hat and so on (cross-entropy). It also learns to say yes or no for three of
them, by the margins that zero-shot reading compares: without that, pictures come in the right order
(area under the curve 0.98 to 1.0), but the threshold is not 0. It must read styles that nobody
showed it, so pictures are turned, bent, recoloured, blurred and made noisy, and a convolutional
network reads them: whole styles are held out to see how far that goes.

    python -m train.world.clip --out runs/avatars/clip          # minutes on a GPU; resumes
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from targetclip import command
from targetclip.command import start
from train.world.settings import Training


@dataclass(frozen=True, kw_only=True)
class Config(Training):
    out: Path
    """Folder for checkpoint, log and the model's local directory `model/`."""
    start: Path | None = None
    """A model's local directory to train further, instead of starting at random weights."""
    pictures: int = 66_000
    """Pictures rendered once, beside `out`, and kept to train on."""
    steps: int = 6000
    batch_size: int = 256
    learning_rate: float = 1e-3
    noise: float = 0.15
    """Largest deviation of the noise added to a picture, for values in [-1, 1]."""
    tests: int = 200
    """Held-out pictures of each style."""


if __name__ == "__main__":  # before torch is imported, so that errors come at once
    start("train.world.clip", Config)

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8, UInt16
from numpy import ndarray
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from data.illustrated import avatars
from data.illustrated.avatars import HELD_OUT, TRAINED, by_all_cores, to_images
from data.illustrated.captions import Speaker, caption
from data.illustrated.shown import Shown, colours, sample, shown, tables
from targetclip.weights import save_tensors
from train.loop import train_by
from train.world.generator import HELD_OUT_SEED, Chosen, Images, begin, pick, random_at

SIZE = 96  # px; a multiple of 32, as the image tower needs it
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
MODEL: dict[str, Any] = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": SIZE, "layers": [1, 1, 1, 1], "width": 32, "head_width": 32},
    "text_cfg": {"context_length": 48, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
}
PREPROCESS = {"mean": MEAN, "std": STD, "interpolation": "bicubic", "resize_mode": "shortest"}
WEIGHTS = "open_clip_model.safetensors"
WORDINGS = 8  # captions of each picture, and ways to ask for each answer
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

COLOURED = ("a person with {} hair", "short {} hair", "long {} hair")
QUESTION_TEXTS = [text for question in QUESTIONS.values() for side in question for text in side]
KINDS = ("glasses", "beard", "hat", "hair", "mouth", "hair_colour", "hat_colour")
HAIR_WORDS = ["", "short hair", "long hair", "curly hair", "bun"]
NOT_ASKED = -1

Styles = tuple[str, ...]
Key = tuple[str, int, int]  # style, seed, index
Embeddings = Float[Tensor, "batch embed"]  # of unit length
Margins = Float[Tensor, "batch questions"]
Pictures = UInt8[Tensor, "count 96 96 3"]


def keys_of(styles: Styles, count: int, seed: int) -> list[Key]:
    """Return what names each of `count` pictures, the styles in turn."""
    return [(styles[i % len(styles)], seed, i // len(styles)) for i in range(count)]


def made_of(key: Key) -> avatars.Drawn:
    """Render the picture that a key names, and return it with what it shows."""
    style, seed, index = key
    svg, drawn = avatars.draw(style, sample(style, seed, index))
    return avatars.render(svg, SIZE), asdict(shown(style, drawn))


def pictures_of(
    folder: Path, styles: Styles, count: int, seed: int
) -> tuple[Pictures, list[Shown]]:
    """Return pictures of styles and what they show, made on first use and kept in `folder`."""
    name = f"{'held-out' if styles == HELD_OUT else 'trained'}-{count}"
    pictures, truths = avatars.bank(folder, name, keys_of(styles, count, seed), made_of, SIZE)
    return pictures, [Shown(**truth) for truth in truths]


@cache
def tokenizer() -> Any:
    """Return the tokenizer, made once in every process."""
    import open_clip

    return open_clip.SimpleTokenizer(context_length=MODEL["text_cfg"]["context_length"])


def captions_of(key: tuple[Shown, int, int]) -> UInt16[ndarray, "wordings context"]:
    """Return tokens of captions of a picture, by two parts of a seed; the first names no colour."""
    item, *seed = key
    rng = np.random.default_rng(seed)
    items = [replace(item, hair_colour="", hat_colour=""), *[item] * (WORDINGS - 1)]
    return np.asarray(tokenizer()([caption(item, rng) for item in items]), np.uint16)


def answers_of(kind: str) -> tuple[list[str], list[list[str]]]:
    """Return the answers to what a picture shows of a kind ("": nothing), and texts for each."""
    speaker, table = Speaker(np.random.default_rng(0)), tables()

    def say(answer: str) -> str:
        opening = speaker.choose(table["openings"])
        if kind == "hair_colour":
            said = speaker.say(speaker.choose(HAIR_WORDS), answer)
        elif kind == "hat_colour":
            said = speaker.say("hat", table["hat_colour_words"].get(answer, answer))
        else:
            said = speaker.say(answer) if answer else speaker.choose(table["absent"][kind])
        return f"{opening} {said}"

    answers = [""] if kind in table["absent"] else []  # where people would say so
    answers += colours() if "colour" in kind else table["words"][kind]
    answers += table["words"]["moustache"] if kind == "beard" else []
    return answers, [[say(answer) for _ in range(WORDINGS)] for answer in answers]


class Questions:
    """What is asked about every picture: answers of each kind, their texts, and the truth."""

    def __init__(self, truths: list[Shown], device: torch.device) -> None:
        columns, texts, self.sizes = [], [], []
        for kind in KINDS:
            answers, asked = answers_of(kind)
            self.sizes.append(len(answers))
            texts += [tokenizer()(wordings) for wordings in asked]
            # A moustache is no beard, but no shaven chin either.
            said = [getattr(t, kind) or (t.moustache if kind == "beard" else "") for t in truths]
            columns.append([answers.index(s) if s in answers else NOT_ASKED for s in said])
        self.tokens = torch.stack(texts, dim=1).to(device)
        """[wordings, answers of all kinds, context]"""
        self.truth = torch.tensor(columns, device=device)
        """[kinds, pictures]"""
        there = torch.stack([there_of(kind, truths) for kind in QUESTIONS], dim=1).to(device)
        self.there = there.float().clamp(min=0)
        """[pictures, questions]: 1 or 0"""
        sides = torch.stack([there == 0, there == 1]).float()
        self.weights = (sides / sides.mean(dim=1, keepdim=True).clamp(min=1e-6)).sum(dim=0) / 2
        """[pictures, questions]: yes and no count the same; 0 where people would not agree."""

    def loss(
        self, logits: Float[Tensor, "batch answers"], chosen: Chosen, grey: Bool[Tensor, " batch"]
    ) -> Float[Tensor, ""]:
        """Return the mean over kinds of the cross-entropy of the right answers."""
        losses, parts = [], logits.split(self.sizes, dim=1)
        for kind, part, truth in zip(KINDS, parts, self.truth[:, chosen], strict=True):
            asked = truth.masked_fill(grey, NOT_ASKED) if "colour" in kind else truth
            total = F.cross_entropy(part, asked, ignore_index=NOT_ASKED, reduction="sum")
            losses.append(total / (asked != NOT_ASKED).sum().clamp(min=1))
        return torch.stack(losses).mean()

    def yes_or_no(self, logits: Margins, chosen: Chosen) -> Float[Tensor, ""]:
        """Return the cross-entropy of whether each of `QUESTIONS` is answered by yes."""
        truth, weight = self.there[chosen], self.weights[chosen]
        return F.binary_cross_entropy_with_logits(logits, truth, weight)


def there_of(kind: str, truths: list[Shown]) -> Int[Tensor, " pictures"]:
    """Return whether pictures show something, 1 or 0; -1 for a moustache, asked for beards."""
    there = torch.tensor([bool(getattr(t, kind)) for t in truths])
    unclear = torch.tensor([kind == "beard" and bool(t.moustache) for t in truths])
    return there.long().masked_fill(unclear & ~there, -1)


def margins(image: Embeddings, text: Float[Tensor, "texts embed"]) -> Margins:
    """Return the cosine of images with yes, the mean of its texts, less that with no (-2 to 2)."""
    sides = text.split([len(side) for question in QUESTIONS.values() for side in question])
    means = F.normalize(torch.stack([side.mean(dim=0) for side in sides]), dim=1)
    return image @ (means[::2] - means[1::2]).T


def normalize(images: Images) -> Images:
    """Return images in [-1, 1] as the model takes them."""
    mean, std = (torch.tensor(x, device=images.device)[None, :, None, None] for x in (MEAN, STD))
    return ((images + 1) / 2 - mean) / std


def augment(images: Images, noise: float, random: torch.Generator) -> Images:
    """Turn, stretch, bend, mirror, brighten, blur, change lines, add noise; colours keep names."""
    count, size = len(images), images.shape[-1]

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        drawn = torch.rand(count, *shape, generator=random, device=random.device)
        return low + (high - low) * drawn

    angle, scale = uniform(-0.25, 0.25), uniform(0.7, 1.35)
    wide, mirror = uniform(0.85, 1.18), torch.where(uniform(0, 1) < 0.5, -1.0, 1.0)
    across = torch.stack([mirror * angle.cos() * scale * wide, -angle.sin() * scale], dim=1)
    down = torch.stack([mirror * angle.sin() * scale * wide, angle.cos() * scale], dim=1)
    turn = torch.cat([torch.stack([across, down], dim=1), uniform(-0.15, 0.15, 2, 1)], dim=2)
    grid = F.affine_grid(turn, list(images.shape), align_corners=False)
    bends = uniform(-0.1, 0.1, 2, 5, 5)
    bent = F.interpolate(bends, size=(size, size), mode="bicubic", align_corners=True)
    grid = grid + bent.permute(0, 2, 3, 1)
    images = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    # Thinner and thicker dark lines: styles differ most in these.
    kind = uniform(0, 1, 1, 1, 1)
    images = torch.where(kind < 0.15, F.max_pool2d(images, 3, 1, 1), images)
    images = torch.where(kind > 0.85, -F.max_pool2d(-images, 3, 1, 1), images)
    images = images * uniform(0.75, 1.15, 1, 1, 1) + uniform(-0.2, 0.2, 1, 1, 1)
    images = images + uniform(-0.07, 0.07, 3, 1, 1)
    grey = images.mean(dim=1, keepdim=True)
    images = grey + uniform(0.75, 1.2, 1, 1, 1) * (images - grey)
    coarse = F.interpolate(F.avg_pool2d(images, 2), size=(size, size), mode="bilinear")
    images = images.lerp(coarse, uniform(0, 1, 1, 1, 1).square())
    grain = torch.randn(images.shape, generator=random, device=random.device)
    return (images + noise * uniform(0, 1, 1, 1, 1).square() * grain).clamp(-1, 1)


def retrieval(image: Embeddings, text: Embeddings) -> float:
    """Return how often a picture finds its caption among 100; what is left over is not asked."""
    size = min(len(image), 100)
    lots = (side[: len(side) // size * size].unflatten(0, (-1, size)) for side in (image, text))
    found = torch.stack([(i @ t.T).argmax(dim=1) for i, t in zip(*lots, strict=True)]).cpu()
    return float((found == torch.arange(size)).float().mean())


def balanced(found: Bool[Tensor, " n"], truth: Bool[Tensor, " n"]) -> float:
    """Return the mean of how often what is there and what is not is said; nan if one is missing."""
    right = found == truth
    return float((right[truth].float().mean() + right[~truth].float().mean()) / 2)


def embeddings(embed: Callable[..., Tensor], inputs: Tensor, device: torch.device) -> Embeddings:
    """Return unit embeddings of inputs that a model takes, a few at a time."""
    found = [embed(part.to(device)) for part in inputs.split(100)]
    return F.normalize(torch.cat(found).float(), dim=1)


def zero_shot(
    said: Bool[Tensor, "n questions"], nearest: Int[Tensor, " n"], truths: list[Shown]
) -> dict[str, float]:
    """Return balanced accuracy of each question, and how often hair colour is right."""
    figures = {}
    for kind, yes in zip(QUESTIONS, said.unbind(dim=1), strict=True):
        truth = there_of(kind, truths)
        clear = truth >= 0
        if 0 < truth[clear].sum() < clear.sum():
            figures[kind] = balanced(yes[clear], truth[clear].bool())
    names = list(colours())
    answers = zip(nearest.tolist(), truths, strict=True)
    right = [names[i] == item.hair_colour for i, item in answers if item.hair_colour]
    return figures | {"hair_colour": sum(right) / max(len(right), 1)}


@torch.no_grad()
def figures_of(
    model: Any, pictures: Pictures, truths: list[Shown], styles: Styles, device: torch.device
) -> dict[str, dict[str, float]]:
    """Return the figures of each style; of `all` of them, with retrieval among 100 captions."""
    rng = np.random.default_rng(0)
    complete = [caption(item, rng, complete=True) for item in truths]
    coloured = [form.format(c) for c in colours() for form in COLOURED]
    image = embeddings(model.encode_image, normalize(to_images(pictures)), device)
    text, questions, hair = (
        embeddings(model.encode_text, tokenizer()(texts), device)
        for texts in (complete, QUESTION_TEXTS, coloured)
    )
    hair = F.normalize(hair.unflatten(0, (-1, len(COLOURED))).mean(dim=1), dim=1)
    said, nearest = margins(image, questions).cpu() > 0, (image @ hair.T).argmax(dim=1).cpu()
    figures = {"all": zero_shot(said, nearest, truths)}
    figures["all"]["caption"] = retrieval(image, text)
    for i, style in enumerate(styles):
        own = slice(i, None, len(styles))
        figures[style] = zero_shot(said[own], nearest[own], truths[own])
    return figures


def save_local_directory(model: nn.Module, folder: Path) -> None:
    """Write a model as open_clip reads it from a local directory; weights in half precision."""
    weights = model.state_dict().items()
    half = {name: t.half() if t.is_floating_point() else t for name, t in weights}
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(folder / WEIGHTS, half, {"format": "pt"})
    numbers = {"model_cfg": MODEL, "preprocess_cfg": PREPROCESS}
    command.write_json(folder / "open_clip_config.json", numbers)


def run(config: Config) -> None:
    import open_clip

    device = begin(config)
    model = open_clip.CLIP(**MODEL)
    if config.start is not None:
        open_clip.load_checkpoint(model, str(config.start / WEIGHTS))
    model = model.to(device)
    folder = config.out.parent
    pictures, truths = pictures_of(folder, TRAINED, config.pictures, config.seed)
    pictures = pictures.to(device)
    questions = Questions(truths, device)
    yes_or_no = tokenizer()(QUESTION_TEXTS).to(device)
    keys = [(item, config.seed, i) for i, item in enumerate(truths)]
    captions = np.stack(list(by_all_cores(captions_of, keys, "captions")))
    tokens = torch.from_numpy(captions.astype(np.int32)).to(device)

    def loss_at(step: int) -> Tensor:
        random = random_at(config.seed, step, device)
        chosen = pick(len(truths), config.batch_size, random)
        images = augment(to_images(pictures[chosen]), config.noise, random)
        grey = torch.rand(len(chosen), generator=random, device=device) < 0.05
        images = images.mean(dim=1, keepdim=True).where(grey[:, None, None, None], images)
        wording = pick(WORDINGS, len(chosen), random).masked_fill(grey, 0)
        ways = pick(WORDINGS, questions.tokens.shape[1], random)
        asked = questions.tokens[ways, torch.arange(len(ways), device=device)]
        texts = torch.cat([tokens[chosen, wording].long(), asked, yes_or_no])
        inputs = normalize(images).contiguous(memory_format=torch.channels_last)
        model.train()
        # The fused attention's backward pass is twice as slow on a processor.
        with torch.autocast(device.type, dtype=torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            image, text, scale = (part.float() for part in model(inputs, texts))
        own, answers, sides = text.split((len(chosen), len(ways), len(yes_or_no)))
        with torch.no_grad():
            model.logit_scale.clamp_(max=np.log(100))
        truth, logits = torch.arange(len(chosen), device=device), scale * image @ own.T
        contrast = (F.cross_entropy(logits, truth) + F.cross_entropy(logits.T, truth)) / 2
        answered = questions.loss(scale * image @ answers.T, chosen, grey)
        said = questions.yes_or_no(scale * margins(image, sides), chosen)
        return contrast + answered + said

    def judged(average: nn.Module, styles: Styles) -> dict[str, dict[str, float]]:
        drawn = pictures_of(folder, styles, config.tests * len(styles), HELD_OUT_SEED)
        return figures_of(average, *drawn, styles, device)

    def evaluate(average: nn.Module) -> dict[str, float]:
        return judged(average, TRAINED)["all"]

    average = train_by(config, model, loss_at, evaluate, decay_from=0.3, ema=0.995)
    # Once, at the end: nothing is chosen by styles that are held out.
    report = {"trained": judged(average, TRAINED), "held_out": judged(average, HELD_OUT)}
    command.write_json(config.out / "report.json", report)
    save_local_directory(average, config.out / "model")
    command.say_next(config.out, "model/, report.json", "read report.json")
