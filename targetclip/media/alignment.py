"""Where a face lies in a photo: cutting it out as FFHQ's faces were, and putting it back.

Knows pixels and corners, not how landmarks are found. A quad is the corners of the aligned square
in the photo: upper left, lower left, lower right, upper right as the face has them, x and y in
pixels, (0, 0) being the middle of the photo's first pixel, as landmarks are counted.
"""

import math

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from PIL import Image, ImageFilter

LEFT_EYE, RIGHT_EYE = slice(36, 42), slice(42, 48)  # as the picture shows them
MOUTH_CORNERS = [48, 54]
# Of Karras et al. 2019 (FFHQ); a generator trained on its faces knows no other frame.
EYES_IN_SQUARE, MOUTH_IN_SQUARE, CENTRE_BELOW_EYES = 2.0, 1.8, 0.1
BORDER, FADE, BLUR = 0.1, 0.3, 0.02  # parts of the quad's side
SUPERSAMPLING = 4
HALF_PIXEL = 0.5  # Pillow counts from the corner of a pixel


def quarter_turn(vector: Float[ndarray, " 2"]) -> Float[ndarray, " 2"]:
    """The vector turned from the right to below."""
    return np.array([-vector[1], vector[0]])


def quad_of(landmarks: Float[ndarray, "68 2"]) -> Float[ndarray, "4 2"]:
    """The quad of a face of which 68 landmarks are known, in pixels; it may leave the photo.

    Raises:
        ValueError: landmarks of no face: eyes and mouth in one place, or on one line.
    """
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
    """Length of the quad's longest side, in pixels."""
    return float(np.hypot(*(np.roll(quad, -1, axis=0) - quad).T).max())


def check_picture(picture: Image.Image) -> None:
    """Raise a ValueError for a picture that is not RGB."""
    if picture.mode != "RGB":
        raise ValueError(f"expected an RGB picture, found mode {picture.mode!r}; use read_picture")


def is_turning_left(quad: Float[ndarray, "4 2"]) -> bool:
    """Whether each edge turns to the left of the one before, so that the quad is convex."""
    edges = np.diff(quad, axis=0, append=quad[:1])
    (x, y), (u, v) = edges.T, np.roll(edges, -1, axis=0).T
    return bool((x * v - y * u < 0).all())


def check_quad(quad: Float[ndarray, "4 2"], picture: Image.Image) -> None:
    """Raise a ValueError for corners in another order, or of a face beyond the picture."""
    if not np.isfinite(quad).all() or not is_turning_left(quad):
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


def perspective(corners: Float[ndarray, "4 2"], others: Float[ndarray, "4 2"]) -> tuple[float, ...]:
    """Pillow's eight numbers of the perspective map that takes `corners` to `others`."""
    rows = []
    for (x, y), (u, v) in zip(corners, others, strict=True):
        rows.append([x, y, 1, 0, 0, 0, -u * x, -u * y])
        rows.append([0, 0, 0, x, y, 1, -v * x, -v * y])
    return tuple(np.linalg.solve(np.array(rows), others.flatten()).tolist())


def square(side: int) -> Float[ndarray, "4 2"]:
    """Corners of a whole picture, in the order of a quad's, counted from a pixel's corner."""
    return np.array([[0.0, 0.0], [0.0, side], [side, side], [side, 0.0]])


def outside(before: int, inside: int, after: int) -> Float[ndarray, " pixels"]:
    """How far each pixel of a padded row lies outside of the picture, in pixels; 0 inside."""
    place = np.arange(before + inside + after) - before
    return np.maximum(np.maximum(-place, place - inside + 1), 0).astype(np.float64)


def padded(
    picture: Image.Image, before: tuple[int, int], after: tuple[int, int], side: float
) -> Image.Image:
    """The picture mirrored at its edges, ever more blurred outwards, and fading to its median.

    Its own pixels stay as they are, so that they can be put back.

    Args:
        before, after: pixels to add on the left and above, on the right and below.
        side: of the quad, in pixels: blur and fading go by it.
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
    """The face in `quad` as an upright square of `size` px, as FFHQ's were made.

    Where the quad leaves the picture, the picture is mirrored, blurred and faded.

    Raises:
        ValueError: not RGB, a size below 1, corners in another order, a face beyond the picture.
    """
    check_picture(picture)
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
        picture = picture.resize((width, height), Image.Resampling.LANCZOS)
        side /= shrink

    before = np.ceil(np.maximum(-corners.min(axis=0), 0)).astype(int)
    after = np.ceil(np.maximum(corners.max(axis=0) - picture.size, 0)).astype(int)
    if before.any() or after.any():
        picture = padded(picture, tuple(before.tolist()), tuple(after.tolist()), side)
        corners = corners + before

    large = size * SUPERSAMPLING
    numbers = perspective(square(large), corners)
    method, bilinear = Image.Transform.PERSPECTIVE, Image.Resampling.BILINEAR
    drawn = picture.transform((large, large), method, numbers, bilinear)
    return drawn.resize((size, size), Image.Resampling.LANCZOS)


def soft_mask(side: int, softness: float) -> Image.Image:
    """A rounded square, white, black along the edges, smooth over `softness` of the way out."""
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
    """The photo with an edited face put back to where `align` cut it out, of any square size.

    The edges of the face fade into the photo. Every pixel outside of the quad keeps its value.

    Args:
        mask_softness: part of the way from the middle to the edges that fades, in [0, 1].

    Raises:
        ValueError: not RGB, no square, corners in another order, a face beyond the photo, a
            softness out of range.
    """
    check_picture(photo)
    check_picture(aligned_edited)
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

    # A face larger than its place is made smaller first: the map alone would skip pixels of it.
    side = min(aligned_edited.width, math.ceil(side_of(quad)))
    face = aligned_edited.resize((side, side), Image.Resampling.LANCZOS)
    numbers = perspective(corners - low, square(side))
    method, bilinear = Image.Transform.PERSPECTIVE, Image.Resampling.BILINEAR
    placed = face.transform((width, height), method, numbers, Image.Resampling.BICUBIC)
    mask = soft_mask(side, mask_softness).transform((width, height), method, numbers, bilinear)
    pasted = photo.copy()
    pasted.paste(placed, tuple(low.tolist()), mask)
    return pasted
