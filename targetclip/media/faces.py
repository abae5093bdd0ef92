"""Faces in a photo: where they are, and 68 landmarks of each.

Knows dlib, which is an extra (`pip install "targetclip[faces]"`) and imported only when a
`FaceFinder` is made; nothing of what is done with a face.

The landmark file that the extra installs was trained on the 300-W data set, whose terms exclude
commercial use: it may not go into a commercial product. Nothing else of the project needs it.
"""

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from PIL import Image

from targetclip.media.alignment import check_picture

INSTALL = 'pip install "targetclip[faces]"'
MODELS, LANDMARKS = "face_recognition_models", "shape_predictor_68_face_landmarks.dat"
# dlib knows faces of 80 px and more, so a photo is doubled, but to no more pixels than take it
# two seconds or so.
UPSAMPLING = 2
MAX_SIDE = 3000


@dataclass(frozen=True, eq=False)
class Face:
    """A face in a photo, in the photo's pixels."""

    box: tuple[int, int, int, int]
    """Left, top, right and bottom; it may leave the photo."""
    landmarks: Float[ndarray, "68 2"]
    """x and y in the order of 300-W, (0, 0) being the middle of the first pixel."""

    @property
    def size(self) -> int:
        """The longer side of the box."""
        left, top, right, bottom = self.box
        return max(right - left, bottom - top)


def landmark_file() -> Path:
    """Where the landmark file is installed.

    Raises:
        ValueError: it is not.
    """
    # The package itself cannot be imported where setuptools is newer than it: only its files count.
    spec = importlib.util.find_spec(MODELS)
    for folder in spec.submodule_search_locations or () if spec else ():
        path = Path(folder) / "models" / LANDMARKS
        if path.is_file():
            return path
    raise ValueError(f"finding faces needs {LANDMARKS!r}, found none installed: {INSTALL}")


def no_face(picture: Image.Image, origin: str) -> str:
    """What is said of a picture without a face."""
    return (
        f"{origin}: no face found in {picture.width} x {picture.height} px; take a photo with a "
        "larger face that looks into the camera, or give --no-align if it is aligned already"
    )


def no_such_face(faces: list[Face], index: int, origin: str) -> str:
    """What is said of a number that no face has."""
    listed = ", ".join(f"{i} ({face.size} px at {face.box[:2]})" for i, face in enumerate(faces))
    return f"{origin}: expected the number of a face, found {index}; faces are: {listed}"


class FaceFinder:
    """dlib's face detector and its 68 landmarks; on the processor, always.

    Raises:
        ValueError: dlib or the landmark file is missing or broken; says how to install them.
    """

    def __init__(self) -> None:
        try:
            import dlib
        except ImportError as error:
            raise ValueError(f"finding faces needs dlib ({error}): {INSTALL}") from error
        path = landmark_file()
        try:
            self.predictor = dlib.shape_predictor(str(path))
        except RuntimeError as error:
            raise ValueError(f"{str(path)!r} is damaged; install it again: {INSTALL}") from error
        self.detector = dlib.get_frontal_face_detector()
        self.dlib: Any = dlib

    def find(self, picture: Image.Image) -> list[Face]:
        """Faces in an RGB picture, the largest first; none where there is none.

        Faces are looked for in a copy of at most twice the size; landmarks in the picture itself.
        """
        check_picture(picture)
        scale = min(UPSAMPLING, MAX_SIDE / max(picture.size))
        width, height = (max(1, round(scale * pixels)) for pixels in picture.size)
        searched = picture.resize((width, height), Image.Resampling.BICUBIC)
        pixels = np.asarray(picture)
        faces = []
        for found in self.detector(np.asarray(searched)):
            corners = (found.left(), found.top(), found.right(), found.bottom())
            left, top, right, bottom = (round(corner / scale) for corner in corners)
            shape = self.predictor(pixels, self.dlib.rectangle(left, top, right, bottom))
            points = np.array([(point.x, point.y) for point in shape.parts()], np.float64)
            faces.append(Face((left, top, right, bottom), points))
        return sorted(faces, key=lambda face: (-face.size, face.box))

    def face_of(self, picture: Image.Image, index: int = 0, origin: str = "the photo") -> Face:
        """One face of an RGB picture, the largest being 0; errors name the picture as `origin`.

        Raises:
            ValueError: no face is found, or none of that number.
        """
        faces = self.find(picture)
        if not faces:
            raise ValueError(no_face(picture, origin))
        if not 0 <= index < len(faces):
            raise ValueError(no_such_face(faces, index, origin))
        return faces[index]
