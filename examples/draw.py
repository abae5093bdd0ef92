"""Draw the example pictures of this folder: targets worth a try, and sources to edit.

python examples/draw.py
"""

from pathlib import Path

from data.drawn.sketch import NAMES, Extras, Face, Style, draw

HERE = Path(__file__).parent
SCALE = 4  # people look at them, and readers of pictures must cope with any size

PLAIN: dict[str, float] = dict.fromkeys(NAMES, 0.5) | {
    "hat": 0.0,
    "beard": 0.0,
    "glasses": 0.0,
    "moustache": 0.0,
    "lipstick": 0.0,
    "blush": 0.0,
    "face_paint": 0.0,
    "mouth_open": 0.0,
    "fringe": 0.2,
}
TARGETS: dict[str, dict[str, float]] = {
    "joker": {
        "hair_colour": 0.95,
        "face_paint": 1.0,
        "lipstick": 1.0,
        "smile": 1.0,
        "mouth_open": 1.0,
        "hair_length": 0.35,
        "hair_volume": 0.8,
        "background": 0.9,
        "clothes": 0.95,
    },
    "professor": {
        "hair_colour": 0.5,
        "beard": 0.95,
        "moustache": 1.0,
        "glasses": 1.0,
        "lens": 0.0,
        "glasses_shape": 0.0,
        "glasses_colour": 0.1,
        "hair_length": 0.2,
        "skin": 0.15,
    },
    "star": {
        "hair_colour": 0.6,
        "hair_length": 0.9,
        "hair_volume": 0.7,
        "glasses": 1.0,
        "lens": 1.0,
        "glasses_shape": 1.0,
        "glasses_colour": 0.9,
        "lipstick": 1.0,
        "skin": 0.7,
    },
    "magician": {
        "hat": 1.0,
        "hat_shape": 1.0,
        "hat_colour": 0.3,
        "moustache": 1.0,
        "hair_colour": 0.05,
        "smile": 0.9,
        "background": 0.2,
    },
}
SOURCES: dict[str, dict[str, float]] = {
    "ada": {
        "hair_colour": 0.17,
        "hair_length": 0.8,
        "skin": 0.2,
        "turn": 0.2,
        "smile": 0.6,
        "background": 0.0,
        "clothes": 0.1,
        "eye_size": 0.9,
    },
    "bruno": {
        "hair_colour": 0.05,
        "hair_length": 0.05,
        "skin": 0.75,
        "face_width": 0.95,
        "jaw": 0.95,
        "background": 0.45,
        "clothes": 0.6,
        "brow_thickness": 1.0,
        "nose": 0.9,
    },
    "chen": {
        "hair_colour": 0.06,
        "hair_length": 0.45,
        "skin": 0.35,
        "face_length": 0.1,
        "turn": 0.85,
        "background": 0.75,
        "clothes": 0.85,
        "fringe": 0.9,
        "smile": 0.7,
    },
    "dora": {
        "hair_colour": 0.28,
        "hair_length": 0.7,
        "skin": 0.0,
        "face_width": 0.1,
        "face_length": 0.9,
        "background": 1.0,
        "clothes": 0.35,
        "eye_colour": 1.0,
    },
}


def main() -> None:
    """Write every example as PNG."""
    faces = {**TARGETS, **SOURCES}
    pictures = {name: draw(Face(**(PLAIN | changes))) for name, changes in faces.items()}
    # A target that the bundled generator cannot draw: blue skin, cat ears, another style.
    alien = Face(**(PLAIN | {"hair_colour": 0.95, "hair_volume": 0.7, "smile": 0.9}))
    pictures["alien"] = draw(alien, Extras(tint="blue", cat_ears=True), Style(backdrop=3))
    for name, picture in pictures.items():
        large = picture.resize((picture.width * SCALE, picture.height * SCALE))
        large.save(HERE / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main()
