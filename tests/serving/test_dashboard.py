"""The dashboard in a real browser: what it shows, that it needs nothing from elsewhere, that a keyboard is enough."""

import re
import shutil
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from cluster.client import Client
from cluster.home import Home
from cluster.keys import KeyFile
from cluster.manifest import VersionRef

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs a browser: apt-get install chromium")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield started
        started.close()


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Home:
    return Home(tmp_path_factory.mktemp("shown")).ensure()


@pytest.fixture(scope="module")
def shown(run_alone, home):
    """A server of two versions, with some traffic and feedback."""
    with run_alone(home) as served, Client(served.url) as client:
        served.versions.publish_version(seed=1, promote=False)
        for user in range(4):
            slate = client.recommend(f"u{user}", k=3)
            kinds = ("impression", "click")
            client.feedback(
                [
                    {"user_id": f"u{user}", "item_id": item["item_id"], "kind": kind, "request_id": slate["request_id"]}
                    for item in slate["items"][: user + 1]
                    for kind in kinds
                ]
            )
        yield served


@pytest.fixture
def page(browser, shown) -> Iterator[Page]:
    """The page, loaded; whatever it complains of or asks of others fails the test."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, color_scheme="light")
    opened = context.new_page()
    complaints, elsewhere = [], []
    opened.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    opened.on("request", lambda request: elsewhere.append(request.url))
    opened.goto(shown.url)
    yield opened
    context.close()
    assert (complaints, [url for url in elsewhere if not url.startswith(shown.url)]) == ([], [])


def test_it_shows_what_is_served_traffic_and_feedback(page):
    expect(page.locator("#served")).to_have_text("serving 1.0")
    expect(page.locator("#latency svg polyline")).to_have_count(2)
    expect(page.locator("#requests svg")).to_have_attribute("aria-label", re.compile("Requests a second: now answered"))
    expect(page.locator("#ctr figcaption")).to_contain_text("live 1")
    expect(page.locator("#hits figcaption")).to_contain_text("live 1")
    expect(page.locator("#glance")).to_contain_text("CTR100.0%")
    expect(page.locator("#replica")).to_contain_text("Of the replica that answered")
    expect(page.locator("#freshness tbody tr")).to_have_count(5)
    expect(page.locator("#loss")).to_contain_text("Log loss")
    expect(page.locator("#facts")).to_contain_text("live 1.0, state 1.0, frozen 1.0")
    expect(page.locator("#problem")).to_be_hidden()


def test_a_user_is_tried_by_keyboard_alone_with_history_slate_and_reasons(page):
    expect(page.locator("#arm option")).to_have_count(3)
    page.keyboard.press("Tab")
    expect(page.locator(".skip")).to_be_focused()
    for _ in range(30):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "user":
            break
    page.keyboard.type("u1")
    page.keyboard.press("Enter")
    expect(page.locator("#slate li")).to_have_count(10)
    expect(page.locator("#history li").first).to_contain_text("click")
    for _ in range(3):  # the arm, the button, the first item
        page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(page.locator("#why")).to_contain_text("interactions")
    expect(page.locator("#why li").first).to_contain_text("film number")


def test_versions_are_promoted_and_rolled_back_by_button(page, shown):
    shown.registry.promote(VersionRef(2), "by hand")
    expect(page.locator("#served")).to_have_text("serving 2.0", timeout=15_000)
    page.on("dialog", lambda dialog: dialog.accept())
    page.get_by_label("Reason for the record").fill("a bad day")
    page.get_by_role("button", name="Roll back").click()
    expect(page.locator("#moved")).to_have_text("Promoted 1.0; before it was 2.0.")
    assert shown.registry.history()[-1].reason == "a bad day"
    expect(page.locator("#moves tbody tr").first).to_contain_text("a bad day")
    page.get_by_role("button", name="Promote version 2").click()
    expect(page.locator("#moved")).to_have_text("Promoted 2.0; before it was 1.0.")
    assert str(shown.registry.current()) == "2.0"
    shown.registry.promote(VersionRef(1), "as it was")


def test_it_is_dark_for_whoever_wants_it_so_and_stays_so(browser, shown, page):
    def background(opened):
        return opened.evaluate("getComputedStyle(document.body).backgroundColor")

    light = background(page)
    page.get_by_role("button", name="Dark").click()
    dark = background(page)
    assert dark != light
    page.reload()
    assert background(page) == dark
    preferring = browser.new_page(color_scheme="dark")
    preferring.goto(shown.url)
    assert background(preferring) == dark
    preferring.close()


def test_its_files_need_no_key_and_may_ask_nobody_else(shown):
    for path, kind in {
        "/": "text/html",
        "/dashboard/page.js": "text/javascript",
        "/dashboard/style.css": "text/css",
    }.items():
        answer = shown.request("GET", path)
        assert answer.status == 200
        assert answer.headers["content-type"].startswith(kind)
        assert answer.headers["content-security-policy"].startswith("default-src 'self';")
        assert "http" not in re.sub(r"http://www\.w3\.org/2000/svg", "", answer.body["text"])
    assert shown.request("GET", "/dashboard/other.js").status == 404
    assert "/" not in shown.request("GET", "/openapi.json").body["paths"]


def test_it_fits_a_telephone(page):
    page.set_viewport_size({"width": 360, "height": 740})
    expect(page.locator("#latency svg")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_what_an_item_is_called_is_text_and_never_markup(page, shown):
    with Client(shown.url) as client:
        client.put_items([{"item_id": "<img src=x onerror=alert(1)>", "text": "<b id=injected>bold</b>"}])
        client.feedback([{"user_id": "marked", "item_id": "<img src=x onerror=alert(1)>", "kind": "like"}])
    page.get_by_label("User id").fill("marked")
    page.get_by_role("button", name="Recommend").click()
    expect(page.locator("#history li").first).to_contain_text("<b id=injected>bold</b>")
    assert page.locator("#injected").count() == 0


def test_a_key_is_asked_for_where_one_is_needed_and_a_small_one_is_refused(browser, run_alone, tmp_path):
    home = Home(tmp_path).ensure()
    file = KeyFile(home.keys)
    keys = {role: file.add(role, role)[1] for role in ("read", "admin")}
    with run_alone(home) as served:
        served.versions.publish_version(seed=1)
        opened = browser.new_page()
        opened.goto(served.url)
        expect(opened.locator("#problem")).to_contain_text("a key is needed")
        opened.get_by_label("Admin key").fill(keys["read"])
        opened.keyboard.press("Enter")
        expect(opened.locator("#problem")).to_contain_text("this needs admin")
        opened.on("dialog", lambda dialog: dialog.accept())
        opened.get_by_role("button", name="Roll back").click()
        expect(opened.locator("#problem")).to_contain_text("this needs admin")
        assert str(served.registry.current()) == "2.0"
        opened.get_by_label("Admin key").fill(keys["admin"])
        opened.keyboard.press("Enter")
        expect(opened.locator("#served")).to_have_text("serving 2.0", timeout=15_000)
        expect(opened.locator("#problem")).to_be_hidden()
        opened.get_by_role("button", name="Roll back").click()
        expect(opened.locator("#moved")).to_have_text("Promoted 1.0; before it was 2.0.")
        assert str(served.registry.current()) == "1.0"
        served.versions.flip_bit(VersionRef(2), "recipe.toml")
        opened.get_by_role("button", name="Promote version 2").click()
        expect(opened.locator("#problem")).to_contain_text("checksum differs")
        assert str(served.registry.current()) == "1.0"
        assert keys["admin"] not in opened.url
        assert opened.evaluate("JSON.stringify(localStorage)") == "{}"
        opened.close()
