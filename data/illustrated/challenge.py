"""Draw the challenge set: targets of fifteen styles, sources of one, and what targets show.

    python -m data.illustrated.challenge --out data/challenge

64 targets (PNG, 256 px): four of each style that networks are trained on and five of each that is
held out, with glasses, beard and hat on in half of them each and the colours of hair in turn. 16
sources (PNG, 128 px) in the generator's style. targets/truth.json says what each target shows,
LICENCES.md who drew its style, SHA256SUMS holds the checksum of every file. Pictures that are there
are drawn again; other files in --out stay. Needs the extra avatars.
"""

import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from itertools import count
from pathlib import Path
from typing import Any

from targetclip import command
from targetclip.command import start
from targetclip.seeds import CHALLENGE, seed_of


@dataclass(frozen=True, kw_only=True)
class Config:
    out: Path
    """Folder for targets, sources, LICENCES.md and SHA256SUMS."""


if __name__ == "__main__":  # before torch is imported, so that errors come at once
    start("data.illustrated.challenge", Config)

import torch
from PIL import Image
from tqdm import tqdm

from data.illustrated.avatars import HELD_OUT, TRAINED, check_dicebear, credit, draw, render
from data.illustrated.codes import VALUES, draw_face, indices_from_z
from data.illustrated.shown import Wish, can_show, colours, sample, shown

SIZE = 256  # px of a target; sources have the size of the generator's pictures
SOURCES = 16
OF_TRAINED, OF_HELD_OUT = 4, 5  # targets of each style
SUMS = "SHA256SUMS"
# Glasses, beard and hat of the targets of a style: each in half of them, and each pair of them
# together in a quarter. Styles take the two designs in turn.
DESIGNS = (
    ((0, 0, 1), (0, 1, 0), (1, 0, 0), (1, 1, 1), (0, 1, 1)),
    ((1, 1, 0), (1, 0, 1), (0, 1, 1), (0, 0, 0), (1, 0, 0)),
)
KINDS: tuple[Wish, ...] = ("glasses", "beard", "hat")
LICENCES = """# Who drew the pictures

The targets are avatars by outside illustrators, drawn from a seed by
[DiceBear](https://www.dicebear.com) (MIT). Each picture is under the licence of its style, which
is its file's name without the number. CC BY asks you to name the illustrator and the licence where
you show such a picture. The sources are avataaars. All else here is under the project's licence,
MIT.

| style | illustrator | licence | source |
|---|---|---|---|
"""


@dataclass(frozen=True)
class Plan:
    """A target before it is drawn."""

    name: str
    style: str
    index: int
    wishes: dict[Wish, bool]
    hair: str
    """Name of the hair's colour."""


def plans() -> list[Plan]:
    """Return all targets; a hat hides hair, so that those without one get the colours in turn."""
    turns = {hat: count(start) for hat, start in ((False, 0), (True, 6))}
    names, found = list(colours()), []
    for place, style in enumerate(TRAINED + HELD_OUT):
        for i in range(OF_HELD_OUT if style in HELD_OUT else OF_TRAINED):
            design = DESIGNS[place % len(DESIGNS)][i]
            on = {k: bool(v) for k, v in zip(KINDS, design, strict=True) if can_show(style, k)}
            colour = names[next(turns[on.get("hat", False)]) % len(names)]
            found.append(Plan(f"{style}-{i}", style, i, on, colour))
    return found


def target(plan: Plan) -> tuple[Image.Image, dict[str, Any]]:
    """Draw a target; return it with its entry of truth.json."""
    options = sample(plan.style, CHALLENGE, plan.index, plan.wishes, plan.hair)
    svg, drawn = draw(plan.style, options)
    truth = {"style": plan.style, "held_out": plan.style in HELD_OUT}
    picture = Image.fromarray(render(svg, SIZE))
    return picture, truth | vars(shown(plan.style, drawn))


def source_face(index: int) -> list[int]:
    """Return the values of a source's face (see `codes`), which the bundled generator can show."""
    numbers = torch.Generator().manual_seed(seed_of("challenge", CHALLENGE, index))
    face: list[int] = indices_from_z(torch.randn(1, VALUES, generator=numbers))[0].tolist()
    return face


def source(index: int) -> Image.Image:
    """Draw a source."""
    return Image.fromarray(draw_face(source_face(index))[0])


def png(picture: Image.Image) -> bytes:
    """Return a picture as a small PNG: 256 colours of its own, without dithering."""
    content = io.BytesIO()
    few = picture.quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    few.save(content, "PNG", optimize=True)
    return content.getvalue()


def files() -> Iterator[tuple[str, bytes]]:
    """Draw everything; yield relative paths and contents."""
    truth = {}
    for plan in tqdm(plans(), "targets"):
        picture, truth[f"{plan.name}.png"] = target(plan)
        yield f"targets/{plan.name}.png", png(picture)
    rows = [f"{json.dumps(name)}: {json.dumps(row)}" for name, row in truth.items()]
    yield "targets/truth.json", ("{\n" + ",\n".join(rows) + "\n}\n").encode()
    for index in tqdm(range(SOURCES), "sources"):
        yield f"sources/source-{index:02d}.png", png(source(index))
    rows = [" | ".join(astuple(credit(style))) for style in TRAINED + HELD_OUT]
    yield "LICENCES.md", (LICENCES + "".join(f"| {row} |\n" for row in rows)).encode()


def run(config: Config) -> None:
    """Draw everything into --out.
    ValueError: the extra that draws avatars is missing. OSError: --out cannot be written into."""
    check_dicebear("the challenge")
    sums = []
    for folder in (config.out, config.out / "targets", config.out / "sources"):
        command.make_folder(folder)
    for name, content in files():
        command.write_file(config.out / name, content)
        sums.append(f"{hashlib.sha256(content).hexdigest()}  {name}\n")
    command.write_file(config.out / SUMS, "".join(sums))
    command.say_next(config.out, "targets, sources", "read data/challenge/README.md")
