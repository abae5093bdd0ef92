"""Faces in photos: finding them, cutting them out as FFHQ's faces were, and putting them back.

Faces are found by dlib, an extra (`pip install "targetclip[faces]"`) that is imported only when a
`FaceFinder` is made. The landmark file that the extra installs was trained on the 300-W data set,
whose terms exclude commercial use: it may not go into a commercial product. Nothing else of the
project needs it.

A quad is the corners of the aligned square in the photo: upper left, lower left, lower right, upper
right of the face, as x and y in pixels. (0, 0) is the middle of the photo's first pixel, as for
landmarks. Knows nothing of generators.
"""

import importlib.util
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from PIL import Image, ImageFilter
from PIL.Image import Resampling, Transform

from targetclip.media.images import check_rgb

INSTALL = 'pip install "targetclip[faces]"'
MODELS, LANDMARKS = "face_recognition_models", "shape_predictor_68_face_landmarks.dat"
# dlib finds faces of 80 px and more, so a photo is doubled, but to no more pixels than take it
# about two seconds.
UPSAMPLING = 2
MAX_SIDE = 3000

LEFT_EYE, RIGHT_EYE = slice(36, 42), slice(42, 48)  # as the picture shows them
MOUTH_CORNERS = [48, 54]
# Of Karras et al. 2019 (FFHQ); a generator trained on its faces knows no other frame.
EYES_IN_SQUARE, MOUTH_IN_SQUARE, CENTRE_BELOW_EYES = 2.0, 1.8, 0.1
BORDER, FADE, BLUR = 0.1, 0.3, 0.02  # parts of the quad's side
SUPERSAMPLING = 4
HALF_PIXEL = 0.5  # Pillow counts from the corner of a pixel


# Finding faces


@dataclass(frozen=True, eq=False)
class Face:
    """A face in a photo, in the photo's pixels."""

    box: tuple[int, int, int, int]
    """Left, top, right and bottom; it may leave the photo."""
    landmarks: Float[ndarray, "68 2"]
    """x and y in the order of 300-W; (0, 0) is the middle of the first pixel."""

    @property
    def size(self) -> int:
        """The longer side of the box."""
        left, top, right, bottom = self.box
        return max(right - left, bottom - top)


def landmark_file() -> Path:
    """Return the path of the installed landmark file; ValueError if there is none."""
    # Newer setuptools break the import of its package, so only the package's files are used.
    spec = importlib.util.find_spec(MODELS)
    for folder in spec.submodule_search_locations or () if spec else ():
        path = Path(folder) / "models" / LANDMARKS
        if path.is_file():
            return path
    raise ValueError(f"finding faces needs {LANDMARKS!r}, found none installed: {INSTALL}")


class FaceFinder:
    """dlib's face detector and its 68 landmarks; always on the processor.

    Args:
        landmarks: dlib's landmark file. None: the installed one.

    Raises:
        ValueError: dlib or the landmark file is missing or broken; says how to install them.
    """

    def __init__(self, landmarks: Path | None = None) -> None:
        try:
            import dlib
        except ImportError as error:
            raise ValueError(f"finding faces needs dlib ({error}): {INSTALL}") from error
        path = landmarks or landmark_file()
        try:
            self.predictor = dlib.shape_predictor(str(path))
        except RuntimeError as error:
            raise ValueError(f"{str(path)!r} is damaged; install it again: {INSTALL}") from error
        self.detector = dlib.get_frontal_face_detector()
        self.dlib: Any = dlib

    def find(self, picture: Image.Image) -> list[Face]:
        """Find the faces in an RGB picture, the largest first.

        Boxes are searched in a copy of at most twice the size, landmarks in the picture itself.
        """
        check_rgb(picture)
        scale = min(UPSAMPLING, MAX_SIDE / max(picture.size))
        width, height = (max(1, round(scale * pixels)) for pixels in picture.size)
        copy = picture.resize((width, height), Resampling.BICUBIC)
        pixels = np.asarray(picture)
        faces = []
        for box in self.detector(np.asarray(copy)):
            corners = (box.left(), box.top(), box.right(), box.bottom())
            left, top, right, bottom = (round(corner / scale) for corner in corners)
            shape = self.predictor(pixels, self.dlib.rectangle(left, top, right, bottom))
            points = np.array([(point.x, point.y) for point in shape.parts()], np.float64)
            faces.append(Face((left, top, right, bottom), points))
        return sorted(faces, key=lambda face: (-face.size, face.box))

    def face_of(self, picture: Image.Image, index: int = 0, origin: str = "the photo") -> Face:
        """Find one face of an RGB picture; 0 is the largest. Errors name the picture as `origin`.
        ValueError: no face is found, or none of that number."""
        faces = self.find(picture)
        if not faces:
            raise ValueError(
                f"{origin}: no face found in {picture.width} x {picture.height} px; take a photo "
                "with a larger face that looks into the camera, or give --no-align if it is "
                "aligned already"
            )
        if not 0 <= index < len(faces):
            listed = (f"{i} ({face.size} px at {face.box[:2]})" for i, face in enumerate(faces))
            shown = ", ".join(listed)
            raise ValueError(
                f"{origin}: expected the number of a face, found {index}; faces are: {shown}"
            )
        return faces[index]


# Quads


def quarter_turn(vector: Float[ndarray, " 2"]) -> Float[ndarray, " 2"]:
    """Turn a vector by 90 degrees, from right to down."""
    return np.array([-vector[1], vector[0]])


def quad_of(landmarks: Float[ndarray, "68 2"]) -> Float[ndarray, "4 2"]:
    """Return the quad of a face with 68 landmarks, in pixels; it may leave the photo.
    ValueError: eyes and mouth lie in one place or on one line."""
    left, right = landmarks[LEFT_EYE].mean(axis=0), landmarks[RIGHT_EYE].mean(axis=0)
    eyes, eye_to_eye = (left + right) / 2, right - left
    eye_to_mouth = landmarks[MOUTH_CORNERS].mean(axis=0) - eyes
    x = eye_to_eye - quarter_turn(eye_to_mouth)
    # Written so that NaN fails too.
    if not np.hypot(*x) > 1e-3:
        raise ValueError(
            "expected landmarks of a face, found eyes and mouth that are not apart; "
            "take another photo"
        )
    eyes_apart, mouth_below = np.hypot(*eye_to_eye), np.hypot(*eye_to_mouth)
    x *= max(EYES_IN_SQUARE * eyes_apart, MOUTH_IN_SQUARE * mouth_below) / np.hypot(*x)
    y = quarter_turn(x)
    centre = eyes + CENTRE_BELOW_EYES * eye_to_mouth
    return np.stack([centre - x - y, centre - x + y, centre + x + y, centre + x - y])


def side_of(quad: Float[ndarray, "4 2"]) -> float:
    """Return the length of the quad's longest side, in pixels."""
    return float(np.hypot(*(np.roll(quad, -1, axis=0) - quad).T).max())


def turns_left(quad: Float[ndarray, "4 2"]) -> bool:
    """Tell whether each edge turns to the left of the one before, so that the quad is convex."""
    edges = np.diff(quad, axis=0, append=quad[:1])
    (x, y), (u, v) = edges.T, np.roll(edges, -1, axis=0).T
    return bool((x * v - y * u < 0).all())


def check_quad(quad: Float[ndarray, "4 2"], picture: Image.Image) -> None:
    """Raise a ValueError for corners in another order, or for a face beyond the picture."""
    if not np.isfinite(quad).all() or not turns_left(quad):
        raise ValueError(
            "expected a quad of upper left, lower left, lower right and upper right corner, "
            f"found {np.round(quad, 1).tolist()}; use quad_of"
        )
    x, y = quad.mean(axis=0) + HALF_PIXEL
    if not (0 <= x <= picture.width and 0 <= y <= picture.height):
        raise ValueError(
            f"expected a face inside the picture of {picture.width} x {picture.height} px, found "
            f"its middle at {x:.0f}, {y:.0f}; take a photo that shows the whole face"
        )


def quad_in(face: Face, picture: Image.Image) -> Float[ndarray, "4 2"]:
    """Return a face's square in a picture; ValueError if its middle is beyond the picture."""
    quad = quad_of(face.landmarks)
    check_quad(quad, picture)
    return quad


def face_quad(
    finder: FaceFinder, picture: Image.Image, index: int, origin: str
) -> Float[ndarray, "4 2"]:
    """Return the square of a face in a photo; errors name the photo as `origin`.
    ValueError: no face, none of that number, or one whose middle is not in the photo."""
    face = finder.face_of(picture, index, origin)
    try:
        return quad_in(face, picture)
    except ValueError as error:
        raise ValueError(f"{origin}: {error}") from error


def perspective(corners: Float[ndarray, "4 2"], others: Float[ndarray, "4 2"]) -> tuple[float, ...]:
    """Return Pillow's eight numbers of the perspective map that takes `corners` to `others`."""
    rows = []
    for (x, y), (u, v) in zip(corners, others, strict=True):
        rows.append([x, y, 1, 0, 0, 0, -u * x, -u * y])
        rows.append([0, 0, 0, x, y, 1, -v * x, -v * y])
    return tuple(np.linalg.solve(np.array(rows), others.flatten()).tolist())


def square(side: int) -> Float[ndarray, "4 2"]:
    """Return the corners of a whole picture, in the order of a quad, from a pixel's corner on."""
    return np.array([[0.0, 0.0], [0.0, side], [side, side], [side, 0.0]])


# Cutting out


def outside(before: int, inside: int, after: int) -> Float[ndarray, " pixels"]:
    """Return how far each pixel of a padded row lies outside of the picture, in px; 0 inside."""
    place = np.arange(before + inside + after) - before
    return np.maximum(np.maximum(-place, place - inside + 1), 0).astype(np.float64)


def padded(
    picture: Image.Image, before: tuple[int, int], after: tuple[int, int], side: float
) -> Image.Image:
    """Pad a picture by its mirror image, ever more blurred outwards, and fading to its median.

    The picture's own pixels stay as they are, so that they can be put back.

    Args:
        before, after: pixels to add on the left and above, on the right and below.
        side: of the quad, in pixels; scales blur and fading.
    """
    (left, above), (right, below) = before, after
    sides = ((above, below), (left, right), (0, 0))
    mirrored = Image.fromarray(np.pad(np.asarray(picture), sides, mode="reflect"))
    distance = np.maximum(
        outside(above, picture.height, below)[:, None], outside(left, picture.width, right)
    )
    faded = distance / max(FADE * side, *before, *after)

    def mask(weight: Float[ndarray, "height width"]) -> Image.Image:
        return Image.fromarray(np.rint(255 * weight.clip(0, 1)).astype(np.uint8))

    blurred = mirrored.filter(ImageFilter.GaussianBlur(BLUR * side))
    median = np.median(np.asarray(picture), axis=(0, 1)).astype(int).tolist()
    blended = Image.composite(blurred, mirrored, mask(3 * faded))
    return Image.composite(Image.new("RGB", blended.size, tuple(median)), blended, mask(faded))


def align(picture: Image.Image, quad: Float[ndarray, "4 2"], size: int) -> Image.Image:
    """Return the face in `quad` as an upright square of `size` px, as FFHQ's were made.

    Where the quad leaves the picture, the picture is mirrored, blurred and faded.

    ValueError: not RGB, a size below 1, corners in another order, a face beyond the picture.
    """
    check_rgb(picture)
    check_quad(quad, picture)
    if size < 1:
        raise ValueError(f"expected a size of 1 px or more, found {size}")
    side = side_of(quad)
    corners = quad + HALF_PIXEL
    border = max(BORDER * side, 3)
    low = np.maximum(np.floor(corners.min(axis=0) - border), 0).astype(int)
    high = np.minimum(np.ceil(corners.max(axis=0) + border), picture.size).astype(int)
    picture = picture.crop((*low.tolist(), *high.tolist()))
    corners = corners - low

    shrink = int(side / size / 2)
    if shrink > 1:
        width, height = (max(1, round(pixels / shrink)) for pixels in picture.size)
        corners = corners * (width / picture.width, height / picture.height)
        picture = picture.resize((width, height), Resampling.LANCZOS)
        side /= shrink

    before = np.ceil(np.maximum(-corners.min(axis=0), 0)).astype(int)
    after = np.ceil(np.maximum(corners.max(axis=0) - picture.size, 0)).astype(int)
    if before.any() or after.any():
        picture = padded(picture, tuple(before.tolist()), tuple(after.tolist()), side)
        corners = corners + before

    large = size * SUPERSAMPLING
    numbers = perspective(square(large), corners)
    enlarged = picture.transform(
        (large, large), Transform.PERSPECTIVE, numbers, Resampling.BILINEAR
    )
    return enlarged.resize((size, size), Resampling.LANCZOS)


# Putting back


def soft_mask(side: int, softness: float) -> Image.Image:
    """Return a rounded white square that fades to black edges over `softness` of the way out."""
    place = (np.arange(side) + 0.5) / side * 2 - 1
    radius = (place[:, None] ** 4 + place**4) ** 0.25
    rise = ((1 - radius) / max(softness, 1e-6)).clip(0, 1)
    return Image.fromarray(np.rint(255 * rise**2 * (3 - 2 * rise)).astype(np.uint8))


def paste_back(
    photo: Image.Image,
    aligned_edited: Image.Image,
    quad: Float[ndarray, "4 2"],
    mask_softness: float = 0.3,
) -> Image.Image:
    """Return the photo with an edited face of any square size where `align` cut it out.

    The edges of the face fade into the photo. Every pixel outside of the quad keeps its value.

    Args:
        mask_softness: part of the way from the middle to the edges that fades, in [0, 1].

    Raises:
        ValueError: not RGB, no square, corners in another order, a face beyond the photo, a
            softness out of range.
    """
    check_rgb(photo)
    check_rgb(aligned_edited)
    check_quad(quad, photo)
    if aligned_edited.width != aligned_edited.height:
        raise ValueError(
            f"expected a square edited face, found {aligned_edited.width} x "
            f"{aligned_edited.height} px; edit what align returns"
        )
    # Written so that NaN fails too.
    if not 0 <= mask_softness <= 1:
        raise ValueError(f"expected a mask softness from 0 to 1, found {mask_softness}")
    corners = quad + HALF_PIXEL
    low = np.maximum(np.floor(corners.min(axis=0)), 0).astype(int)
    high = np.minimum(np.ceil(corners.max(axis=0)), photo.size).astype(int)
    width, height = (high - low).tolist()

    # A face larger than its place is made smaller first: the map alone would skip its pixels.
    side = min(aligned_edited.width, math.ceil(side_of(quad)))
    face = aligned_edited.resize((side, side), Resampling.LANCZOS)
    numbers = perspective(corners - low, square(side))
    method, place = Transform.PERSPECTIVE, (width, height)
    placed = face.transform(place, method, numbers, Resampling.BICUBIC)
    mask = soft_mask(side, mask_softness).transform(place, method, numbers, Resampling.BILINEAR)
    pasted = photo.copy()
    pasted.paste(placed, tuple(low.tolist()), mask)
    return pasted
