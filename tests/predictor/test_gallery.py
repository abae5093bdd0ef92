"""Pages of edits: whole in one file, safe with any name, and what they show."""

import base64
import io
import os
import re
from html.parser import HTMLParser
from pathlib import Path

from PIL import Image

from predictor.gallery import MAX_EMBEDDED, Linked, Shown, gallery, overview

HOSTILE = "<script>alert(1)</script>\"'&$body.png"
RED, BLUE = (255, 0, 0), (0, 0, 255)


def plain(color: tuple[int, int, int], size: tuple[int, int] = (16, 16)) -> Image.Image:
    return Image.new("RGB", size, color)


class Page(HTMLParser):
    """The tags of a page, and the texts that it shows."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        inside = self.tags[-1][0] if self.tags else ""
        if inside not in ("script", "style"):
            self.text += data

    def every(self, tag: str, name: str) -> list[str]:
        """The values of an attribute of all tags of a kind that have it."""
        values = [attributes.get(name) for found, attributes in self.tags if found == tag]
        return [value for value in values if value is not None]

    def pictures(self) -> list[Image.Image]:
        return [
            Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2])))
            for source in self.every("img", "src")
        ]


def test_a_page_shows_the_target_and_each_source_beside_its_result() -> None:
    shown = [Shown("ada", plain(RED), plain(BLUE), "edited_ada.png", "score 0.1 before")]
    page = Page(gallery([("joker.png", plain(BLUE))], shown, facts={"Strength": "0.8"}))
    assert page.every("img", "alt") == ["target: joker.png", "ada, source", "ada, result"]
    pictures = page.pictures()
    assert [picture.size for picture in pictures] == [(256, 256)] * 3  # small ones are enlarged
    colours = [picture.convert("RGB").getpixel((128, 128)) for picture in pictures]
    assert [isinstance(c, tuple) and c[0] > c[2] for c in colours] == [False, True, False]
    assert page.every("a", "href") == ["edited_ada.png"]
    for word in ("The essence of joker.png", "Strength", "0.8", "score 0.1 before"):
        assert word in page.text


def test_nothing_of_a_page_comes_from_elsewhere(tmp_path: Path) -> None:
    plain(RED).save(tmp_path / "strip.png")
    plain(RED).save(tmp_path / "morph.gif")
    shown = [Shown("ada", plain(RED), plain(BLUE), "edited_ada.png")]
    shows = {"Strip": tmp_path / "strip.png", "Morph": tmp_path / "morph.gif"}
    html = gallery([("joker", plain(BLUE))], shown, shows=shows, files=["grid.png"])
    page = Page(html)
    sources = [source for tag in ("img", "video") for source in page.every(tag, "src")]
    assert len(sources) == 5 and all(source.startswith("data:") for source in sources)
    assert not page.every("script", "src") and "http:" not in html and "https:" not in html
    assert "url(" not in html and "@import" not in html
    assert page.every("a", "href") == ["edited_ada.png", "strip.png", "morph.gif", "grid.png"]
    [policy] = page.every("meta", "content")[1:]
    assert policy.startswith("default-src 'none'")


def test_what_a_user_named_is_text_whatever_it_holds() -> None:
    strange = os.fsdecode(b"\xff#?%.png")
    shown = [Shown(HOSTILE, plain(RED), plain(BLUE), f"edited_{HOSTILE}", HOSTILE)]
    linked = Linked(HOSTILE, plain(RED), [plain(BLUE)], f"javascript:{HOSTILE}/a.html", HOSTILE)
    one = gallery(
        [(HOSTILE, None), (strange, plain(RED))],
        shown,
        facts={HOSTILE: HOSTILE},
        warnings=[HOSTILE],
        others=[HOSTILE],
        command=HOSTILE,
        files=[HOSTILE, strange],
    )
    several = overview([linked], warnings=[HOSTILE], command=HOSTILE, files=[HOSTILE, strange])
    for html, times in ((one, 10), (several, 5)):
        page = Page(html.encode().decode())  # it can be written
        assert [tag for tag, _ in page.tags].count("script") == 1
        assert page.text.count(HOSTILE) >= times
        assert not [name for _, attributes in page.tags for name in attributes if "alert" in name]
        assert "\\udcff#?%.png" in page.text and "%FF%23%3F%25.png" in html
        assert all(":" not in link and "<" not in link for link in page.every("a", "href"))


def test_a_page_works_without_its_script_and_in_the_dark() -> None:
    html = gallery([("joker", plain(BLUE))], [Shown("ada", plain(RED), plain(BLUE))])
    without = re.sub(r"<script>.*</script>", "", html, flags=re.DOTALL)
    assert without != html and "range" not in re.sub(r"<style>.*</style>", "", without, flags=re.S)
    page = Page(without)
    assert len(page.pictures()) == 3
    assert [attributes for _, attributes in page.tags if "hidden" in attributes]  # the hint on it
    assert "prefers-color-scheme: dark" in html and 'name="viewport"' in html


def test_whole_pictures_keep_their_shape_and_large_ones_are_made_smaller() -> None:
    photo = plain(RED, (2000, 1000))
    shown = [Shown("trip", photo, photo, whole=True), Shown("face", photo, photo)]
    _, *pictures = Page(gallery([("joker", plain(BLUE))], iter(shown))).pictures()
    assert [p.size for p in pictures] == [(768, 384)] * 2 + [(512, 512)] * 2


def test_a_moving_picture_that_is_too_large_is_a_still_that_leads_to_it(
    tmp_path: Path,
) -> None:
    path = tmp_path / "morph.gif"
    plain(RED).save(path, save_all=True, append_images=[plain(BLUE)])
    (tmp_path / "edited.mp4").write_bytes(b"a clip")
    shows = {"Morph": path, "Clip": tmp_path / "edited.mp4"}
    page = Page(gallery([("a text", None)], [], shows=shows))
    assert page.every("img", "src")[0].startswith("data:image/gif;")
    assert page.every("video", "src") == ["data:video/mp4;base64,YSBjbGlw"]
    for large in shows.values():
        os.truncate(large, MAX_EMBEDDED + 1)
    page = Page(gallery([("a text", None)], [], shows=shows))
    assert page.every("img", "src")[0].startswith("data:image/webp;")
    assert not page.every("video", "src")
    assert page.every("a", "href") == ["morph.gif", "edited.mp4"]


def test_a_page_of_several_results_leads_to_each_and_tells_of_those_that_failed() -> None:
    results = [
        Linked("a b.png", plain(RED), [plain(BLUE)] * 2, "a b/index.html", "score 0.1"),
        Linked("c.png", None, (), None, "the loss is not finite"),
        Linked('"a hat"', None, [plain(BLUE)], "a_hat/index.html", ""),
    ]
    page = Page(overview(results, files=["grid.png"]))
    assert page.every("a", "href") == [
        *["a%20b/index.html"] * 2,
        *["a_hat/index.html"] * 2,
        "grid.png",
    ]
    assert len(page.pictures()) == 3 + 1 and page.text.count('"a hat"') == 2
    for word in ("The essence of 3 targets", "score 0.1", "c.png", "the loss is not finite"):
        assert word in page.text
