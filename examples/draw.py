"""Draw the example pictures of this folder: targets in many styles, and sources to edit.

    python examples/draw.py

Targets are avatars by illustrators, named in README.md beside them; four of the styles no network
here has seen. Sources are faces in the style of the bundled generator.
"""

from pathlib import Path

from PIL import Image

from data.illustrated.avatars import draw, render
from data.illustrated.codes import ATTRIBUTES, HAIR_COLOURS, STYLE, options_of
from data.illustrated.shown import Wish, can_show, sample

HERE = Path(__file__).parent
SIZE = 256  # px; readers of pictures cope with any size
SEED = 21

# Style, index, what is there, and the colour of hair.
TARGETS: dict[str, tuple[str, int, tuple[Wish, ...], str]] = {
    "joker": ("dylan", 1, (), "green"),
    "star": ("adventurer", 0, ("glasses",), "pink"),
    "professor": ("personas", 1, ("glasses", "beard"), "white"),
    "sailor": ("open-peeps", 1, ("hat",), "black"),
    "rocker": ("micah", 1, ("glasses",), "red"),
    "captain": ("lorelei", 0, ("beard",), "black"),
    "poet": ("notionists", 0, ("glasses", "beard"), ""),
    "gamer": ("pixel-art", 0, ("glasses",), "blue"),
    "king": ("toon-head", 1, ("beard",), "orange"),
}
# Values of attributes; the first of each where none is given.
SOURCES: dict[str, dict[str, str]] = {
    "ada": {
        "top": "straight02", "hairColor": HAIR_COLOURS["brown"], "skinColor": "#edb98a",
        "clothes": "collarAndSweater", "clothesColor": "#5199e4", "backgroundColor": "#ffdfbf",
    },
    "bruno": {
        "top": "shortFlat", "hairColor": HAIR_COLOURS["black"], "skinColor": "#ae5d29",
        "clothes": "hoodie", "clothesColor": "#48b98a", "backgroundColor": "#b6e3f4",
        "facialHair": "beardLight", "mouth": "smile",
    },
    "chen": {
        "top": "bob", "hairColor": HAIR_COLOURS["black"], "skinColor": "#ffdbb4",
        "clothes": "overall", "clothesColor": "#ff5c5c", "backgroundColor": "#cdeed6",
        "eyes": "happy", "mouth": "twinkle",
    },
    "dora": {
        "top": "curly", "hairColor": HAIR_COLOURS["blonde"], "skinColor": "#614335",
        "clothes": "shirtVNeck", "clothesColor": "#8a56c9", "backgroundColor": "#c0aede",
        "eyebrows": "raisedExcited", "mouth": "smile",
    },
}  # fmt: skip


def main() -> None:
    """Write every example as PNG."""
    drawn = {}
    for name, (style, index, there, hair) in TARGETS.items():
        kinds: tuple[Wish, ...] = ("glasses", "beard", "hat")
        wishes = {kind: kind in there for kind in kinds if can_show(style, kind)}
        drawn[name] = style, sample(style, SEED, index, wishes, hair)
    for name, values in SOURCES.items():
        face = [a.values.index(values.get(a.name, a.values[0])) for a in ATTRIBUTES]
        drawn[name] = STYLE, options_of(face)
    for name, (style, options) in drawn.items():
        picture = Image.fromarray(render(draw(style, options)[0], SIZE))
        picture.save(HERE / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main()
