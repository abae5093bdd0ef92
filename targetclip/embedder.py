"""From images to embeddings: what the project asks of an image encoder, and CLIP through open_clip.

Knows how an image in [-1, 1] becomes what an encoder wants to see, in two named ways:

- `consistent`: what the encoder was trained on (antialiased resize, its own mean and std), so a
  generated image and the same picture read from disk have the same embedding;
- `release`: what the released TargetCLIP code shows to CLIP (averages of blocks, values left in
  [-1, 1], no mean and std), to reproduce its numbers.

Knows nothing of generators, directions or losses. Embeddings are raw, as the encoder gives them.
"""

import difflib
import hashlib
import json
import zipfile
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

from targetclip.recipes import Preprocess

Resize = Literal["area", "bilinear", "bicubic"]

WEIGHT_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".npz", ".npy")
LOCAL_DIR, HUB = "local-dir:", "hf-hub:"


@dataclass(frozen=True)
class EncoderInput:
    """What an image encoder wants to see: square size in px, and numbers for values in [0, 1]."""

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: Literal["bilinear", "bicubic"]


@runtime_checkable
class EmbedsImages(Protocol):
    """What a loss asks of a network that looks at images, NCHW in [-1, 1]."""

    def embed_images(
        self, images: Float[Tensor, "batch 3 height width"], preprocess: Preprocess = "consistent"
    ) -> Float[Tensor, "batch embed"]:
        """Differentiable in `images`."""


@runtime_checkable
class ImageEmbedder(EmbedsImages, Protocol):
    """What the project asks of an image encoder. Images are NCHW in [-1, 1], embeddings raw."""

    @property
    def embed_dim(self) -> int: ...

    @property
    def image_size(self) -> int:
        """Side in px of the encoder's own input; images of any square size are accepted."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 of weights and preprocessing: embeddings compare within one embedder only."""

    def embed_pictures(self, pictures: Sequence[Image.Image]) -> Float[Tensor, "batch embed"]:
        """Embed RGB pictures as the encoder's own library would. No gradient."""


def area_matrix(in_size: int, out_size: int) -> Float[Tensor, "{out_size} {in_size}"]:
    """Row i holds which part of output pixel i each input pixel covers.

    For sizes that are multiples of 32 this is a nearest-neighbour enlargement by out_size/32
    followed by an average pool of in_size/32, without the image in between; other sizes, for
    which those two steps do not exist, follow by the same definition.
    """
    # In units in which an input pixel is out_size long and an output pixel in_size long, all
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
    """The linear map of one axis. Resizing is `rows @ image @ columns.T`.

    Two products are quick, deterministic in their gradient on every device, and never build an
    enlarged image.
    """
    # A tensor first made under inference_mode could not take part in a gradient later.
    with torch.inference_mode(False), torch.no_grad():
        if resize == "area":
            matrix = area_matrix(in_size, out_size)
        else:
            # One resized axis of the identity is the matrix; the other axis keeps its size, where
            # both filters are the identity.
            identity = torch.eye(in_size, dtype=torch.float64)[None, None]
            matrix = F.interpolate(
                identity, (out_size, in_size), mode=resize, antialias=True, align_corners=False
            )[0, 0]
        return matrix.to(device=device, dtype=dtype)


def preprocess_images(
    images: Float[Tensor, "batch 3 height width"], preprocess: Preprocess, wanted: EncoderInput
) -> Float[Tensor, "batch 3 size size"]:
    """Turn images in [-1, 1] into the encoder's input, differentiably (see the module docstring).

    Values are neither clamped nor rounded to 8 bits, so the gradient lives everywhere.

    Raises:
        ValueError: the images are not square, or `preprocess` is unknown.
    """
    height, width = images.shape[-2:]
    if height != width:
        raise ValueError(
            f"expected square images, found {height} x {width}; crop them first "
            "(targetclip.media.images.center_square)"
        )
    if preprocess == "release":
        resize: Resize = "area"
    elif preprocess == "consistent":
        resize = wanted.interpolation
    else:
        raise ValueError(f"preprocess must be 'release' or 'consistent', found {preprocess!r}")
    matrix = resize_matrix(resize, height, wanted.size, images.device, images.dtype)
    resized = matrix @ images @ matrix.T
    if preprocess == "release":
        return resized
    mean = images.new_tensor(wanted.mean).view(3, 1, 1)
    std = images.new_tensor(wanted.std).view(3, 1, 1)
    return (resized * 0.5 + 0.5 - mean) / std


def near(name: str, names: Sequence[str]) -> str:
    """The part of an error message that helps with a misspelt name."""
    matches = difflib.get_close_matches(name, names, n=5, cutoff=0.4)
    return ", ".join(matches or names[:5])


def model_identifier(name: str | Path) -> str:
    """What open_clip calls the model: a built-in name, `local-dir:PATH` or `hf-hub:ORG/NAME`."""
    import open_clip

    text = str(name)
    if isinstance(name, str):
        if text.startswith(HUB):
            return text
        builtin = text.replace("/", "-")
        if builtin in open_clip.list_models():
            return builtin
    folder = Path(text.removeprefix(LOCAL_DIR))
    if not folder.is_dir():
        if isinstance(name, Path) or text.startswith(LOCAL_DIR):
            raise FileNotFoundError(f"no CLIP folder at {str(folder)!r}; check the path")
        raise ValueError(
            f"no CLIP model {name!r}: open_clip has no such name and there is no such folder; "
            f"near names: {near(builtin, open_clip.list_models())}"
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
    """Refuse what open_clip would load wrongly without a word, or not at all."""
    if not path.is_file():
        raise FileNotFoundError(f"no CLIP weights at {str(path)!r}; check the path")
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(entry.endswith("/constants.pkl") for entry in archive.namelist()):
                raise ValueError(
                    f"{str(path)!r} is a TorchScript program, as OpenAI published CLIP, and would "
                    "have to be run; use the tag 'openai', or save its state_dict as safetensors"
                )
    # Weights do not tell their activation; a wrong one spoils embeddings silently. Files of the
    # hub's cache keep their repository in a folder's name.
    hints = [part for part in path.parts if part.startswith("models--")] + [path.name]
    if not quick_gelu and any("openai" in hint.lower() for hint in hints):
        raise ValueError(
            f"{str(path)!r} looks like OpenAI's weights, which need QuickGELU; add '-quickgelu' to "
            "the model's name (or rename the file if they are not)"
        )


def resolve_weights(name: str, pretrained: str | Path | None) -> tuple[str, bool]:
    """The tag or file of weights for a built-in model, and whether to force QuickGELU on."""
    import open_clip

    tags = open_clip.list_pretrained_tags_by_model(name)
    if pretrained is None:
        raise ValueError(
            f"{name!r} needs weights (random ones are never used); give a file or one of its tags: "
            f"{', '.join(tags) or 'none known'}"
        )
    config = open_clip.get_model_config(name)
    quick_gelu = bool(config.get("quick_gelu", False))
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
    """Have open_clip's transformers work on [tokens, batch, width]; results stay the same.

    Given [batch, tokens, width], their attention turns it into a view of [tokens, batch, width],
    and a linear layer with a frozen weight multiplies such a view token by token, with a copy of
    the weight for each: a third of a step of the optimizer in bfloat16 on a CPU.
    """
    from open_clip.transformer import ResidualAttentionBlock, Transformer

    transformer: Any
    for transformer in clip.modules():
        # Exactly these two: their subclasses and other blocks know only one order.
        if type(transformer) is Transformer and all(
            type(block) is ResidualAttentionBlock for block in transformer.resblocks
        ):
            transformer.batch_first = False
            for block in transformer.resblocks:
                block.attn.batch_first = False


class ClipEmbedder(nn.Module):
    """A frozen CLIP model of open_clip, in float32; move it with `.to(device)`."""

    def __init__(
        self,
        clip: nn.Module,
        wanted: EncoderInput,
        transform: Callable[[Image.Image], Tensor],
        tokenizer: Callable[[list[str]], Tensor],
        config: dict[str, Any],
    ) -> None:
        """Use `load`. `config` is open_clip's model config, with the activation really in use."""
        super().__init__()
        put_tokens_first(clip)
        self.clip: Any = clip.float().requires_grad_(False)
        self.eval()
        self.wanted = wanted
        self.transform = transform
        self.tokenizer = tokenizer
        self.config = config
        self.embed_dim: int = config["embed_dim"]
        self.image_size = wanted.size

    @classmethod
    def load(cls, name: str | Path, pretrained: str | Path | None = None) -> "ClipEmbedder":
        """Load any model of open_clip, never with random weights.

        `name` is a built-in name ("ViT-B-32", then `pretrained` is a tag such as "openai" or a
        weights file), a folder holding `open_clip_config.json` and `open_clip_model.safetensors`
        (also written "local-dir:PATH"), or "hf-hub:ORG/NAME". Tags trained with QuickGELU get it;
        for a file say so by the name ("ViT-B-32-quickgelu"). Tags and hub names download once.

        Raises:
            FileNotFoundError: no such folder or file.
            ValueError: unknown name or tag, no weights named, or weights that cannot be read, do
                not fit the model or hold NaN.
        """
        import open_clip
        from open_clip.transform import PreprocessCfg, image_transform_v2

        identifier = model_identifier(name)
        built_in = not identifier.startswith((LOCAL_DIR, HUB))
        if not built_in and pretrained is not None:
            raise ValueError(
                f"{identifier!r} brings its own weights, found pretrained={str(pretrained)!r} as "
                "well; drop one of the two"
            )
        weights, force_quick_gelu = None, False
        if built_in:
            weights, force_quick_gelu = resolve_weights(identifier, pretrained)
        what = f"{identifier!r}" + (f" with weights {weights!r}" if weights else "")
        try:
            clip = open_clip.create_model(
                identifier, weights, force_quick_gelu=force_quick_gelu, require_pretrained=True
            )
            config = open_clip.get_model_config(identifier)
            tokenizer = open_clip.get_tokenizer(identifier)
        except Exception as error:  # a foreign file or a failed download raises nearly anything
            reason = " ".join(str(error).split())[:300]
            raise ValueError(
                f"could not load CLIP {what}: {reason}; check that the weights fit the model, or "
                "the connection if they had to be downloaded"
            ) from error
        if not all(tensor.isfinite().all() for tensor in clip.parameters()):
            raise ValueError(f"the weights of CLIP {what} hold NaN or infinity; get them again")
        numbers = PreprocessCfg(**clip.visual.preprocess_cfg)
        height, width = numbers.input_size[1:]
        if height != width:
            raise ValueError(f"CLIP {what} sees {height} x {width} px; only square input is known")
        wanted = EncoderInput(
            size=height,
            mean=tuple(float(value) for value in numbers.mean),
            std=tuple(float(value) for value in numbers.std),
            # as open_clip's own transform reads it: everything but bilinear is bicubic
            interpolation="bilinear" if numbers.interpolation == "bilinear" else "bicubic",
        )
        transform = image_transform_v2(numbers, is_train=False)
        config["quick_gelu"] = force_quick_gelu or bool(config.get("quick_gelu", False))
        return cls(clip, wanted, transform, tokenizer, config)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of model config, preprocessing numbers and every weight.

        Computed once; do not change weights after reading it.
        """
        numbers = json.dumps([self.config, asdict(self.wanted)], sort_keys=True)
        digest = hashlib.sha256(numbers.encode())
        for name, tensor in sorted(self.clip.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.float().cpu().numpy().tobytes())
        return digest.hexdigest()

    @property
    def device(self) -> torch.device:
        parameter: Tensor = next(self.clip.parameters())
        return parameter.device

    def embed_images(
        self, images: Float[Tensor, "batch 3 height width"], preprocess: Preprocess = "consistent"
    ) -> Float[Tensor, "batch embed"]:
        """Embed square images in [-1, 1] of any size, differentiably; raw embeddings.

        Raises:
            ValueError: the images are not square, or `preprocess` is unknown.
        """
        inputs = preprocess_images(images.float(), preprocess, self.wanted)
        embeddings: Tensor = self.clip.encode_image(inputs, normalize=False)
        return embeddings

    @torch.no_grad()
    def embed_pictures(self, pictures: Sequence[Image.Image]) -> Float[Tensor, "batch embed"]:
        """Embed RGB pictures through open_clip's own preprocessing; raw embeddings.

        Raises:
            ValueError: no picture, or one that is not RGB.
        """
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
        """Embed texts, cut at the model's context length; raw embeddings.

        Raises:
            ValueError: no text.
        """
        if not texts:
            raise ValueError("expected one or more texts, found none")
        tokens = self.tokenizer(list(texts)).to(self.device)
        embeddings: Tensor = self.clip.encode_text(tokens, normalize=False)
        return embeddings
