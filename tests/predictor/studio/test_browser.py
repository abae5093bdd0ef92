"""Tests of the page in a real browser: upload, edit, slide, download, errors; and no other host."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from studio_runs import studio

from predictor.direction import Direction
from predictor.transfer import load_essence
from targetclip.media.images import read_picture

playwright = pytest.importorskip("playwright.sync_api")
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next((path for path in map(shutil.which, BROWSERS) if path), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason=f"none of {', '.join(BROWSERS)} is here")
EXAMPLES = Path(__file__).parents[3] / "examples"
SECONDS = 60_000  # milliseconds to wait at most, on a machine that has other work


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with studio(tmp_path_factory.mktemp("temporary")) as address:
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: playwright.Browser, address: str) -> Iterator[playwright.Page]:
    """The page with its first result; a request to another host, or an error in it, fails."""
    page, asked, errors = browser.new_page(), list[str](), list[str]()
    page.set_default_timeout(SECONDS)
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(address)
    playwright.expect(page.locator("#facts")).to_contain_text("Transfer score", timeout=SECONDS)
    yield page
    page.close()
    others = [url for url in asked if not url.startswith((address, "data:", "blob:"))]
    assert not others and not errors


def result(page: playwright.Page) -> list[str]:
    """Return the addresses of the two pictures that are shown large."""
    return [str(image.get_attribute("src")) for image in page.locator("#large img").all()]


def changes(page: playwright.Page, action: Callable[[], object]) -> list[str]:
    """Do something, wait until the large result is another picture, and return it."""
    before = result(page)
    action()
    page.wait_for_function(
        "b => { const now = [...document.querySelectorAll('#large img')].map(i => "
        "i.getAttribute('src')); return now.length == 2 && now.join() != b.join() }",
        arg=before,
    )
    return result(page)


def test_an_example_is_edited_slid_and_downloaded(page: playwright.Page, tmp_path: Path) -> None:
    source, edited = result(page)
    assert page.locator("#results img").count() == 4
    assert "Identity kept" in page.locator("#facts").inner_text()
    now = changes(page, page.locator("#examples button img").nth(1).click)
    assert now[0] == source and now[1] != edited
    other = changes(page, page.locator("#results button img").nth(2).click)
    assert other[0] != source
    page.locator("#strength input[type=range]").focus()
    first = changes(page, lambda: page.keyboard.press("ArrowLeft"))
    second = changes(page, lambda: page.keyboard.press("ArrowLeft"))
    assert first[0] == second[0] == other[0] and first[1] != second[1]
    page.locator("#make").click()
    links = page.locator("#files a[download]")
    links.first.wait_for()
    for link in links.all():
        with page.expect_download() as waiting:
            link.click()
        waiting.value.save_as(tmp_path / waiting.value.suggested_filename)
    names = {"edited_1.png", "sheet.png", "direction.safetensors", "morph.gif"}
    assert names <= {path.name for path in tmp_path.iterdir()}
    assert read_picture(tmp_path / "edited_1.png").size == (128, 128)
    assert Direction.load(tmp_path / "direction.safetensors", load_essence()).correction is not None


def upload(page: playwright.Page, gallery: str, *paths: Path) -> None:
    """Take pictures in the place of those that a gallery has."""
    page.locator(f"{gallery} button[aria-label='Clear']").click()
    page.locator(f"{gallery} input[type=file]").set_input_files(paths)
    page.locator(f"{gallery} img").nth(len(paths) - 1).wait_for(state="attached")


def test_own_pictures_and_words_are_taken_and_bad_ones_are_answered_by_a_message(
    page: playwright.Page, tmp_path: Path
) -> None:
    upload(page, "#targets", EXAMPLES / "king.png")
    upload(page, "#sources", EXAMPLES / "dora.png", EXAMPLES / "ada.png")
    changes(page, page.locator("#go").click)
    playwright.expect(page.locator("#results img")).to_have_count(2)
    bad = tmp_path / "<img src=x onerror=document.title='run'>.png"
    bad.write_bytes(b"no picture")
    upload(page, "#targets", bad)
    page.locator("#go").click()
    message = page.locator(".toast-body")
    playwright.expect(message).to_contain_text("is not a picture of a known kind", timeout=SECONDS)
    page.locator("#targets button[aria-label='Clear']").click()
    page.locator("#text textarea, #text input").fill("pink hair <b onclick=alert(1)>and</b> beard")
    changes(page, page.locator("#go").click)
    assert page.locator("#facts b").count() == 0
    assert page.title() == "targetclip studio"


def test_identity_to_keep_is_chosen(page: playwright.Page) -> None:
    page.get_by_text("How the direction is found").click()
    before, number = result(page), page.locator("#keep input[type=number]")
    content, default = page.request.get(before[1]).body(), number.input_value()
    number.fill("1")
    number.press("Tab")
    most = changes(page, page.locator("#go").click)
    assert most[0] == before[0] and most[1] != before[1]
    number.fill(default)
    number.press("Tab")
    again = changes(page, page.locator("#go").click)
    assert page.request.get(again[1]).body() == content != page.request.get(most[1]).body()
