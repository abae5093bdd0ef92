"""Paths on the command line: what they name, and what was meant where they name nothing.

Knows files by their names; importing it does not import torch.
"""

import re
from collections.abc import Iterable
from pathlib import Path

from targetclip.command import nearest

# Containers that targetclip.media.frames reads.
VIDEO_SUFFIXES = (
    *(".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".ts", ".mts", ".m2ts"),
    *(".mpg", ".mpeg", ".flv", ".wmv", ".ogv", ".3gp"),
)
PICTURE_SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".gif", ".bmp", ".tif", ".tiff"),
    *(".avif", ".heic", ".heif"),
)
WEIGHT_SUFFIXES = (".safetensors", ".pt", ".pth", ".pkl", ".npy")
URL = re.compile(r"(https?|ftps?|file|s3|gs|hf|data):", re.IGNORECASE)
NAMED = 5  # files that are left out, at most, in a warning


def is_video(path: Path) -> bool:
    """Tell whether a path is that of a video, by its suffix."""
    return path.suffix.lower() in VIDEO_SUFFIXES and not path.is_dir()


def refuse_url(flag: str, text: str) -> None:
    """Raise a ValueError for a URL."""
    if URL.match(text):
        raise ValueError(f"{flag}: expected a file, found the URL {text!r}: download it first")


def missing(flag: str, path: Path, kind: str) -> FileNotFoundError:
    """Return the error for a file that is not there, with what was probably meant."""
    hint = "check the path"
    if flag == "--target" and not path.suffix and len(path.parts) == 1:
        hint = f"a text is given by --text {str(path)!r}"
    elif path.parent.is_dir():
        near = nearest(path.name, sorted(one.name for one in path.parent.iterdir()))
        hint = f"did you mean {str(path.with_name(near))!r}?" if near is not None else hint
    return FileNotFoundError(f"{flag}: no {kind} at {str(path)!r}; {hint}")


def check_picture(flag: str, path: Path) -> None:
    """Check a path that must be that of a picture or of a folder.
    FileNotFoundError: nothing is there. ValueError: a URL, a video, or a file of weights or of a
    direction."""
    refuse_url(flag, str(path))
    if not path.exists():
        raise missing(flag, path, "picture")
    if is_video(path):
        hint = "a clip is a source: --sources" if flag == "--target" else "give it alone"
        raise ValueError(f"{flag}: expected pictures, found the video {str(path)!r}: {hint}")
    if path.suffix.lower() in WEIGHT_SUFFIXES:
        raise ValueError(
            f"{flag}: expected a picture, found {str(path)!r}: a direction is given by "
            "--direction, a mapper by --mapper"
        )


def check_weights(flag: str, path: Path | None, kind: str) -> None:
    """Check a path that must be that of a file of weights.
    FileNotFoundError: nothing is there. ValueError: a URL, a folder, or a picture."""
    if path is None:
        return
    refuse_url(flag, str(path))
    if path.suffix.lower() in (*PICTURE_SUFFIXES, *VIDEO_SUFFIXES):
        raise ValueError(
            f"{flag}: expected a {kind} file, found the picture {str(path)!r}: "
            "a target is given by --target"
        )
    if path.is_dir():
        raise ValueError(f"{flag}: expected a {kind} file, found the folder {str(path)!r}")
    if not path.exists():
        raise missing(flag, path, f"{kind} file")


def check_text(text: str) -> None:
    """Raise a ValueError for a text that names a file, or looks like a path or a URL."""
    path = Path(text)
    known = path.suffix.lower() in (*PICTURE_SUFFIXES, *VIDEO_SUFFIXES, *WEIGHT_SUFFIXES)
    try:
        is_file = path.is_file()
    except (OSError, ValueError):  # longer than any path, or with a null character
        is_file = False
    if URL.match(text) or known or (is_file and (path.suffix or len(path.parts) > 1)):
        raise ValueError(
            f"--text: expected words, found {text!r}, the name of a file: a picture is given by "
            "--target"
        )


def pictures_of(flag: str, paths: Iterable[Path], notes: list[str]) -> tuple[Path, ...]:
    """Return the paths of pictures; a folder gives its pictures in natural order.

    Args:
        notes: the names of files in folders that are no pictures are added here.

    Raises:
        FileNotFoundError, ValueError: as `check_picture`; a folder without pictures.
    """
    result: list[Path] = []
    for path in paths:
        check_picture(flag, path)
        if not path.is_dir():
            result.append(path)
            continue
        from targetclip.media.frames import natural_order  # which import torch
        from targetclip.media.images import is_picture

        entries = [one for one in path.iterdir() if not one.name.startswith(".")]
        pictures = sorted((one for one in entries if is_picture(one)), key=natural_order)
        others = sorted(one.name for one in entries if one not in pictures)
        if not pictures:
            raise ValueError(f"{flag}: expected pictures in the folder {str(path)!r}, found none")
        if others:
            named = ", ".join(others[:NAMED]) + (", ..." if len(others) > NAMED else "")
            notes.append(f"{path}: {len(pictures)} pictures taken, {len(others)} left out: {named}")
        result += pictures
    return tuple(result)
