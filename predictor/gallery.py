"""Gallery: a web page of an edit, whole in one file, to look at and to send.

Knows pictures, words and links to files beside the page; nothing of how either came about. Every
picture is a part of the page. What a user named is shown as text, whatever it holds.
"""

import base64
import io
import mimetypes
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template
from urllib.parse import quote

from PIL import Image

from predictor.inputs import Picture, as_pictures
from targetclip.media.images import tile_of, tile_side

TEMPLATE = Path(__file__).with_suffix(".html")
QUALITY = 88  # of WebP, in per cent
PHOTO = (768, 768)  # pixels of a picture that is shown whole, at most
STRIP = (2048, 8192)  # pixels of a strip, at most
MAX_EMBEDDED = 8_000_000  # bytes of a moving picture that is a part of the page


@dataclass(frozen=True)
class Shown:
    """A source and its result, as a page shows them."""

    name: str
    before: Picture
    after: Picture
    link: str | None = None
    """File of the result, by its path from the page."""
    note: str = ""
    """A line below them."""
    whole: bool = False
    """Whether they are shown whole; otherwise their middle squares are."""


@dataclass(frozen=True)
class Linked:
    """One of several results, which has a page of its own."""

    name: str
    target: Picture | None
    """None: a text, which is the name."""
    results: Sequence[Picture]
    """A few of its edited pictures."""
    link: str | None
    """Its page, by the path from the page of all. None: there is no result."""
    note: str
    """A line below them."""


# Texts, links and pictures


def text_of(text: str) -> str:
    """Return a text as HTML; bytes of a file name that are no letters are shown as escapes."""
    return escape(text.encode("utf-8", "backslashreplace").decode())


def address_of(path: str) -> str:
    """Return the address of a file, by its path from the page."""
    return quote(os.fsencode(path))


def embedded(content: bytes, kind: str) -> str:
    """Return the address of content that is a part of the page."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def paragraph(text: str, style: str) -> str:
    """Return a text as a paragraph; nothing where there is none."""
    return f'<p class="{style}">{text_of(text)}</p>' if text else ""


def links_to(paths: Iterable[str]) -> str:
    """Return links to files, by their paths from the page."""
    return ", ".join(f'<a href="{address_of(path)}">{text_of(path)}</a>' for path in paths)


def image(picture: Image.Image, alt: str) -> str:
    """Return an RGB picture, in its own size."""
    content, (width, height) = io.BytesIO(), picture.size
    picture.save(content, "WEBP", quality=QUALITY)
    source = embedded(content.getvalue(), "image/webp")
    return f'<img src="{source}" alt="{text_of(alt)}" width="{width}" height="{height}">'


def square(picture: Picture, alt: str) -> str:
    """Return the middle square of a picture, in the size that sheets give it."""
    [rgb] = as_pictures(picture)
    return image(tile_of(rgb, tile_side([rgb])), alt)


def whole(picture: Picture, most: tuple[int, int], alt: str) -> str:
    """Return a whole picture, made smaller where it has more than so many pixels."""
    [rgb] = as_pictures(picture)
    small = rgb.copy()
    small.thumbnail(most)
    return image(small, alt)


# Parts of a page


def target_part(name: str, picture: Picture | None) -> str:
    """Return a target: its picture and name, or its words."""
    if picture is None:
        return f'<p class="words">{text_of(name)}</p>'
    shown = square(picture, f"target: {name}")
    return f"<figure>{shown}<figcaption>target: {text_of(name)}</figcaption></figure>"


def shown_part(shown: Shown) -> str:
    """Return a source beside its result."""
    figures = []
    for kind, picture in {"source": shown.before, "result": shown.after}.items():
        alt = f"{shown.name}, {kind}"
        content = whole(picture, PHOTO, alt) if shown.whole else square(picture, alt)
        if kind == "result" and shown.link is not None:
            content = f'<a href="{address_of(shown.link)}">{content}</a>'
        caption = f"<figcaption>{kind}</figcaption>"
        figures.append(f'<figure><div class="view">{content}</div>{caption}</figure>')
    return (
        f'<section class="card"><h3>{text_of(shown.name)}</h3>'
        f'<div class="two">{"".join(figures)}</div>{paragraph(shown.note, "soft")}</section>'
    )


def file_part(title: str, path: Path) -> str:
    """Return a strip, a morph or a clip that is a file beside the page.

    Of a moving picture that is too large for a page there is a still, or the link alone.
    """
    kind = mimetypes.guess_type(path.name)[0] or ""
    small, link = path.stat().st_size <= MAX_EMBEDDED, address_of(path.name)
    if kind == "image/png":
        with Image.open(path) as strip:
            content = f'<a href="{link}">{whole(strip, STRIP, title)}</a>'
        content = f'<div class="wide" tabindex="0">{content}</div>'  # scrolled where it is narrow
    elif kind == "image/gif" and small:
        source = embedded(path.read_bytes(), kind)
        content = f'<a href="{link}"><img src="{source}" alt="{text_of(title)}"></a>'
    elif small:
        source = embedded(path.read_bytes(), kind)
        content = f'<video src="{source}" controls loop muted autoplay playsinline></video>'
    elif kind == "image/gif":
        with Image.open(path) as still:
            content = f'<a href="{link}">{whole(still, PHOTO, title)}{text_of(path.name)}</a>'
    else:
        content = f'<a href="{link}">{text_of(path.name)}</a>'
    return f"<h2>{text_of(title)}</h2>{content}"


def linked_part(linked: Linked) -> str:
    """Return one of several results, which leads to its page."""
    title = text_of(linked.name)
    row = f'<span class="words">{title}</span>' if linked.results else ""
    if linked.target is not None:
        row = square(linked.target, f"target: {linked.name}")
    row += "".join(square(picture, f"{linked.name}, result") for picture in linked.results)
    if linked.link is not None:
        link = address_of(linked.link)
        title, row = f'<a href="{link}">{title}</a>', f'<a class="row" href="{link}">{row}</a>'
    return f'<section class="card"><h3>{title}</h3>{row}{paragraph(linked.note, "soft")}</section>'


def facts_part(facts: Mapping[str, str]) -> str:
    """Return what is said of an edit, by what it is."""
    rows = [f"<dt>{text_of(name)}</dt><dd>{text_of(fact)}</dd>" for name, fact in facts.items()]
    return f"<dl>{''.join(rows)}</dl>" if rows else ""


def end_part(command: str, files: Sequence[str]) -> str:
    """Return the command that made a page, and links to files beside it."""
    made = f"<h2>Made by this command</h2><pre>{text_of(command)}</pre>" if command else ""
    return made + (f"<h2>Files beside this page</h2><p>{links_to(files)}</p>" if files else "")


def page_of(title: str, *parts: str) -> str:
    """Return a page of a title and parts."""
    template = Template(TEMPLATE.read_text(encoding="utf-8"))
    return template.substitute(title=text_of(title), body="\n".join(filter(None, parts)))


# Pages


def gallery(
    targets: Sequence[tuple[str, Picture | None]],
    shown: Iterable[Shown],
    *,
    facts: Mapping[str, str] | None = None,
    warnings: Sequence[str] = (),
    others: Sequence[str] = (),
    shows: Mapping[str, Path] | None = None,
    command: str = "",
    files: Sequence[str] = (),
) -> str:
    """Return the page of one result, as HTML that is whole in one file.

    `gallery([("joker", "joker.png")], [Shown("ada", "ada.png", result)])`

    Args:
        targets: each a name and a picture; None: the name is a text.
        shown: sources and results, taken one at a time.
        facts: what is said of the edit, by what it is.
        warnings: what is doubtful about it.
        others: files of results that the page does not show.
        shows: strips and morphs by their headings, in the folder of the page.
        command: that made them.
        files: other files. All files are named by their paths from the page.

    Raises:
        FileNotFoundError, TypeError, ValueError: as `as_pictures`.
        OSError: a strip or a morph cannot be read.
    """
    pictures = "".join(target_part(name, picture) for name, picture in targets)
    more = f"{len(others)} more results are in files beside this page"
    return page_of(
        "The essence of " + " and ".join(name for name, _ in targets),
        f'<div class="top"><div class="targets">{pictures}</div>{facts_part(facts or {})}</div>',
        *(paragraph(f"Warning: {warning}", "warning") for warning in warnings),
        "<h2>Sources and results</h2>",
        '<p class="soft" hidden>The slider below a result lays its source over it.</p>',
        f'<div class="cards">{"".join(shown_part(one) for one in shown)}</div>',
        f"<details><summary>{more}</summary><p>{links_to(others)}</p></details>" * bool(others),
        *(file_part(title, path) for title, path in (shows or {}).items()),
        end_part(command, files),
    )


def overview(
    results: Sequence[Linked],
    *,
    warnings: Sequence[str] = (),
    command: str = "",
    files: Sequence[str] = (),
) -> str:
    """Return the page of several results, which leads to the page of each.

    Args:
        warnings, command, files: as of `gallery`.

    Raises:
        FileNotFoundError, TypeError, ValueError: as `as_pictures`.
    """
    return page_of(
        f"The essence of {len(results)} targets",
        paragraph("Each row is a target, then some of its results; it leads to a page.", "soft"),
        *(paragraph(f"Warning: {warning}", "warning") for warning in warnings),
        f'<div class="cards">{"".join(linked_part(one) for one in results)}</div>',
        end_part(command, files),
    )
