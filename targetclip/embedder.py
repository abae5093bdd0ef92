"""From images to embeddings: the interface of an image encoder, and CLIP through open_clip.

Knows two ways to turn an image in [-1, 1] into the input of an encoder:

- `consistent`: as in the encoder's training (antialiased resize, its own mean and std), so that a
  generated image and the same picture read from disk have the same embedding;
- `release`: as in the released TargetCLIP code (averages of blocks, values left in [-1, 1], no mean
  and std), to reproduce its numbers.

Knows nothing of generators, directions or losses. Embeddings are raw: not of unit length.
"""

import difflib
import json
import logging
import zipfile
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from targetclip.command import one_line
from targetclip.generators import Generator
from targetclip.recipes import Preprocess
from targetclip.weights import digest_of_weights
from targetclip.world_files import HUB, LOCAL_DIR, WEIGHT_SUFFIXES

logger = logging.getLogger(__name__)

Resize = Literal["area", "bilinear", "bicubic"]
Tokenizer = Callable[..., Tensor]
"""From a list of texts to tokens [texts, context_length], padded; takes `context_length` as well.
"""

SIGNED = (0.5, 0.5, 0.5)  # as mean and std: values stay in [-1, 1]


@dataclass(frozen=True)
class EncoderInput:
    """The input of an image encoder: square, normalised."""

    size: int
    """Side in px."""
    mean: tuple[float, ...]
    """Of each colour, in [0, 1]."""
    std: tuple[float, ...]
    interpolation: Literal["bilinear", "bicubic"]


@runtime_checkable
class EmbedsImages(Protocol):
    """The interface that losses need of a network. Images are NCHW in [-1, 1]."""

    def embed_images(
        self, images: Float[Tensor, "batch 3 height width"], preprocess: Preprocess = "consistent"
    ) -> Float[Tensor, "batch embed"]:
        """Embed square images of any size, differentiably."""


@runtime_checkable
class ImageEmbedder(EmbedsImages, Protocol):
    """The interface of an image encoder. Images are NCHW in [-1, 1], embeddings raw."""

    @property
    def embed_dim(self) -> int:
        """Length of an embedding."""

    @property
    def image_size(self) -> int:
        """Side in px of the encoder's own input; images of any square size are accepted."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 of weights and preprocessing: embeddings compare within one embedder only."""

    def embed_pictures(self, pictures: Sequence[Image.Image]) -> Float[Tensor, "batch embed"]:
        """Embed RGB pictures, preprocessed by the encoder's own library. No gradient."""


def embed_latents(
    generator: Generator,
    embedder: EmbedsImages,
    ws: Float[Tensor, "images num_ws w_dim"],
    preprocess: Preprocess,
    max_images: int,
    render_size: int | None = None,
) -> Float[Tensor, "images embed"]:
    """Render latents and embed the images, at most `max_images` at a time (see
    `Recipe.render_size`).

    With gradients, each of several chunks is rendered again in the backward pass, so that memory
    holds one chunk.
    """

    def embed(part: Tensor) -> Tensor:
        # A generator of your own need not be able to end early.
        end = {} if render_size is None else {"resolution": render_size}
        return embedder.embed_images(generator.synthesis(part, **end), preprocess)

    chunks = ws.split(max_images)
    if len(chunks) == 1 or not ws.requires_grad:
        return torch.cat([embed(part) for part in chunks])
    return torch.cat([checkpoint(embed, part, use_reentrant=False) for part in chunks])


def area_matrix(in_size: int, out_size: int) -> Float[Tensor, "{out_size} {in_size}"]:
    """Return the map whose row i holds the part of output pixel i that each input pixel covers.

    For sizes that are multiples of 32 this equals the release's nearest-neighbour enlargement by
    out_size/32 and average pool of in_size/32, without the image in between.
    """
    # An input pixel is taken as out_size long and an output pixel as in_size long, so that all
    # borders are whole numbers.
    out_start = torch.arange(out_size)[:, None] * in_size
    in_start = torch.arange(in_size)[None, :] * out_size
    end = torch.minimum(out_start + in_size, in_start + out_size)
    overlap = (end - torch.maximum(out_start, in_start)).clamp_min(0)
    return overlap.double() / in_size


@lru_cache(maxsize=64)
def resize_matrix(
    resize: Resize, in_size: int, out_size: int, device: torch.device, dtype: torch.dtype
) -> Float[Tensor, "{out_size} {in_size}"]:
    """Return the linear map of one axis. Resizing is `rows @ image @ columns.T`.

    Two products are quick, have a deterministic gradient on every device, and build no enlarged
    image.
    """
    # The matrix is cached: made under inference_mode, it could not take part in a gradient later.
    with torch.inference_mode(False), torch.no_grad():
        if resize == "area":
            matrix = area_matrix(in_size, out_size)
        else:
            # Resizing one axis of the identity matrix gives the map; the other axis keeps its size.
            identity = torch.eye(in_size, dtype=torch.float64)[None, None]
            matrix = F.interpolate(
                identity, (out_size, in_size), mode=resize, antialias=True, align_corners=False
            )[0, 0]
        return matrix.to(device=device, dtype=dtype)


@lru_cache(maxsize=64)
def colour(
    values: tuple[float, ...], device: torch.device, dtype: torch.dtype
) -> Float[Tensor, "3 1 1"]:
    """Return a number for each colour. Cached, for an accelerator waits for every such copy."""
    with torch.inference_mode(False):  # as in `resize_matrix`
        return torch.tensor(values, device=device, dtype=dtype).view(3, 1, 1)


def preprocess_images(
    images: Float[Tensor, "batch 3 height width"],
    preprocess: Preprocess,
    encoder_input: EncoderInput,
) -> Float[Tensor, "batch 3 size size"]:
    """Turn images in [-1, 1] into the encoder's input, differentiably (see the module docstring).

    Values are neither clamped nor rounded to 8 bits, so that every pixel has a gradient.

    ValueError: the images are not square, or `preprocess` is unknown.
    """
    height, width = images.shape[-2:]
    if height != width:
        raise ValueError(
            f"expected square images, found {height} x {width}; crop them first "
            "(targetclip.media.images.center_square)"
        )
    if preprocess not in ("release", "consistent"):
        raise ValueError(f"preprocess must be 'release' or 'consistent', found {preprocess!r}")
    resize: Resize = "area" if preprocess == "release" else encoder_input.interpolation
    matrix = resize_matrix(resize, height, encoder_input.size, images.device, images.dtype)
    resized = matrix @ images @ matrix.T
    if preprocess == "release":
        return resized
    mean, std = (
        colour(values, images.device, images.dtype)
        for values in (encoder_input.mean, encoder_input.std)
    )
    return (resized * 0.5 + 0.5 - mean) / std


def near(name: str, names: Sequence[str]) -> str:
    """Return the names most like a misspelt one, for a message."""
    matches = difflib.get_close_matches(name, names, n=5, cutoff=0.4)
    return ", ".join(matches or names[:5])


def model_identifier(name: str | Path) -> str:
    """Return open_clip's identifier: a built-in name, `local-dir:PATH` or `hf-hub:ORG/NAME`."""
    import open_clip

    text, models = str(name), open_clip.list_models()
    if isinstance(name, str):
        if text.startswith(HUB):
            return text
        if (builtin := text.replace("/", "-")) in models:
            return builtin
    folder = Path(text.removeprefix(LOCAL_DIR))
    if not folder.is_dir():
        if isinstance(name, Path) or text.startswith(LOCAL_DIR):
            raise FileNotFoundError(f"no CLIP folder at {str(folder)!r}; check the path")
        raise ValueError(
            f"no CLIP model {name!r}: open_clip has no such name and there is no such folder; "
            f"near names: {near(builtin, models)}"
        )
    if not (folder / "open_clip_config.json").is_file():
        raise FileNotFoundError(
            f"expected 'open_clip_config.json' in {str(folder)!r}, found none; "
            "give a folder written for open_clip's local-dir"
        )
    if not any(path.suffix in (".safetensors", ".bin", ".pth") for path in folder.iterdir()):
        raise FileNotFoundError(
            f"expected weights such as 'open_clip_model.safetensors' in {str(folder)!r}, found none"
        )
    return f"{LOCAL_DIR}{folder.absolute()}"


def check_weights_file(path: Path, quick_gelu: bool) -> None:
    """Refuse a file that open_clip would load wrongly without an error, or not at all."""
    if not path.is_file():
        raise FileNotFoundError(f"no CLIP weights at {str(path)!r}; check the path")
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(entry.endswith("/constants.pkl") for entry in archive.namelist()):
                raise ValueError(
                    f"{str(path)!r} is a TorchScript program, as OpenAI published CLIP, and would "
                    "have to be run; use the tag 'openai', or save its state_dict as safetensors"
                )
    # A file does not state its activation, and a wrong one spoils embeddings without an error.
    # In the hub's cache the repository is in the name of a folder.
    hints = [part for part in path.parts if part.startswith("models--")] + [path.name]
    if not quick_gelu and any("openai" in hint.lower() for hint in hints):
        raise ValueError(
            f"{str(path)!r} looks like OpenAI's weights, which need QuickGELU; add '-quickgelu' to "
            "the model's name (or rename the file if they are not)"
        )


def resolve_weights(name: str, pretrained: str | Path | None) -> tuple[str, bool]:
    """Return the tag or file of weights of a built-in model, and whether to force QuickGELU."""
    import open_clip

    tags = open_clip.list_pretrained_tags_by_model(name)
    if pretrained is None:
        raise ValueError(
            f"{name!r} needs weights (random ones are never used); give a file or one of its tags: "
            f"{', '.join(tags) or 'none known'}"
        )
    quick_gelu = bool(open_clip.get_model_config(name).get("quick_gelu", False))
    if isinstance(pretrained, str):
        tag = open_clip.pretrained.get_pretrained_cfg(name, pretrained)
        if tag:
            # open_clip only warns when a tag's weights want QuickGELU and the name does not say so.
            return pretrained, bool(tag.get("quick_gelu", False)) and not quick_gelu
    path = Path(pretrained)
    is_path = isinstance(pretrained, Path) or len(path.parts) > 1 or path.suffix in WEIGHT_SUFFIXES
    if not is_path and not path.exists():
        raise ValueError(
            f"{name!r} has no weights {pretrained!r}: neither a tag nor a file; near tags: "
            f"{near(str(pretrained), tags) or 'none known'}"
        )
    check_weights_file(path, quick_gelu)
    return str(path), False


def put_tokens_first(clip: nn.Module) -> None:
    """Make open_clip's transformers work on [tokens, batch, width]; results stay the same.

    Given [batch, tokens, width], their attention makes a view of [tokens, batch, width]. A linear
    layer with a frozen weight multiplies such a view token by token, and copies the weight each
    time: a third of a step of the optimizer in bfloat16 on a CPU.
    """
    from open_clip.transformer import ResidualAttentionBlock, Transformer

    transformer: Any
    for transformer in clip.modules():
        # Exactly these two classes: their subclasses and other blocks know only one order.
        if type(transformer) is Transformer and all(
            type(block) is ResidualAttentionBlock for block in transformer.resblocks
        ):
            transformer.batch_first = False
            for block in transformer.resblocks:
                block.attn.batch_first = False


# Texts


def tokens_of(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the tokens of a whole text, up to the last one that differs from the padding."""
    room = len(text) * 8 + 16  # a character has at most 4 bytes, and a byte is at least a token
    row = tokenizer([text], context_length=room)[0].tolist()
    count = max((i + 1 for i, token in enumerate(row) if token != row[-1]), default=0)
    return row[:count]


def is_cut(tokenizer: Tokenizer, text: str) -> bool:
    """Tell whether a text is longer than the tokenizer's context."""
    whole, row = tokens_of(tokenizer, text), tokenizer([text])[0].tolist()
    return row[: len(whole)] != whole


def left_out(tokenizer: Tokenizer, text: str) -> str:
    """Return the words at the end of a text that do not fit into the context; empty if all do."""
    if not is_cut(tokenizer, text):
        return ""
    words, space = text.split(), " "
    if is_cut(tokenizer, max(words, key=len)):  # a script without spaces
        words, space = list(text), ""
    counts = range(len(words) + 1)
    first = bisect_left(counts, True, key=lambda k: is_cut(tokenizer, space.join(words[:k])))
    return space.join(words[first - 1 :])


def unknown_words(tokenizer: Tokenizer, text: str) -> str:
    """Return the words in scripts of which the tokenizer has at best single letters, if any."""

    def is_foreign(word: str) -> bool:
        letters = [letter for letter in word if letter.isalpha()]
        return 2 * sum(not letter.isascii() for letter in letters) > len(letters)

    foreign = " ".join(filter(is_foreign, text.split()))
    tokens = len(tokens_of(tokenizer, foreign)) - len(tokens_of(tokenizer, ""))
    return foreign if tokens >= max(3, sum(map(str.isalpha, foreign))) else ""


@lru_cache(maxsize=1024)  # each text is warned of once
def check_text(tokenizer: Tokenizer, text: str) -> None:
    """Log a warning of words that have no part in the embedding of a text."""
    if lost := left_out(tokenizer, text):
        context = len(tokenizer([text])[0])
        logger.warning(
            "text too long for the %d tokens of this embedder: %r is left out; shorten it",
            context,
            lost,
        )
    if unknown := unknown_words(tokenizer, text):
        logger.warning(
            "text in a script that this embedder's tokenizer hardly knows: %r is cut into single "
            "letters or bytes, so the result may have little to do with it; write it in English",
            unknown,
        )


class ClipEmbedder(nn.Module):
    """A frozen CLIP model of open_clip, in float32; move it with `.to(device)`."""

    def __init__(
        self,
        clip: nn.Module,
        encoder_input: EncoderInput,
        transform: Callable[[Image.Image], Tensor],
        tokenizer: Tokenizer,
        config: dict[str, Any],
    ) -> None:
        """Use `load`. `config` is open_clip's model config, with the activation in use."""
        super().__init__()
        put_tokens_first(clip)
        self.clip: Any = clip.float().requires_grad_(False)
        self.eval()
        self.input = encoder_input
        self.transform = transform
        self.tokenizer = tokenizer
        self.config = config
        self.embed_dim: int = config["embed_dim"]
        self.image_size = encoder_input.size

    @classmethod
    def load(cls, name: str | Path, pretrained: str | Path | None = None) -> "ClipEmbedder":
        """Load any model of open_clip, never with random weights.

        Tags and hub names download once.

        Args:
            name: a built-in name such as "ViT-B-32", "hf-hub:ORG/NAME", or a folder with
                `open_clip_config.json` and `open_clip_model.safetensors` (also "local-dir:PATH").
                Tags trained with QuickGELU get it; for a file, choose it by the name
                ("ViT-B-32-quickgelu").
            pretrained: weights of a built-in model: a tag such as "openai", or a file.

        Raises:
            FileNotFoundError: no such folder or file.
            ValueError: unknown name or tag, no weights named, or weights that cannot be read, do
                not fit the model or hold NaN.
        """
        import open_clip
        from open_clip.transform import PreprocessCfg, image_transform_v2

        identifier = model_identifier(name)
        weights, force_quick_gelu = None, False
        if not identifier.startswith((LOCAL_DIR, HUB)):
            weights, force_quick_gelu = resolve_weights(identifier, pretrained)
        elif pretrained is not None:
            raise ValueError(
                f"{identifier!r} has its own weights, found pretrained={str(pretrained)!r} as "
                "well; drop one of the two"
            )
        model = f"{identifier!r}" + (f" with weights {weights!r}" if weights else "")
        try:
            clip = open_clip.create_model(
                identifier, weights, force_quick_gelu=force_quick_gelu, require_pretrained=True
            )
            config = open_clip.get_model_config(identifier)
            tokenizer = open_clip.get_tokenizer(identifier)
        except Exception as error:  # a foreign file or a failed download raises nearly anything
            raise ValueError(
                f"could not load CLIP {model}: {one_line(error)[:300]}; check that the weights fit "
                "the model, or the connection if they had to be downloaded"
            ) from error
        if not all(tensor.isfinite().all() for tensor in clip.parameters()):
            raise ValueError(f"the weights of CLIP {model} hold NaN or infinity; get them again")
        numbers = PreprocessCfg(**clip.visual.preprocess_cfg)
        height, width = numbers.input_size[1:]
        if height != width:
            raise ValueError(f"CLIP {model} takes {height} x {width} px: only square input works")
        encoder_input = EncoderInput(
            size=height,
            mean=tuple(map(float, numbers.mean)),
            std=tuple(map(float, numbers.std)),
            # As open_clip's own transform: everything but bilinear is bicubic.
            interpolation="bilinear" if numbers.interpolation == "bilinear" else "bicubic",
        )
        transform = image_transform_v2(numbers, is_train=False)
        config["quick_gelu"] = force_quick_gelu or bool(config.get("quick_gelu", False))
        return cls(clip, encoder_input, transform, tokenizer, config)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of model config, preprocessing numbers and every weight.

        Computed once; do not change weights after reading it.
        """
        header = json.dumps([self.config, asdict(self.input)], sort_keys=True)
        return digest_of_weights(header, self.clip.state_dict())

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        parameter: Tensor = next(self.clip.parameters())
        return parameter.device

    def embed_images(
        self, images: Float[Tensor, "batch 3 height width"], preprocess: Preprocess = "consistent"
    ) -> Float[Tensor, "batch embed"]:
        """Embed square images in [-1, 1] of any size, differentiably.
        ValueError: the images are not square, or `preprocess` is unknown."""
        inputs = preprocess_images(images.float(), preprocess, self.input)
        # Convolutions of bfloat16 take two thirds of the time in this layout on a CPU.
        inputs = inputs.contiguous(memory_format=torch.channels_last)
        embeddings: Tensor = self.clip.encode_image(inputs, normalize=False)
        return embeddings

    @torch.no_grad()
    def embed_pictures(self, pictures: Sequence[Image.Image]) -> Float[Tensor, "batch embed"]:
        """Embed RGB pictures, preprocessed by open_clip.
        ValueError: no picture, or one that is not RGB."""
        modes = {picture.mode for picture in pictures}
        if modes != {"RGB"}:
            raise ValueError(
                f"expected one or more RGB pictures, found {len(pictures)} of modes "
                f"{sorted(modes)}; use targetclip.media.images.read_picture"
            )
        inputs = torch.stack([self.transform(picture) for picture in pictures]).to(self.device)
        embeddings: Tensor = self.clip.encode_image(inputs, normalize=False)
        return embeddings

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Float[Tensor, "batch embed"]:
        """Embed texts, cut at the model's context length.

        The log names the words that are left out, and those in a script that the tokenizer hardly
        knows.

        ValueError: no text.
        """
        if not texts:
            raise ValueError("expected one or more texts, found none")
        for text in texts:
            check_text(self.tokenizer, text)
        tokens = self.tokenizer(list(texts)).to(self.device)
        embeddings: Tensor = self.clip.encode_text(tokens, normalize=False)
        return embeddings
