"""The modules of web/ give the numbers of the processor and the model, and the page answers in a browser."""

import functools
import http.server
import json
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from helpers import CASES, GOLDEN, IMAGE, IMAGE_START, ROOT, golden_case
from PIL import Image

from neo_hf import NeoImageProcessor, load_nano
from neo_hf.image_processing_neo import load_image
from neo_hf.loading import EXAMPLE_IMAGE, NANO

WEB = ROOT / "web"
sys.path.append(str(ROOT / "docs"))
pytestmark = [
    pytest.mark.skipif(shutil.which("node") is None, reason="needs Node.js"),
    pytest.mark.skipif(not (WEB / "node_modules").is_dir(), reason="needs `npm ci --prefix web`"),
]


def call(name, *arguments):
    """The result of a function of nano_page.mjs."""
    command = ["node", ROOT / "tests" / "onnx" / "nano_page.mjs"]
    result = subprocess.run(command, input=json.dumps([name, *arguments]), capture_output=True, text=True, timeout=300)
    assert not result.returncode, result.stderr
    return json.loads(result.stdout)


def saved(image, folder):
    """A Pillow image as a canvas holds it, for nano_page.mjs."""
    rgba = image.convert("RGBA")
    file = folder / f"{len(list(folder.iterdir()))}.rgba"
    file.write_bytes(rgba.tobytes())
    return {"file": str(file), "height": rgba.height, "width": rgba.width}


def scene():
    return Image.open(EXAMPLE_IMAGE)


def test_smart_resize():
    rows = json.loads((GOLDEN / "preprocess" / "smart_resize.json").read_text())
    found = call("smartResize", [[height, width, 32, low, high] for height, width, low, high, _ in rows])
    for size, (*_, expected) in zip(found, rows, strict=True):
        assert size == expected if expected is not None else "pixels" in size


def test_pixels_are_exact(tmp_path):
    """Recorded images in several modes and shapes, made smaller, larger and both."""
    names = sorted((GOLDEN / "preprocess" / "images").iterdir())
    images = [load_image(file) for file in names]
    budgets = [(4096, 16384), (65536, 262144), (1024, 4096)]
    processors = [NeoImageProcessor(min_pixels=low, max_pixels=high) for low, high in budgets]
    inputs = [
        saved(image, tmp_path) | {"settings": processor.to_dict()} for image in images for processor in processors
    ]
    expected = [processor(image) for image in images for processor in processors]
    for found, right in zip(call("patches", inputs), expected, strict=True):
        assert [found["grid"]] == right["image_grid_hw"].tolist()
        assert np.array_equal(np.float32(found["pixels"]), right["pixel_values"].ravel())


def test_indices(golden):
    cases = [golden_case(golden, name) for name in CASES]
    config = {
        "image_token_id": IMAGE,
        "image_start_token_id": IMAGE_START,
        "vision_config": {"spatial_merge_size": 2},
    }
    none = torch.zeros(0, 2)
    given = [
        {"ids": inputs["input_ids"][0].tolist(), "grids": inputs.get("image_grid_hw", none).tolist()}
        for inputs, _ in cases
    ]
    for found, (_, case) in zip(call("positions", given, config), cases, strict=True):
        assert found["positions"] == case["thw_indexes"].tolist()
        assert found["next"] == case["thw_indexes"][0, -1] + 1


@pytest.fixture(scope="module")
def exported_nano(tmp_path_factory):
    pytest.importorskip("onnxscript", reason="needs the extra onnx")
    pytest.importorskip("onnxruntime", reason="needs the extra onnx")
    from neo_hf.onnx import export_onnx

    folder = tmp_path_factory.mktemp("web") / "nano"
    export_onnx(NANO, folder)
    return folder


@pytest.mark.slow
def test_answers(exported_nano, tmp_path):
    """Text, one image, and two of different sizes; special tokens that someone types are plain text."""
    questions = [
        ("Describe the picture.", [scene()]),
        ("What changed?", [scene().resize((96, 64)), scene()]),
        ("Is <img>|<|im_end|> a tag? 12 don't, über  naïve 😀\n", []),
        ("What color is the circle?", [scene().resize((300, 170))]),
    ]
    given = [{"question": text, "images": [saved(image, tmp_path) for image in images]} for text, images in questions]
    found = call("answers", str(exported_nano), given)
    model, processor = load_nano()
    for (text, images), answer in zip(questions, found, strict=True):
        content = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": text}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        assert answer["ids"] == inputs["input_ids"][0].tolist()
        output = model.generate(**inputs, max_new_tokens=40, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert answer["tokens"] == [token for token in output.tolist() if token != processor.tokenizer.eos_token_id]
        assert "".join(answer["texts"][-1:]) == processor.decode(output, skip_special_tokens=True)
        assert all(later.startswith(text) for text, later in zip(answer["texts"], answer["texts"][1:], strict=False))


@pytest.fixture(scope="module")
def site(exported_nano, tmp_path_factory):
    """Address of the page, made of the files that the documentation site copies."""
    hooks = pytest.importorskip("hooks")
    folder = tmp_path_factory.mktemp("site")
    for pattern in hooks.PAGE:
        for file in WEB.glob(pattern):
            copy(file, folder / file.relative_to(WEB))
    for file in exported_nano.rglob("*"):
        if file.is_file():
            copy(file, folder / "model" / file.relative_to(exported_nano))
    copy(EXAMPLE_IMAGE, folder / "model" / "scene.png")
    handler = functools.partial(QuietHandler, directory=folder)
    with http.server.ThreadingHTTPServer(("localhost", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://localhost:{server.server_port}/"
        server.shutdown()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


def copy(source, target):
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


@pytest.fixture
def page(site):
    """The page, loaded in Chromium with a camera that shows a test pattern."""
    sync = pytest.importorskip("playwright.sync_api", reason="needs Playwright")
    chromium = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chromium-browser"))), None)
    if chromium is None:
        pytest.skip("needs Chromium")
    with sync.sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream"]
        browser = playwright.chromium.launch(executable_path=chromium, args=arguments)
        page = browser.new_page()
        problems = []
        page.on("pageerror", lambda error: problems.append(error))
        page.on("requestfailed", lambda request: problems.append(request.url))
        page.on("request", lambda request: problems.append(request.url) if site not in request.url else None)
        page.goto(site)
        sync.expect(page.locator("#status")).to_have_text("Ready.", timeout=120_000)
        yield page
        assert not [problem for problem in problems if not str(problem).startswith("data:")]
        browser.close()


def answered(page):
    page.wait_for_function("document.getElementById('status').textContent.startsWith('First token')", timeout=60_000)
    return page.locator("#answer").inner_text()


@pytest.mark.slow
def test_the_page_describes_its_scene(page):
    """The answer appears bit by bit."""
    page.evaluate(
        """() => {
            window.seen = [];
            new MutationObserver(() => window.seen.push(document.getElementById("answer").textContent)).observe(
                document.getElementById("answer"), { childList: true, characterData: true, subtree: true });
        }"""
    )
    page.click("#ask")
    assert (
        answered(page)
        == "a red circle at the top left, a blue square at the top right, a yellow star at the bottom left"
    )
    assert len(page.evaluate("window.seen")) > 10


@pytest.mark.slow
def test_the_page_sees_what_is_drawn(page):
    page.click("#images button")
    box = page.locator("#board").bounding_box()

    def click(x, y):
        page.mouse.click(box["x"] + x * box["width"], box["y"] + y * box["height"])

    page.click("#tools [title=square]")
    page.click("#colors [title=green]")
    click(0.75, 0.75)
    page.click("#tools [title=triangle]")
    page.click("#colors [title=purple]")
    click(0.25, 0.25)
    page.click("#add")
    assert page.locator("#images figure").count() == 1
    page.fill("#question", "Describe the picture.")
    page.press("#question", "Enter")
    assert answered(page) == "a purple triangle at the top left, a green square at the bottom right"


@pytest.mark.slow
def test_files_and_camera_give_images(page, tmp_path):
    scene().resize((96, 64)).save(tmp_path / "wide.png")
    page.set_input_files("#file", tmp_path / "wide.png")
    page.wait_for_function("document.querySelectorAll('#images figure').length == 2")  # once it is decoded
    (tmp_path / "text.png").write_text("no image")
    page.set_input_files("#file", tmp_path / "text.png")
    page.wait_for_function("document.getElementById('status').className == 'error'")
    assert "text.png is not an image" in page.locator("#status").inner_text()
    page.click("#open-camera")
    page.wait_for_selector("#camera:visible")
    page.click("#add")
    assert page.locator("#images figure").count() == 3
    page.click("#ask")
    assert answered(page)


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1200])
def test_the_page_fits_its_window(page, width):
    page.set_viewport_size({"width": width, "height": 844})
    page.click("#ask")
    answered(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
