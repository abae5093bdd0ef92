"""BLIP as a judge, on a tiny model of random weights written as transformers does."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import (
    BlipConfig,
    BlipForImageTextRetrieval,
    BlipImageProcessor,
    BlipTextConfig,
    BlipVisionConfig,
)

from targetclip.embedder import ImageEmbedder
from targetclip.encoders.blip import BlipEmbedder
from targetclip.media.images import picture_to_tensor

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `save_pretrained` leaves it: 48 px, 24 numbers."""
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = BlipVisionConfig(image_size=48, patch_size=16, intermediate_size=32, **sizes)
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "sep_token_id": 2, "pad_token_id": 0}
    text = BlipTextConfig(
        vocab_size=32, encoder_hidden_size=24, intermediate_size=32, **sizes, **tokens
    )
    path = tmp_path_factory.mktemp("blip")
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        config = BlipConfig(vision_config=vision.to_dict(), text_config=text.to_dict())
        blip = BlipForImageTextRetrieval(config)
        for parameter in blip.vision_model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)  # fresh ones, of 1e-10, find all pictures alike
    blip.save_pretrained(path)
    BlipImageProcessor(size={"height": 48, "width": 48}).save_pretrained(path)
    return path


def picture(seed: int, size: int = 96) -> Image.Image:
    """Smooth colours, which every resize agrees on."""
    numbers = torch.Generator().manual_seed(seed)
    small = torch.rand(1, 3, 5, 5, generator=numbers)
    large = F.interpolate(small, (size, size), mode="bicubic").clamp(0, 1)
    rows = (255 * large[0]).round().byte().permute(1, 2, 0).contiguous().numpy()
    return Image.fromarray(rows)


def test_blip_is_an_embedder_that_tells_pictures_apart(folder: Path) -> None:
    blip = BlipEmbedder.load(str(folder))
    assert isinstance(blip, ImageEmbedder)
    assert (blip.embed_dim, blip.image_size) == (24, 48)
    embeddings = blip.embed_pictures([picture(0), picture(1)])
    assert embeddings.shape == (2, 24)
    assert float(F.cosine_similarity(embeddings[:1], embeddings[1:])) < 0.95
    again = BlipEmbedder.load(str(folder))
    assert again.fingerprint == blip.fingerprint
    torch.testing.assert_close(again.embed_pictures([picture(0)]), embeddings[:1])


def test_a_picture_has_the_same_embedding_as_a_file_and_as_an_image(folder: Path) -> None:
    blip, drawn = BlipEmbedder.load(str(folder)), picture(2)
    as_file = blip.embed_pictures([drawn])
    images = picture_to_tensor(drawn, 96).requires_grad_()
    as_image = blip.embed_images(images)
    assert float(F.cosine_similarity(as_file, as_image.detach())) > 0.999
    as_image[:, 0].sum().backward()  # all of a normalised token add up to the same
    assert images.grad is not None and images.grad.abs().sum() > 0


def test_the_class_token_is_that_of_the_released_model(folder: Path) -> None:
    """Normalised once: transformers' pooled output would be normalised twice."""
    blip = BlipEmbedder.load(str(folder))
    whole = BlipForImageTextRetrieval.from_pretrained(folder).eval()
    inputs = blip.processor([picture(3)], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        token = whole.vision_model(pixel_values=inputs).last_hidden_state[:, 0]
    torch.testing.assert_close(blip.embed_pictures([picture(3)]), token)


@pytest.mark.parametrize("damage", ["missing", "not finite", "no config", "nowhere"])
def test_other_and_damaged_models_are_refused(folder: Path, tmp_path: Path, damage: str) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    name, expected = str(tmp_path), ""
    if damage == "missing":
        weights = {key: value for key, value in weights.items() if "vision_model" not in key}
        expected = "expected the weights of its image encoder"
    elif damage == "not finite":
        weights["vision_model.post_layernorm.weight"][0] = float("nan")
        expected = "hold NaN or infinity"
    elif damage == "no config":
        (tmp_path / "config.json").write_text(
            json.dumps({"model_type": "blip", "vision_config": 3})
        )
        expected = "could not load BLIP"
    else:
        name, expected = str(tmp_path / "nowhere"), "could not load BLIP"
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=expected):
        BlipEmbedder.load(name)


def test_the_comparison_takes_blip_by_its_prefix(folder: Path, clip_dir: Path) -> None:
    from eval.judging import load_judge

    assert isinstance(load_judge(f"blip:{folder}", None, CPU), BlipEmbedder)
    assert not isinstance(load_judge(str(clip_dir), None, CPU), BlipEmbedder)
    assert load_judge(None, None, CPU) is None
    with pytest.raises(ValueError, match="--judge-pretrained: blip:somewhere brings its own"):
        load_judge("blip:somewhere", "openai", CPU)
