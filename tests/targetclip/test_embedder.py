"""Both ways of showing images to CLIP, and that loading never gives another model than asked."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from targetclip.embedder import (
    ClipEmbedder,
    EncoderInput,
    ImageEmbedder,
    preprocess_images,
    resolve_weights,
)
from targetclip.media.images import picture_to_tensor, tensor_to_pictures

FIXTURE = Path(__file__).parents[1] / "fixtures" / "clip_input.npz"
PLAIN_224 = EncoderInput(224, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), "bicubic")


@pytest.fixture(scope="module")
def embedder(clip_dir: Path) -> ClipEmbedder:
    return ClipEmbedder.load(clip_dir)


def smooth_images(count: int, size: int, seed: int = 0) -> Tensor:
    """Soft coloured shapes with values a PNG can hold, like a picture without fine texture."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 4, 4, generator=generator) * 1.4 - 0.7
    images = F.interpolate(coarse, (size, size), mode="bicubic", align_corners=True)
    return (images * 127.5 + 127.5).round() / 127.5 - 1


def enlarged_and_pooled(images: Tensor, out_size: int) -> Tensor:
    """The two steps of the release, through the large image in between."""
    large = F.interpolate(images, scale_factor=out_size // 32, mode="nearest")
    return F.avg_pool2d(large, images.shape[-1] // 32)


def without_test_types(function: Callable[..., Any]) -> Callable[..., Any]:
    return getattr(function, "__wrapped__", function)


# --- preprocessing ---


def test_release_equals_the_released_code() -> None:
    stored = {name: torch.from_numpy(array) for name, array in np.load(FIXTURE).items()}
    for size in (32, 64):
        inputs = preprocess_images(stored[f"in{size}"], "release", PLAIN_224)
        assert (inputs - stored[f"out{size}"]).abs().max() < 1e-5
    # Of the 256 px image an 64 px corner is stored, which makes 56 px of the 224 px output.
    corner = EncoderInput(56, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), "bicubic")
    inputs = preprocess_images(stored["in256_corner"], "release", corner)
    assert (inputs - stored["out256_corner"]).abs().max() < 1e-5


@pytest.mark.parametrize(("size", "out_size"), [(32, 64), (96, 64), (128, 224), (320, 96)])
def test_release_equals_its_two_steps_at_every_multiple_of_32(size: int, out_size: int) -> None:
    images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    encoder_input = EncoderInput(out_size, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), "bicubic")
    expected = enlarged_and_pooled(images, out_size)
    inputs = preprocess_images(images, "release", encoder_input)
    torch.testing.assert_close(inputs, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [1, 16, 50, 300])
def test_release_keeps_the_mean_of_an_image_of_any_other_size(size: int) -> None:
    images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    inputs = preprocess_images(images, "release", PLAIN_224)
    assert inputs.shape == (2, 3, 224, 224)
    torch.testing.assert_close(inputs.mean(dim=(2, 3)), images.mean(dim=(2, 3)), atol=1e-5, rtol=0)


def test_release_of_16_px_repeats_every_pixel() -> None:
    images = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    inputs = preprocess_images(images, "release", PLAIN_224)
    torch.testing.assert_close(inputs, F.interpolate(images, scale_factor=14, mode="nearest"))


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [32, 64, 100, 224, 500])
def test_consistent_pixels_are_those_of_open_clip(size: int, interpolation: str) -> None:
    from open_clip.transform import PreprocessCfg, image_transform_v2

    mean, std = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
    images = smooth_images(3, size)
    encoder_input = EncoderInput(
        64, mean, std, "bilinear" if interpolation == "bilinear" else "bicubic"
    )
    inputs = preprocess_images(images, "consistent", encoder_input)
    numbers = PreprocessCfg(size=64, mean=mean, std=std, interpolation=interpolation)
    transform = image_transform_v2(numbers, is_train=False)
    expected = torch.stack([transform(picture) for picture in tensor_to_pictures(images)])
    # Pillow rounds to 8 bits after each axis; a level is 1/255/std.
    assert (inputs - expected).abs().max() < 1.5 / 255 / min(std)


@pytest.mark.parametrize("preprocess", ["release", "consistent"])
def test_preprocessing_of_a_batch_is_that_of_each_image(preprocess: Any) -> None:
    images = smooth_images(3, 48)
    together = preprocess_images(images, preprocess, PLAIN_224)
    alone = torch.cat([preprocess_images(image[None], preprocess, PLAIN_224) for image in images])
    torch.testing.assert_close(together, alone)


@pytest.mark.parametrize("preprocess", ["release", "consistent"])
def test_preprocessing_has_the_right_gradient(preprocess: Any) -> None:
    images = torch.rand(1, 3, 9, 9, dtype=torch.float64, requires_grad=True)
    encoder_input = EncoderInput(6, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), "bicubic")
    assert torch.autograd.gradcheck(
        lambda x: preprocess_images(x, preprocess, encoder_input), images
    )


def test_a_first_use_under_inference_mode_does_not_spoil_later_gradients() -> None:
    encoder_input = EncoderInput(41, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bicubic")
    with torch.inference_mode():
        preprocess_images(torch.zeros(1, 3, 23, 23), "consistent", encoder_input)
    images = torch.zeros(1, 3, 23, 23, requires_grad=True)
    preprocess_images(images, "consistent", encoder_input).sum().backward()
    assert images.grad is not None and images.grad.abs().sum() > 0


def test_images_that_are_not_square_are_refused() -> None:
    with pytest.raises(ValueError, match="expected square images, found 32 x 48"):
        preprocess_images(torch.zeros(1, 3, 32, 48), "release", PLAIN_224)


def test_an_unknown_preprocess_is_refused() -> None:
    with pytest.raises(ValueError, match="'release' or 'consistent', found 'clip'"):
        without_test_types(preprocess_images)(torch.zeros(1, 3, 32, 32), "clip", PLAIN_224)


# --- embedding ---


@pytest.mark.parametrize("size", [32, 64, 100, 256])
def test_a_generated_image_has_the_embedding_of_the_same_picture_on_disk(
    embedder: ClipEmbedder, size: int
) -> None:
    images = smooth_images(4, size)
    pictures = tensor_to_pictures(images)
    torch.testing.assert_close(torch.cat([picture_to_tensor(p, size) for p in pictures]), images)
    by_picture = F.normalize(embedder.embed_pictures(pictures), dim=-1)
    by_image = F.normalize(embedder.embed_images(images, "consistent"), dim=-1)
    distances = 1 - by_picture @ by_image.T
    assert distances.diagonal().max() < 1e-3
    others = distances[~torch.eye(4, dtype=torch.bool)]
    assert others.min() > 0.05  # so that the first number says something


def test_the_clip_embedder_is_an_image_embedder(embedder: ClipEmbedder) -> None:
    assert isinstance(embedder, ImageEmbedder)


def test_release_shows_clip_something_else(embedder: ClipEmbedder) -> None:
    images = smooth_images(4, 64)
    consistent, release = (embedder.embed_images(images, p) for p in ("consistent", "release"))
    assert (1 - F.cosine_similarity(consistent, release)).min() > 1e-3
    # At the encoder's own size nothing is resized: the encoder sees the image itself.
    torch.testing.assert_close(release, embedder.clip.encode_image(images))


@pytest.mark.parametrize("preprocess", ["release", "consistent"])
def test_embeddings_carry_a_gradient_to_images_and_none_to_weights(
    embedder: ClipEmbedder, preprocess: Any
) -> None:
    images = smooth_images(2, 32).requires_grad_()
    embeddings = embedder.embed_images(images, preprocess)
    embeddings.square().sum().backward()
    assert embeddings.shape == (2, embedder.embed_dim)
    assert images.grad is not None and images.grad.isfinite().all()
    assert (images.grad.flatten(1).norm(dim=1) > 0).all()
    assert not any(p.requires_grad or p.grad is not None for p in embedder.parameters())


def test_putting_tokens_first_changes_no_embedding(clip_dir: Path) -> None:
    import open_clip

    plain = open_clip.create_model(f"local-dir:{clip_dir}").eval()
    embedder = ClipEmbedder.load(clip_dir)
    turned = [module.batch_first for module in embedder.modules() if hasattr(module, "batch_first")]
    assert turned and not any(turned)
    images = smooth_images(3, 64)
    tokens = open_clip.get_tokenizer(f"local-dir:{clip_dir}")(["a face", "a long red scarf"])
    with torch.no_grad():
        same = torch.testing.assert_close
        same(embedder.clip.encode_image(images), plain.encode_image(images))
        same(embedder.clip.encode_text(tokens), plain.encode_text(tokens))


def test_embeddings_are_raw(embedder: ClipEmbedder) -> None:
    images = smooth_images(2, 64)
    for embeddings in (
        embedder.embed_images(images),
        embedder.embed_pictures(tensor_to_pictures(images)),
        embedder.embed_texts(["a red hat", "a beard"]),
    ):
        assert embeddings.shape == (2, 32) and embeddings.dtype == torch.float32
        assert (embeddings.norm(dim=-1) - 1).abs().min() > 0.01


def test_texts_are_told_apart(embedder: ClipEmbedder, caplog: pytest.LogCaptureFixture) -> None:
    hat, beard = embedder.embed_texts(["a red hat", "a beard"])
    assert F.cosine_similarity(hat, beard, dim=0) < 0.999
    assert not caplog.records


@pytest.mark.parametrize(
    ("text", "lost"),
    [
        ("hat " * 14, None),  # exactly the 16 tokens of the context, two of which mark the ends
        ("hat " * 14 + "and beard", "and beard"),
        ("hat " * 13 + "xqzjwv, blue", "xqzjwv, blue"),  # the first of them in part
        ("1234567890" * 3, "5678901234567890"),  # without spaces; each digit is a token
    ],
)
def test_a_text_is_cut_at_the_context_length_and_what_is_lost_is_named(
    text: str, lost: str | None, embedder: ClipEmbedder, caplog: pytest.LogCaptureFixture
) -> None:
    [cut] = embedder.embed_texts([text])
    if lost is None:
        assert not caplog.records
        return
    message = caplog.messages[0]
    assert "16 tokens" in message and f": {lost!r} is left out" in message
    kept = text.removesuffix(lost)
    assert kept != text
    [again] = embedder.embed_texts([text + " and much more"])
    assert torch.equal(again, cut)  # nothing that follows has a part in it


@pytest.mark.parametrize(
    ("text", "unknown"),
    [
        ("красная шапка", "красная шапка"),
        ("a man, шапка", "шапка"),
        ("红帽子", "红帽子"),
        ("빨간 모자", "빨간 모자"),
        ("قبعة حمراء", "قبعة حمراء"),
        ("une fille très âgée", None),
        ("niño con sombrero", None),
        ("naïve café!!! 42", None),
    ],
)
def test_words_in_a_script_that_the_tokenizer_hardly_knows_are_named(
    text: str, unknown: str | None, embedder: ClipEmbedder, caplog: pytest.LogCaptureFixture
) -> None:
    embedder.embed_texts([text])
    scripts = [message for message in caplog.messages if "hardly knows" in message]
    assert len(scripts) == (unknown is not None)
    if unknown is not None:
        assert repr(unknown) in scripts[0]


def test_a_text_is_warned_of_once(embedder: ClipEmbedder, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(3):
        embedder.embed_texts(["a green hat " * 20])
    assert len(caplog.records) == 1


def test_nothing_to_embed_and_pictures_with_alpha_are_refused(embedder: ClipEmbedder) -> None:
    with pytest.raises(ValueError, match="found 0"):
        embedder.embed_pictures([])
    with pytest.raises(ValueError, match="found none"):
        embedder.embed_texts([])
    with pytest.raises(ValueError, match=r"'RGBA'.*read_picture"):
        embedder.embed_pictures([Image.new("RGBA", (8, 8))])


def test_the_model_is_frozen_in_float32_and_eval(clip_dir: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = copy_of(clip_dir, tmp_path)
    weights = folder / "open_clip_model.safetensors"
    save_file({name: t.half() for name, t in load_file(weights).items()}, weights)
    embedder = ClipEmbedder.load(folder)
    assert not any(module.training for module in embedder.modules())
    assert {p.dtype for p in embedder.parameters()} == {torch.float32}
    assert (embedder.embed_dim, embedder.image_size) == (32, 64)


# --- fingerprint ---


def copy_of(clip_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(clip_dir, tmp_path / "copy"))


def rewrite_config(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "open_clip_config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def test_the_fingerprint_belongs_to_the_content_not_to_the_folder(
    embedder: ClipEmbedder, clip_dir: Path, tmp_path: Path
) -> None:
    again = ClipEmbedder.load(f"local-dir:{copy_of(clip_dir, tmp_path)}")
    assert again.fingerprint == embedder.fingerprint and len(again.fingerprint) == 64


@pytest.mark.parametrize("what", ["weight", "mean", "activation"])
def test_the_fingerprint_notices_every_change_that_changes_embeddings(
    embedder: ClipEmbedder, clip_dir: Path, tmp_path: Path, what: str
) -> None:
    from safetensors.torch import load_file, save_file

    folder = copy_of(clip_dir, tmp_path)
    if what == "weight":
        weights = load_file(folder / "open_clip_model.safetensors")
        weights["visual.proj"][3, 5] += 1e-3
        save_file(weights, folder / "open_clip_model.safetensors")
    elif what == "mean":
        rewrite_config(folder, lambda c: c["preprocess_cfg"].update(mean=[0.5, 0.5, 0.5]))
    else:
        rewrite_config(folder, lambda c: c["model_cfg"].update(quick_gelu=True))
    changed = ClipEmbedder.load(folder)
    assert changed.fingerprint != embedder.fingerprint
    images = smooth_images(2, 64)
    assert not torch.equal(changed.embed_images(images), embedder.embed_images(images))


# --- loading ---


def message_of(name: str | Path, pretrained: str | Path | None = None) -> str:
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        ClipEmbedder.load(name, pretrained)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_unknown_names_and_tags_are_answered_with_near_ones() -> None:
    assert "ViT-B-32," in message_of("ViT-B32")
    assert "laion2b_s34b_b79k" in message_of("ViT-B-32", "laion2b_s34b")
    assert "openai" in message_of("ViT-B/32", "opnai")


def test_random_weights_are_never_used(clip_dir: Path, tmp_path: Path) -> None:
    assert "random ones are never used" in message_of("ViT-B-32")
    folder = copy_of(clip_dir, tmp_path)
    (folder / "open_clip_model.safetensors").unlink()
    assert "expected weights" in message_of(folder)


def test_missing_folders_configs_and_files_are_named(clip_dir: Path, tmp_path: Path) -> None:
    assert "no CLIP folder" in message_of(tmp_path / "nowhere")
    assert "no CLIP folder" in message_of(f"local-dir:{tmp_path / 'nowhere'}")
    assert "open_clip_config.json" in message_of(tmp_path)
    assert "check the path" in message_of("ViT-B-32", tmp_path / "none.safetensors")
    assert "check the path" in message_of("ViT-B-32", "none.pt")
    assert "has its own weights" in message_of(clip_dir, "openai")


def test_weights_that_do_not_fit_are_cut_or_hold_nan_are_refused(
    clip_dir: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    folder = copy_of(clip_dir, tmp_path)
    weights = folder / "open_clip_model.safetensors"
    good, whole = load_file(weights), weights.read_bytes()

    save_file({**good, "visual.proj": torch.zeros(3, 3)}, weights)
    assert "size mismatch" in message_of(folder)
    save_file({name: t for name, t in good.items() if name != "visual.proj"}, weights)
    assert "visual.proj" in message_of(folder)
    weights.write_bytes(whole[: len(whole) // 2])
    assert "could not load" in message_of(folder)
    save_file({**good, "visual.proj": torch.full_like(good["visual.proj"], torch.nan)}, weights)
    assert "NaN" in message_of(folder)


def test_a_torchscript_file_is_refused_without_running_it(tmp_path: Path) -> None:
    import zipfile

    path = tmp_path / "ViT-B-32.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("ViT-B-32/constants.pkl", b"")
        archive.writestr("ViT-B-32/code/model.py", b"raise SystemExit")
    assert "TorchScript" in message_of("ViT-B-32", path)


def test_weights_named_after_openai_need_a_name_with_quickgelu(tmp_path: Path) -> None:
    in_cache = tmp_path / "models--timm--vit_base_patch32_clip_224.openai" / "model.safetensors"
    in_cache.parent.mkdir()
    for path in (in_cache, tmp_path / "openai_b32.safetensors"):
        path.write_bytes(b"any")
        assert "-quickgelu" in message_of("ViT-B-32", path)
        assert resolve_weights("ViT-B-32-quickgelu", path) == (str(path), False)


def test_every_tag_trained_with_quickgelu_gets_it() -> None:
    import open_clip

    assert resolve_weights("ViT-B-32", "openai") == ("openai", True)
    assert resolve_weights("ViT-B-32-quickgelu", "openai") == ("openai", False)
    assert resolve_weights("ViT-B-32", "laion2b_s34b_b79k") == ("laion2b_s34b_b79k", False)
    for name, tag in open_clip.list_pretrained():
        if open_clip.pretrained.get_pretrained_cfg(name, tag).get("quick_gelu"):
            in_name = open_clip.get_model_config(name).get("quick_gelu", False)
            assert in_name or resolve_weights(name, tag)[1], (name, tag)


@pytest.fixture
def tiny_model(clip_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Path]:
    """The tiny model as if open_clip knew it by name, with an `openai` and a `laion` tag."""
    from open_clip import factory, pretrained

    weights = clip_dir / "open_clip_model.safetensors"
    config = json.loads((clip_dir / "open_clip_config.json").read_text())["model_cfg"]
    numbers = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4), "hf_hub": "nobody/nothing"}
    tags = {"openai": {**numbers, "quick_gelu": True}, "laion": numbers}
    monkeypatch.setitem(factory._MODEL_CONFIGS, "tiny", config)
    monkeypatch.setitem(factory._MODEL_CONFIGS, "tiny-quickgelu", {**config, "quick_gelu": True})
    monkeypatch.setitem(pretrained._PRETRAINED, "tiny", tags)
    monkeypatch.setattr(factory, "download_pretrained", lambda *_, **__: str(weights))
    return "tiny", weights


def activations(embedder: ClipEmbedder) -> set[str]:
    names = {type(module).__name__ for module in embedder.modules()}
    return names & {"GELU", "QuickGELU"}


def test_a_loaded_openai_tag_really_runs_quickgelu(tiny_model: tuple[str, Path]) -> None:
    name, weights = tiny_model
    openai, laion = ClipEmbedder.load(name, "openai"), ClipEmbedder.load(name, "laion")
    assert activations(openai) == {"QuickGELU"} and activations(laion) == {"GELU"}
    assert openai.fingerprint != laion.fingerprint
    assert openai.input.mean == (0.4, 0.5, 0.6)

    by_name = ClipEmbedder.load("tiny-quickgelu", weights)
    images = smooth_images(2, 64)
    embeddings, expected = (e.embed_images(images, "release") for e in (openai, by_name))
    torch.testing.assert_close(embeddings, expected)
    assert not torch.allclose(embeddings, laion.embed_images(images, "release"), atol=1e-4)


def test_a_weights_file_gives_the_same_model_as_its_folder(
    tiny_model: tuple[str, Path], embedder: ClipEmbedder
) -> None:
    assert ClipEmbedder.load(*tiny_model).fingerprint == embedder.fingerprint


def test_a_failed_download_is_one_line(
    tiny_model: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from open_clip import factory

    def offline(*_: object, **__: object) -> None:
        raise FileNotFoundError("Failed to download\nLast error: offline")

    monkeypatch.setattr(factory, "download_pretrained", offline)
    assert "connection" in message_of("tiny", "openai")


def test_open_clip_and_extras_are_imported_only_when_they_are_used() -> None:
    import subprocess
    import sys

    code = """
import sys
import targetclip.embedder, targetclip.media.alignment, targetclip.media.frames
sys.exit(bool({"open_clip", "dlib", "av", "transformers"} & sys.modules.keys()))
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
