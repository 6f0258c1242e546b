"""
The page in Chromium, with a camera that plays a clip of NEO-nano's world. `make test-web` installs it.

With `WEB_SCREENSHOTS=FOLDER`, the pictures of docs/web.md and one of each tab on a phone are written to that folder.
"""

import functools
import itertools
import os
import shutil
import threading
import time
from pathlib import Path

import av
import numpy as np
import pytest

pytest.importorskip("gradio", reason="needs Gradio: make test-web, or pip install 'neo-hf[web]'")
sync_api = pytest.importorskip("playwright.sync_api", reason="needs Playwright: make test-web")

from test_web import CAPTION, DIRECTION
from world import Shape, draw

from neo_hf.loading import EXAMPLE_IMAGE
from neo_hf.web import live
from neo_hf.web.page import EXAMPLES

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="needs Chromium: make test-web, or apt-get install chromium")
expect = sync_api.expect
TIMEOUT = 60_000  # milliseconds: the machine may be busy
expect.set_options(timeout=TIMEOUT)
DESKTOP, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 844}


@pytest.fixture(scope="session")
def clip(tmp_path_factory):
    """Four seconds in which a circle moves to the right, once per second."""
    file = tmp_path_factory.mktemp("camera") / "clip.y4m"
    with av.open(file, "w", format="yuv4mpegpipe") as container:
        stream = container.add_stream("rawvideo", rate=10)
        stream.width = stream.height = 640
        stream.pix_fmt = "yuv420p"
        for number in range(40):
            shapes = [Shape("red", "circle", 4 + 12 * (number // 10), 8), Shape("blue", "square", 8, 40)]
            image = draw((64, 64), "white", shapes).resize((640, 640), 0)
            container.mux(stream.encode(av.VideoFrame.from_image(image)))
        container.mux(stream.encode())
    return file


@pytest.fixture(scope="session")
def browser(clip):
    camera = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
    options = ["--no-sandbox", *camera, f"--use-file-for-fake-video-capture={clip}"]
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, page):
    """Opens the page as someone new."""
    contexts = []

    def visit(**options):
        context = browser.new_context(**{"viewport": DESKTOP, **options})
        contexts.append(context)
        tab = context.new_page()
        tab.set_default_timeout(TIMEOUT)
        tab.foreign = []
        tab.on("request", lambda request: tab.foreign.append(request.url))
        tab.on("pageerror", lambda error: pytest.fail(str(error)))
        tab.goto(page.url)
        expect(tab.locator("#question textarea")).to_be_visible()
        return tab

    yield visit
    for context in contexts:
        context.close()


@pytest.fixture
def tab(visit):
    return visit()


def attach(tab, *files, within="#question"):
    tab.locator(f"{within} input[type=file]").first.set_input_files([str(file) for file in files])
    expect(tab.locator(f"{within} .thumbnail-item")).to_have_count(len(files))


def submit(tab, question):
    box = tab.locator("#question textarea")
    box.fill(question)
    box.press("Enter")


def ask(tab, question, *files):
    """Ask, and return the whole answer."""
    before = tab.locator("#conversation [data-testid=bot]").count()
    if files:
        attach(tab, *files)
    submit(tab, question)
    expect(tab.locator("#conversation [data-testid=bot]")).to_have_count(before + 1)
    return finished_answer(tab)


def finished_answer(tab):
    expect(tab.locator("#chat-status")).to_contain_text("Answer:")
    # Until then, Gradio drops what is submitted.
    expect(tab.locator("#conversation").get_by_role("button", name="Retry")).to_be_enabled()
    return tab.locator("#conversation [data-testid=bot]").last.inner_text().strip()


def open_tab(tab, name):
    tab.get_by_role("tab", name=name).click()


def open_settings(tab):
    """Do something else before you fill them in: once more after they are shown, Gradio sets them."""
    tab.locator("button.label-wrap").filter(has_text="Settings").first.click()


def screenshot(tab, name):
    if folder := os.environ.get("WEB_SCREENSHOTS"):
        tab.mouse.move(0, 0)
        tab.wait_for_timeout(300)
        tab.screenshot(path=Path(folder) / f"{name}.png", full_page=True)


def held(tab, page):
    """The model's `forward`, with which an answer is shown token by token, and does not end before it is to stop."""
    forward, key, calls = page.sessions.model.forward, tab.evaluate("neoSession()"), itertools.count()

    @functools.wraps(forward)
    def hold(*args, **kwargs):
        time.sleep(0.25)
        if next(calls) > 8:
            page.sessions.find(key).is_stopping.wait(TIMEOUT / 1000)
        return forward(*args, **kwargs)

    return hold


def test_image_and_three_turns(tab):
    assert ask(tab, "Describe the picture.", EXAMPLE_IMAGE) == CAPTION
    assert ask(tab, "How many shapes are there?") == "3"
    screenshot(tab, "chat")
    assert ask(tab, "What color is the shape at the top left?") == "red"
    expect(tab.locator("#chat-status")).to_contain_text("from the cache")
    expect(tab.locator("#conversation img.thumbnail")).to_have_count(1)
    assert not [url for url in tab.foreign if not url.startswith(("http://127.0.0.1:", "data:", "blob:"))]

    tab.reload()
    expect(tab.locator("#conversation [data-testid=bot]")).to_have_count(3)
    assert ask(tab, "Describe the picture.") == CAPTION
    tab.get_by_role("button", name="Start over").click()
    expect(tab.locator("#conversation [data-testid=bot]")).to_have_count(0)


def test_examples(tab, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # Gradio hands out what is below the working directory; the package is elsewhere
    for label, (question, files) in EXAMPLES.items():
        tab.get_by_role("button", name=label, exact=True).click()
        expect(tab.locator("#question textarea")).to_have_value(question)
        expect(tab.locator("#question .thumbnail-item")).to_have_count(len(files))


def test_questions_are_shown_as_typed(tab):
    ask(tab, "Is <image> <b>bold</b>, or `a < b`?")
    assert tab.locator("#conversation [data-testid=user]").inner_text().strip() == "Is <image> <b>bold</b>, or a < b?"


def test_empty_question_changes_nothing(tab):
    assert ask(tab, "Describe the picture.", EXAMPLE_IMAGE) == CAPTION
    with tab.expect_response("**/queue/data*"):
        tab.locator("#question textarea").press("Enter")
    tab.wait_for_timeout(500)
    assert ask(tab, "How many shapes are there?") == "3"
    expect(tab.locator("#conversation [data-testid=bot]")).to_have_count(2)


def test_answer_written_again_with_other_settings(tab):
    open_settings(tab)
    assert ask(tab, "Describe the picture.", EXAMPLE_IMAGE) == CAPTION
    length = tab.get_by_label("number input for Length").first
    length.fill("2")
    length.blur()
    tab.locator("#conversation button[aria-label=Retry]").click()
    expect(tab.locator("#conversation [data-testid=bot]")).to_have_text("a red")
    open_tab(tab, "What it sees")
    expect(tab.locator("#tokens button")).to_have_text(["a", " red"])


def test_two_images(tab):
    question, files = EXAMPLES["Two images"]
    assert ask(tab, question, *files) == "the yellow star became green"


def test_video_from_the_examples(tab):
    tab.get_by_role("button", name="A video").click()
    expect(tab.locator("#question .thumbnail-item")).to_have_count(1)
    tab.locator("#question textarea").press("Enter")
    assert finished_answer(tab) == "right"


def test_answer_can_be_stopped(tab, page, monkeypatch):
    monkeypatch.setattr(page.sessions.model, "forward", held(tab, page))
    attach(tab, EXAMPLE_IMAGE)
    submit(tab, "Describe the picture.")
    stop = tab.locator("#question button.stop-button")
    expect(tab.locator("#conversation [data-testid=bot]")).to_contain_text("a red")
    stop.click()
    answer = finished_answer(tab)
    assert CAPTION.startswith(answer)
    assert answer != CAPTION
    monkeypatch.undo()
    assert ask(tab, "How many shapes are there?") == "3"


def test_reload_keeps_what_an_answer_had(tab, page, monkeypatch):
    monkeypatch.setattr(page.sessions.model, "forward", held(tab, page))
    attach(tab, EXAMPLE_IMAGE)
    submit(tab, "Describe the picture.")
    answer = tab.locator("#conversation [data-testid=bot]")
    expect(answer).to_contain_text("a red")
    tab.reload()
    expect(answer).to_contain_text("a red")
    assert answer.inner_text().strip() != CAPTION
    monkeypatch.undo()
    assert ask(tab, "How many shapes are there?") == "3"


def test_bad_files_give_messages_and_the_conversation_stays(tab, tmp_path):
    assert ask(tab, "Describe the picture.", EXAMPLE_IMAGE) == CAPTION
    damaged = tmp_path / "damaged.png"
    damaged.write_bytes(EXAMPLE_IMAGE.read_bytes()[:300])
    attach(tab, damaged)
    submit(tab, "What changed?")
    expect(tab.get_by_text("damaged.png cannot be read as an image")).to_be_visible()
    expect(tab.locator("#conversation [data-testid=bot]")).to_have_count(1)
    large = tmp_path / "large.png"
    large.touch()
    os.truncate(large, 100_000_000)
    tab.locator("#question input[type=file]").first.set_input_files(str(large))
    expect(tab.get_by_text("maximum allowed size", exact=False).first).to_be_visible()
    expect(tab.locator("#conversation [data-testid=bot]")).to_have_count(1)


def red_column(frame):
    """The first column in which a frame is red."""
    red, green, _ = np.asarray(frame).transpose(2, 0, 1).astype(int)
    return int(np.flatnonzero(((red - green) > 100).any(0))[0])


def test_live_camera(tab, monkeypatch):
    columns = []
    decode = live._decode

    def record(image):
        columns.append(red_column(frame := decode(image)))
        return frame

    monkeypatch.setattr(live, "_decode", record)
    open_tab(tab, "Live")
    tab.locator("[data-field=rate]").fill("1")
    tab.locator("[data-field=questions]").fill(DIRECTION)
    for _ in range(5):  # on a busy machine, until the four frames come from one run of the clip
        columns.clear()
        tab.locator("[data-do=camera]").click()
        tab.wait_for_function(  # stopped from within the page, before the circle starts again
            """() => {
                if (Number(document.querySelector("[data-show=shown]").textContent) < 4) return false;
                document.querySelector("[data-do=stop]").click();
                return true;
            }"""
        )
        if sorted(set(columns)) == columns:
            break
        tab.locator("[data-do=reset]").click()
        expect(tab.locator("[data-show=shown]")).to_have_text("0")
    expect(tab.locator(".answers dd")).to_have_text("right")
    for _ in range(2):  # the second time after a reload, which keeps the stream
        question = tab.locator("#live-question textarea, #live-question input")
        question.fill(DIRECTION)
        question.press("Enter")
        tab.wait_for_function("document.querySelector('#live-answer textarea').value.startsWith('right  (')")
        tab.reload()
        open_tab(tab, "Live")
        expect(tab.locator("[data-show=frames]")).not_to_have_text("0")
    # Faster, with little room: the oldest frames go, and the budget is kept.
    tab.locator("[data-field=rate]").fill("10")
    tab.locator("[data-field=budget]").fill("200")
    tab.locator("[data-do=camera]").click()
    tab.wait_for_function("Number(document.querySelector('[data-show=shown]').textContent) > 24")
    assert 100 < int(tab.locator("[data-show=tokens]").inner_text()) <= 200


def test_live_settings_while_frames_are_shown(tab):
    shown = "Number(document.querySelector('[data-show=shown]').textContent)"
    open_tab(tab, "Live")
    rate, side, budget = (tab.locator(f"[data-field={name}]") for name in ("rate", "side", "budget"))
    rate.fill("10")
    tab.locator("[data-do=camera]").click()
    tab.wait_for_function(f"{shown} > 30")
    more = f"count => {shown} > count"
    for field, typed, complete in ((side, "", "64"), (budget, "2", "64"), (rate, "1", "1")):
        field.fill(typed)  # changes nothing yet
        tab.wait_for_function(more, arg=tab.evaluate(shown) + 5)
        if field is budget:
            assert int(tab.locator("[data-show=tokens]").inner_text().replace(",", "")) > 500
        field.press("Enter")
        expect(field).to_have_value(complete)
    tab.wait_for_function(more, arg=tab.evaluate(shown) + 2, timeout=10_000)
    assert int(tab.locator("[data-show=tokens]").inner_text()) <= 64


def test_live_file(tab):
    open_tab(tab, "Live")
    tab.locator("[data-field=questions]").fill(DIRECTION)
    tab.locator("#live input[type=file]").set_input_files(str(EXAMPLES["A video"][1][0]))
    tab.wait_for_function("Number(document.querySelector('[data-show=shown]').textContent) > 2")
    expect(tab.locator("[data-do=stop]")).to_be_disabled(timeout=30_000)  # at the end
    expect(tab.locator(".answers dd")).to_have_text("right")
    screenshot(tab, "live")
    tab.locator("#live input[type=file]").set_input_files(str(EXAMPLE_IMAGE))
    expect(tab.get_by_text("scene.png cannot be played")).to_be_visible()


def test_live_screen(tab):
    open_tab(tab, "Live")
    tab.locator("[data-do=screen]").click()
    tab.wait_for_function("Number(document.querySelector('[data-show=shown]').textContent) > 2")


def test_photo_from_the_camera(tab):
    open_settings(tab)
    tab.get_by_role("button", name="Camera").first.click()
    tab.get_by_text("Click to Access Webcam").click()
    tab.wait_for_function("document.querySelector('#camera video')?.currentTime > 0")
    tab.locator("button[aria-label='capture photo']").click()
    expect(tab.locator("#camera img")).to_be_visible()
    budget = tab.get_by_label("Pixel budget").first
    budget.fill("4096")  # 64 x 64, which NEO-nano knows
    budget.blur()
    assert ask(tab, "What is at the bottom left?") == "a blue square"  # the circle may be anywhere
    expect(tab.locator("#conversation img.thumbnail")).to_have_count(1)


def test_drawing_of_a_token(tab):
    assert ask(tab, "Describe the picture.", EXAMPLE_IMAGE) == CAPTION
    open_tab(tab, "What it sees")
    with tab.expect_response("**/queue/data*"):
        tab.get_by_label("Attention").click()
        tab.get_by_role("option", name="layer 1").click()
    tab.wait_for_timeout(500)
    expect(tab.get_by_text("Error")).to_have_count(0)
    token = tab.locator("#tokens button").filter(has_text="circle")
    token.focus()
    tab.keyboard.press("Enter")
    figure = tab.locator("#figure img")
    expect(figure).to_be_visible()
    expect(token).to_have_attribute("aria-pressed", "true")
    expect(token).to_be_focused()
    assert figure.evaluate("image => image.naturalWidth") > 1000
    screenshot(tab, "what-it-sees")
    first = figure.get_attribute("src")
    tab.locator("#tokens button").filter(has_text="star").click()
    tab.wait_for_function("source => document.querySelector('#figure img').src != source", arg=first)


def test_compare(tab):
    open_tab(tab, "Compare")
    box = tab.locator("#compare-question textarea")
    with tab.expect_response("**/queue/data*"):
        box.press("Enter")  # without a question and files, nothing is asked
    attach(tab, EXAMPLE_IMAGE, within="#compare-question")
    budget = tab.get_by_label("Pixel budget").last  # of B
    budget.fill("1024")
    budget.blur()
    box.fill("How many shapes are there?")
    box.press("Enter")
    expect(tab.locator("#answer-A textarea")).to_have_value("3")
    expect(tab.locator("#answer-B textarea")).not_to_have_value("")
    expect(tab.get_by_text("Question: 33 tokens computed")).to_be_visible()  # 4 x 4 for the image
    expect(tab.get_by_text("Question: 21 tokens computed")).to_be_visible()  # 2 x 2
    screenshot(tab, "compare")


def test_ten_people_get_their_own_answers(visit, page, monkeypatch, tmp_path):
    colors = ["red", "green", "blue", "yellow", "purple", "orange", "red", "green", "blue", "yellow"]
    tabs = []
    for number, color in enumerate(colors):
        file = tmp_path / f"{number}.png"
        draw((64, 64), "white", [Shape(color, "circle", 4 + 4 * (number % 2), 8)]).save(file)
        tabs.append(visit())
        attach(tabs[-1], file)
    forward, all_asked = page.sessions.model.forward, threading.Event()

    @functools.wraps(forward)
    def wait(*args, **kwargs):
        all_asked.wait(60)
        return forward(*args, **kwargs)

    monkeypatch.setattr(page.sessions.model, "forward", wait)
    for tab in tabs:
        submit(tab, "What color is the shape at the top left?")
    expect(tabs[-1].locator("#chat-status")).to_contain_text("queue", timeout=30_000)
    all_asked.set()
    for tab, color in zip(tabs, colors, strict=True):
        assert finished_answer(tab) == color


def contrast(element):
    """Of the text of an element with what is behind it, as WCAG 2 defines it."""
    colors = element.evaluate(
        """element => {
            const text = getComputedStyle(element).color;
            while (getComputedStyle(element).backgroundColor === "rgba(0, 0, 0, 0)") element = element.parentElement;
            const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
            return [text, getComputedStyle(element).backgroundColor].map(color => {
                canvas.fillStyle = color;
                canvas.fillRect(0, 0, 1, 1);
                return [...canvas.getImageData(0, 0, 1, 1).data.slice(0, 3)];
            });
        }"""
    )
    channels = np.array(colors) / 255
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    darker, lighter = sorted(linear @ [0.2126, 0.7152, 0.0722])
    return (lighter + 0.05) / (darker + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_phone(visit, scheme):
    tab = visit(viewport=PHONE, color_scheme=scheme)
    assert ask(tab, "Describe the picture.", EXAMPLE_IMAGE) == CAPTION
    for name in ("Chat", "Live", "What it sees", "Compare"):
        if not tab.get_by_role("tab", name=name).is_visible():
            tab.locator(".overflow-menu button").first.click()
        tab.get_by_role("tab", name=name).or_(tab.get_by_role("button", name=name, exact=True)).last.click()
        if name == "What it sees":
            tab.locator("#tokens button").filter(has_text="circle").click()
            expect(tab.locator("#figure img")).to_be_visible()
        tab.wait_for_timeout(300)
        assert tab.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
        for label in tab.locator("label, dt, dd, #limits, #chat-status, [role=tab]").all():
            assert not label.is_visible() or contrast(label) >= 4.5, label.evaluate("label => label.outerHTML")
        screenshot(tab, f"phone-{scheme}-{name.lower().replace(' ', '-')}")
