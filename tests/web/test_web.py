"""The page without a browser: conversations, live video, sessions, what people send, and the functions for clients."""

import base64
import dataclasses
import io
import os
import re
import shutil
import subprocess
import sys
import time

import pytest
import torch
import yaml
from helpers import ROOT, free_port, image_message
from packaging.requirements import Requirement
from PIL import Image
from world import Shape, draw

from neo_hf.loading import EXAMPLE_IMAGE, NANO

pytest.importorskip("gradio", reason="needs Gradio: make test-web, or pip install 'neo-hf[web]'")

import httpx
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError

from neo_hf.web import Page, media
from neo_hf.web.conversation import Conversation, Settings
from neo_hf.web.live import Live
from neo_hf.web.media import MAX_FILES, delete_old_files, read_uploads
from neo_hf.web.page import EXAMPLES, _escape
from neo_hf.web.sessions import Sessions

CAPTION = "a red circle at the top left, a blue square at the top right, a yellow star at the bottom left"
DIRECTION = "Which way does the red circle move?"


def environment(**variables):
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **variables}


def ask(conversation, question, *files, **settings):
    uploads = read_uploads([str(file) for file in files], "/")
    return "".join(conversation.ask(question, uploads, Settings(**settings)))


def frames():
    """Four frames of a circle that moves to the right, as `data:` URIs."""
    for number in range(4):
        file = io.BytesIO()
        image = draw((64, 64), "white", [Shape("red", "circle", 4 + 12 * number, 8), Shape("blue", "square", 8, 40)])
        image.save(file, "png")
        yield f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


@pytest.fixture
def conversation(nano):
    return Conversation(*nano, max_tokens=1024)


@pytest.mark.parametrize(
    ("label", "answer"),
    [("An image", CAPTION), ("Two images", "the yellow star became green"), ("A video", "right"), ("A number", "407")],
)
def test_examples_have_answers(conversation, label, answer):
    question, files = EXAMPLES[label]
    assert ask(conversation, question, *files) == answer


def test_turns_are_those_of_one_prompt_and_only_what_is_new_is_computed(nano, conversation):
    model, processor = nano
    before, after = EXAMPLES["Two images"][1]
    questions = ["Describe the picture.", "How many shapes are there?", "What changed?"]
    answers = [
        ask(conversation, questions[0], before),
        ask(conversation, questions[1]),
        ask(conversation, questions[2], after),
    ]
    computed = [turn.num_computed for turn in conversation.turns]

    messages = []
    images = [[Image.open(before)], [], [Image.open(after)]]
    for question, answer, shown in zip(questions, answers, images, strict=True):
        messages += [image_message(*shown, text=question), {"role": "assistant", "content": answer}]
    whole = processor.apply_chat_template(
        messages[:-1], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    ids = whole["input_ids"][0].tolist()
    assert conversation.ids[: conversation.turns[-1].answer_start] == ids
    output = model.generate(**whole, do_sample=False, max_new_tokens=64)[0, len(ids) :]
    assert processor.decode(output, skip_special_tokens=True) == answers[2]
    # Each token once; the last token of an answer goes with the next question.
    assert sum(computed) + sum(turn.stop - turn.answer_start - 1 for turn in conversation.turns[:-1]) == len(ids)
    assert computed[1] < 20 < computed[0]

    seen = conversation.inputs_before(len(ids))
    assert torch.equal(seen["pixel_values"], whole["pixel_values"])
    assert torch.equal(seen["image_grid_hw"], whole["image_grid_hw"])


def test_stopped_answer_stays(conversation):
    pieces = conversation.ask(
        "Describe the picture.", read_uploads([str(EXAMPLE_IMAGE)], EXAMPLE_IMAGE.parent), Settings()
    )
    first = next(piece for piece in pieces if piece)
    pieces.close()
    [turn] = conversation.turns
    assert turn.answer.startswith(first)
    assert len(turn.answer) < len(CAPTION)
    assert ask(conversation, "How many shapes are there?") == "3"


def test_answer_that_nobody_reads_ends_its_turn(conversation):
    conversation.ask(
        "Describe the picture.", read_uploads([str(EXAMPLE_IMAGE)], EXAMPLE_IMAGE.parent), Settings()
    ).close()
    [turn] = conversation.turns
    assert turn.answer_start < turn.stop <= len(conversation.ids)
    assert ask(conversation, "How many shapes are there?") == "3"


def test_undo_and_retry(conversation):
    ask(conversation, "Describe the picture.", EXAMPLE_IMAGE)
    ids = list(conversation.ids)
    ask(conversation, "How many shapes are there?")
    conversation.undo()
    assert conversation.ids == ids
    assert "".join(conversation.retry(Settings())) == CAPTION
    assert conversation.ids == ids
    assert ask(conversation, "How many shapes are there?") == "3"


def test_settings(conversation):
    question, files = EXAMPLES["A video"]
    ask(conversation, question, *files, num_frames=2, max_pixels=1024, max_new_tokens=1)
    turn = conversation.turns[-1]
    assert turn.images["image_grid_hw"].tolist() == [[4, 4]] * 2  # 32 x 32 pixels
    assert turn.stop - turn.answer_start == 1
    torch.manual_seed(0)
    answers = {ask(conversation, "What changed?", EXAMPLE_IMAGE, temperature=2.0, max_new_tokens=8) for _ in range(3)}
    assert len(answers) > 1


def test_question_without_room_leaves_the_conversation(nano):
    conversation = Conversation(*nano, max_tokens=64)
    answer = ask(conversation, "How many shapes are there?", EXAMPLE_IMAGE)
    before = dataclasses.replace(conversation.turns[0]), list(conversation.ids)
    with pytest.raises(ValueError, match=r"no room for this question: it has .* limit is 64"):
        ask(conversation, "What changed?", EXAMPLE_IMAGE)
    assert (conversation.turns[0], conversation.ids) == before
    assert answer == "3"


def test_live(nano):
    live = Live(*nano, max_tokens=1024)
    with pytest.raises(ValueError, match="no frame yet"):
        next(live.ask("What?", 8))
    for number, frame in enumerate(frames()):
        result = live.add_frame(frame, float(number), None, [DIRECTION])
    assert result["answers"] == ["right"]
    assert "".join(live.ask(DIRECTION, 8)) == "right"
    assert (result["frames"], result["seconds"], result["shown"]) == (4, 3.0, 4)
    assert result["bytes"] == live.num_bytes > 0
    small = live.add_frame(frame, 4.0, max_tokens=100)
    assert small["frames"] < 4
    assert small["tokens"] <= 100
    with pytest.raises(ValueError, match=r"at least 4\.0"):
        live.add_frame(frame, 1.0)


def test_question_goes_on_while_frames_arrive(nano):
    live = Live(*nano, max_tokens=1024)
    shown = list(frames())
    for number, frame in enumerate(shown):
        live.add_frame(frame, float(number))
    pieces = live.ask(DIRECTION, 8)
    first = next(pieces)
    live.add_frame(shown[0], 4.0)
    assert first + "".join(pieces) == "right"


@pytest.mark.parametrize(
    "image", ["/etc/passwd", "data:image/png;base64,AAAA", "data:image/png;base64,?", "data:text/plain,x"]
)
def test_frame_must_be_an_image(nano, image):
    live = Live(*nano, max_tokens=1024)
    with pytest.raises(ValueError, match=r"frame (must be|cannot be read)"):
        live.add_frame(image, 0.0)
    assert live.status()["tokens"] == 0


def test_places_are_limited_and_freed(nano, monkeypatch):
    sessions = Sessions(*nano, max_sessions=2, max_tokens=256, idle_seconds=600)
    first, second = sessions.get("first"), sessions.get("second")
    assert sessions.get("first") is first
    with pytest.raises(ValueError, match="All 2 places are taken"):
        sessions.get("third")
    first.used -= 100
    sessions.get("third")
    assert sessions.find("first") is None
    assert sessions.was_freed("first")
    assert not sessions.was_freed("second")
    second.used -= 1000
    with second.lock:  # an answer is being written
        sessions.free_idle()
        assert sessions.find("second") is second
    sessions.free_idle()
    assert sessions.find("second") is None
    assert len(sessions) == 1


def test_memory_stays_below_what_is_stated(nano):
    sessions = Sessions(*nano, max_sessions=1, max_tokens=1024)
    session = sessions.get("key")
    shown = list(frames())
    for number in range(60):
        session.live.add_frame(shown[number % 4], float(number))
    while len(session.conversation.ids) < 1024 - 31:
        ask(session.conversation, "Describe the picture.", EXAMPLE_IMAGE)
    assert 0.6 * sessions.max_bytes() < sessions.num_bytes() <= sessions.max_bytes()


def test_uploads_are_checked(tmp_path, monkeypatch):
    damaged, text, large, movie = (tmp_path / name for name in ("a.png", "b.txt", "c.png", "d.mp4"))
    damaged.write_bytes(EXAMPLE_IMAGE.read_bytes()[:300])
    text.write_text("hello")
    movie.write_bytes(b"hello")
    large.touch()
    os.truncate(large, 100_000_000)
    for file, message in (
        (damaged, "a.png cannot be read as an image"),
        (text, "b.txt is neither an image nor a video: its type is text/plain"),
        (large, "c.png has 95 MB; the limit is 64 MB"),
        (movie, "d.mp4 cannot be read as a video"),
        (tmp_path / "e.png", "e.png is no longer here"),
        (EXAMPLE_IMAGE, "scene.png was not uploaded"),
    ):
        with pytest.raises(ValueError, match=message):
            read_uploads([str(file)], tmp_path)
    with pytest.raises(ValueError, match=f"up to {MAX_FILES} files, got 17"):
        read_uploads([str(EXAMPLE_IMAGE)] * 17, tmp_path)
    monkeypatch.setattr(media, "MAX_PIXELS", 10_000)
    with pytest.raises(ValueError, match="of a question can have up to"):
        read_uploads([str(EXAMPLE_IMAGE)] * 3, "/")
    Image.new("1", (10_000, 10_000)).save(damaged)
    with pytest.raises(ValueError, match="10000 x 10000 pixels; the limit is 50 megapixels"):
        read_uploads([str(damaged)], tmp_path)


def test_webp_is_an_image_on_any_system(tmp_path):
    file = tmp_path / "photo.webp"
    Image.new("RGB", (64, 64)).save(file)
    script = """if True:
        import mimetypes, sys
        mimetypes.knownfiles.clear()
        from neo_hf.web.media import read_uploads
        print(read_uploads(sys.argv[1:], "/"))
        """
    output = subprocess.check_output([sys.executable, "-c", script, file], env=environment(), text=True)
    assert "photo.webp" in output


def test_old_files_are_deleted(tmp_path):
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    old = time.time() - 100
    os.utime(tmp_path / "old" / "file", (old, old))
    os.utime(tmp_path / "old", (old, old))
    delete_old_files(tmp_path, 50)
    delete_old_files(tmp_path, 0.0)
    assert not list(tmp_path.rglob("file"))


def test_client_asks(page):
    client = Client(page.url, verbose=False)
    arguments = {"api_name": "/ask", "question": "Describe the picture.", "files": [handle_file(EXAMPLE_IMAGE)]}
    job = client.submit(**arguments)
    assert job.result(60) == CAPTION
    assert all(CAPTION.startswith(piece) for piece in job.outputs())
    assert client.predict(api_name="/ask", question="How many shapes are there?", files=[]) == "3"
    other = Client(page.url, verbose=False)
    assert other.predict(**{**arguments, "question": "What color is the shape at the top left?"}) == "red"
    assert client.predict(api_name="/start_over") == "ok"


def test_client_shows_live_video(page):
    client = Client(page.url, verbose=False)
    for number, frame in enumerate(frames()):
        status = client.predict(api_name="/show_frame", image=frame, timestamp=number, questions=[DIRECTION])
    assert status["answers"] == ["right"]
    assert client.predict(api_name="/ask_live", question=DIRECTION) == "right"
    with pytest.raises(AppError, match="at least 3"):
        client.predict(api_name="/show_frame", image=frame, timestamp=1.0)


def test_documented_calls(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copy(EXAMPLE_IMAGE, "scene.png")
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "web.md").read_text(), flags=re.DOTALL):
        block = block.replace("http://127.0.0.1:7860", page.url).replace(
            "server_port=7861", "prevent_thread_lock=True"
        )
        exec(compile(block, "docs/web.md", "exec"), names)
    names["page"].blocks.close()
    assert "['3'] " in capsys.readouterr().out


def test_space_runs_as_pushed(tmp_path):
    for file in (ROOT / "spaces").iterdir():
        shutil.copy(file, tmp_path)
    header = yaml.safe_load((tmp_path / "README.md").read_text().split("---")[1])
    assert header["sdk"] == "gradio"
    assert f"gradio=={header['sdk_version']}" in (ROOT / "constraints-web.txt").read_text().splitlines()
    assert Requirement((tmp_path / "requirements.txt").read_text()).extras == {"web"}
    command = [sys.executable, "-u", header["app_file"]]
    with subprocess.Popen(command, cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, text=True) as space:
        try:
            url = next(found[0] for line in space.stdout if (found := re.search(r"http://\S+", line)))
            files = [handle_file(EXAMPLE_IMAGE)]
            answer = Client(url, verbose=False).predict(question="Describe the picture.", files=files, api_name="/ask")
        finally:
            space.terminate()
    assert answer == CAPTION


def test_command(tmp_path):
    other, uploads = tmp_path / "other", tmp_path / "uploads"
    shutil.copytree(NANO, other)
    uploads.mkdir()
    command = [sys.executable, "-u", "-m", "neo_hf_cli", "web", "nano", "--compare", other, "--port", str(free_port())]
    variables = environment(NEO_WEB_AUTH="me:a:secret", TMPDIR=str(uploads))
    with subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, text=True) as server:
        try:
            url = next(found[0] for line in server.stdout if (found := re.search(r"http://\S+", line)))
            assert httpx.get(f"{url}/config").status_code == 401
            client = Client(url, auth=("me", "a:secret"), verbose=False)
            files = [handle_file(EXAMPLE_IMAGE)]
            assert client.predict(question="Describe the picture.", files=files, api_name="/ask") == CAPTION
            assert list(uploads.rglob("scene.png"))
        finally:
            server.terminate()
    assert not list(uploads.rglob("scene.png"))


def test_no_file_of_the_server_can_be_read(page, tmp_path):
    secret = tmp_path / "secret.png"
    Image.new("RGB", (64, 64)).save(secret)
    for path in (str(secret), "/etc/passwd"):
        assert httpx.get(f"{page.url}gradio_api/file={path}").status_code in (403, 404)
        for stolen in ({"path": path, "meta": {"_type": "gradio.FileData"}}, {"path": path}):
            data = ["What?", [stolen], None, None, 0, 1, 8]
            call = httpx.post(f"{page.url}gradio_api/call/ask", json={"data": data}).json()
            result = httpx.get(f"{page.url}gradio_api/call/ask/{call['event_id']}", timeout=30).text
            assert "event: error" in result
    assert "was not uploaded" in result
    processor = page.sessions.processor
    for image in (str(secret), "http://127.0.0.1/image.png"):
        with pytest.raises(ValueError, match="allowed_media permits data"):
            processor(images=image, text="<image>")


def test_large_upload_is_refused(page):
    answer = httpx.post(f"{page.url}gradio_api/upload", files={"files": ("big.png", bytes(100_000_000))}, timeout=60)
    assert answer.status_code == 413


def test_password_covers_frames(nano):
    page = Page({"nano": nano})
    _, url, _ = page.launch(prevent_thread_lock=True, quiet=True, auth=("me", "secret"))
    try:
        for path in ("config", "gradio_api/info"):
            assert httpx.get(f"{url}{path}").status_code == 401
        call = {"data": "key", "fn_name": "get_status", "component_id": 1, "session_hash": "x"}
        assert httpx.post(f"{url}gradio_api/component_server", json=call).status_code == 401
    finally:
        page.blocks.close()


@pytest.mark.parametrize(
    ("typed", "markdown"),
    [
        ("`a < b` < c", "`a < b` &lt; c"),
        ("```\n<b>\n``` <b>", "```\n<b>\n``` &lt;b&gt;"),
        ("`<b>`` & &lt;", "`&lt;b&gt;`` &amp; &amp;lt;"),  # no code: Markdown wants as many backticks after it
    ],
)
def test_html_is_text_outside_of_code(typed, markdown):
    assert _escape(typed) == markdown
