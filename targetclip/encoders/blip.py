"""BLIP's image encoder, through transformers: a second judge of essence.

No edit is optimized for this network, as in the paper's evaluation. Knows nothing of edits. Needs
the extra `blip`.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from targetclip.embedder import EncoderInput, preprocess_images
from targetclip.recipes import Preprocess
from targetclip.weights import digest_of_weights


class BlipEmbedder(nn.Module):
    """BLIP's image encoder, frozen, in float32: an image to the encoder's class token."""

    vision: Any

    def __init__(self, vision: nn.Module, processor: Any, encoder_input: EncoderInput) -> None:
        """Use `load`."""
        super().__init__()
        self.vision = vision.requires_grad_(False).float().eval()
        self.processor = processor
        self.input = encoder_input
        self.image_size = encoder_input.size
        self.embed_dim = int(self.vision.config.hidden_size)

    @classmethod
    def load(cls, name: str) -> "BlipEmbedder":
        """Load a BLIP model for retrieval from a folder or the Hub, never with random weights.

        The public one with the ViT-B of the paper is Salesforce/blip-itm-base-coco.

        ValueError: transformers is not installed; no such model, or one without BLIP's image
        encoder or with weights missing, or that are not finite.
        """
        try:
            import transformers
        except ImportError as error:
            raise ValueError(
                "BLIP needs transformers, which is not installed: pip install -e '.[blip]'"
            ) from error
        try:
            # Weights that are not in the file are drawn at random, with a warning alone.
            reader: Any = transformers.BlipForImageTextRetrieval
            blip, report = reader.from_pretrained(name, output_loading_info=True)
            processor = transformers.BlipImageProcessor.from_pretrained(name)
        except Exception as error:  # a foreign folder or a failed download raises nearly anything
            reason = " ".join(str(error).split())[:300]
            raise ValueError(
                f"could not load BLIP {name!r}: {reason}; give a folder or a repository of the Hub "
                "with a model for retrieval, such as Salesforce/blip-itm-base-coco"
            ) from error
        keys = [*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])]
        if missing := sorted(key for key in keys if key.startswith("vision_model.")):
            raise ValueError(
                f"BLIP {name!r}: expected the weights of its image encoder, found {len(missing)} "
                f"missing or of another shape, {missing[0]} the first: get the files again"
            )
        vision = blip.vision_model
        if not all(tensor.isfinite().all() for tensor in vision.parameters()):
            raise ValueError(f"the weights of BLIP {name!r} hold NaN or infinity: get them again")
        size = int(vision.config.image_size)
        if dict(processor.size) != {"height": size, "width": size} or processor.resample != 3:
            raise ValueError(
                f"BLIP {name!r}: expected a preprocessing that resizes to {size} x {size} px, "
                f"bicubic, found {dict(processor.size)} and resampling {processor.resample}"
            )
        mean, std = tuple(processor.image_mean), tuple(processor.image_std)
        return cls(vision, processor, EncoderInput(size, mean, std, "bicubic"))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the preprocessing and every weight."""
        return digest_of_weights(repr(self.input), self.vision.state_dict())

    def class_token(
        self, inputs: Float[Tensor, "batch 3 size size"]
    ) -> Float[Tensor, "batch embed"]:
        """Return the class token of preprocessed images, normalised once."""
        # The pooled output would be normalised once more than in BLIP's own code.
        token: Tensor = self.vision(pixel_values=inputs).last_hidden_state[:, 0]
        return token

    def embed_images(
        self, images: Float[Tensor, "batch 3 height width"], preprocess: Preprocess = "consistent"
    ) -> Float[Tensor, "batch embed"]:
        """Embed square images in [-1, 1] of any size, differentiably; raw embeddings.
        ValueError: the images are not square, or `preprocess` is unknown."""
        return self.class_token(preprocess_images(images.float(), preprocess, self.input))

    @torch.no_grad()
    def embed_pictures(self, pictures: Sequence[Image.Image]) -> Float[Tensor, "batch embed"]:
        """Embed RGB pictures through transformers' own preprocessing; raw embeddings."""
        device = next(self.vision.parameters()).device
        inputs = self.processor(list(pictures), return_tensors="pt")["pixel_values"]
        return self.class_token(inputs.to(device))
