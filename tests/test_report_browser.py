"""The head report in a real browser: what is on the page, its controls by keyboard, on a phone, in the dark."""

import io
import shutil

import pytest

from tests.test_cli import call

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="there is no Chromium here (Debian's package `chromium`): the page cannot be opened"
)


@pytest.fixture(scope="module")
def browser():
    sync = pytest.importorskip("playwright.sync_api", reason="playwright, which drives the browser, is not installed")
    with sync.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    out = tmp_path_factory.mktemp("report")
    call("report", "scenes", "--out", out, "--prompts", "4", "--device", "cpu")
    return out / "heads" / "report.html"


@pytest.fixture
def page(browser, report):
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    found = context.new_page()
    found.complaints, found.asked = [], []
    found.on("console", lambda message: found.complaints.append(message.text))
    found.on("pageerror", lambda error: found.complaints.append(str(error)))
    found.on("request", lambda request: found.asked.append(request.url))
    found.goto(report.as_uri())
    found.wait_for_selector(".plot svg")
    yield found
    context.close()


def test_it_shows_everything_and_asks_for_nothing(page):
    assert page.title() == "Attention heads of scenes"
    assert page.complaints == []
    assert all(url.startswith(("file:", "data:", "blob:")) for url in page.asked)
    drawn = page.evaluate("[...document.querySelectorAll('.plot')].map(p => p.querySelectorAll('svg').length)")
    assert len(drawn) > 16  # a map and bars for each of eight methods, and more
    assert min(drawn) > 0
    pictures = page.evaluate("[...document.images].map(i => i.complete && i.naturalWidth)")
    assert len(pictures) == 24
    assert min(pictures) > 100
    headings = page.locator("section > h2").all_inner_texts()
    for words in ("Summary", "Vision divergence (VHD)", "Head pursuit", "Do the methods agree?", "removed?"):
        assert any(words in heading for heading in headings), words


def test_contents_lead_to_their_sections(page):
    links = page.locator("nav a")
    assert links.count() == page.locator("main section").count()
    for i in (0, links.count() // 2, links.count() - 1):
        links.nth(i).focus()
        page.keyboard.press("Enter")
        target = links.nth(i).get_attribute("href")
        assert page.evaluate("location.hash") == target
        box = page.locator(f"[id='{target[1:]}']").bounding_box()
        assert -1 <= box["y"] < 900


def test_tables_open_and_sort_by_keyboard(page):
    details = page.locator("details", has_text="Table of the 20 strongest heads").first
    assert details.get_attribute("open") is None
    details.locator("summary").focus()
    page.keyboard.press("Enter")
    assert details.get_attribute("open") is not None
    button = details.locator("th button", has_text="score")
    column = details.locator("th button").all_inner_texts().index("score")

    def values():
        texts = details.locator(f"tbody tr td:nth-child({column + 1})").all_inner_texts()
        return [float(text.replace("\N{MINUS SIGN}", "-")) for text in texts]

    before = values()
    assert len(before) == 20
    button.focus()
    page.keyboard.press("Enter")
    assert values() == sorted(before, reverse=True)
    page.keyboard.press("Space")
    assert values() == sorted(before)
    assert details.locator("th").nth(column).get_attribute("aria-sort") == "ascending"


def test_everything_can_be_reached_with_the_tab_key(page):
    page.keyboard.press("Tab")
    seen = set()
    for _ in range(60):
        seen.add(page.evaluate("document.activeElement.tagName"))
        page.keyboard.press("Tab")
    assert {"A", "SUMMARY"} <= seen
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline != "none"  # what has the focus is seen to have it


@pytest.mark.parametrize("width", [360, 800])
def test_it_fits_a_phone(page, width):
    page.set_viewport_size({"width": width, "height": 800})
    page.wait_for_timeout(500)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    sizes = page.evaluate(
        "[...document.querySelectorAll('p, td, li, dd')].map(e => parseFloat(getComputedStyle(e).fontSize))"
    )
    assert min(sizes) >= 11
    # Pictures get narrower with the page, down to a third of their width.
    wide = page.evaluate(
        "[...document.querySelectorAll('.plot')].map(p => [p.clientWidth, p.closest('.scroll').clientWidth])"
    )
    assert sum(plot <= room + 1 for plot, room in wide) > len(wide) * 0.8


def test_the_screenshot_has_colours_in_light_and_dark(page):
    from PIL import Image

    shots = {}
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        page.wait_for_timeout(300)
        section = page.locator("main section", has_text="Vision divergence (VHD)").nth(1)
        section.scroll_into_view_if_needed()
        shots[scheme] = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    for scheme, shot in shots.items():
        colours = shot.getcolors(1 << 24)
        assert len(colours) > 200, scheme
        ground = max(colours)[1]
        assert (sum(ground) > 600) == (scheme == "light"), (scheme, ground)
