"""vLLM's HTTP server with the tests of `transformers serve`, videos, and clients that misbehave."""

import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from clients.test_serving import (  # noqa: F401  (run here against vLLM)
    as_openai,
    ask,
    conversations,
    expected,
    test_server,
    test_server_survives,
    test_server_with_videos,
    text,
)
from docs.test_docs import run  # noqa: F401
from helpers import free_port, greedy_answer, wait_for_server

pytest.importorskip("vllm", reason="needs vLLM: make test-vllm")
openai = pytest.importorskip("openai")


@pytest.fixture(scope="module")
def server(hub_folder, clips, tmp_path_factory):
    """Address of vLLM's server on the folder. (The CPU build of vLLM has no `vllm serve`.)"""
    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", hub_folder, "--port", port]
    settings = ["--dtype", "float32", "--enforce-eager", "--max-model-len", 8192, "--max-num-seqs", 32]
    settings += ["--allowed-local-media-path", clips, "--trust-request-mm-kwargs"]
    log = tmp_path_factory.mktemp("vllm") / "log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [*map(str, command), *map(str, settings)],
            stdout=file,
            stderr=file,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
        )
    try:
        wait_for_server(process, port, log, seconds=600)
        yield f"http://localhost:{port}"
    finally:
        process.terminate()
        process.wait()


@pytest.fixture(scope="module")
def video_dialect():
    return "mm_processor_kwargs", Path.as_uri


@pytest.mark.parametrize(
    "settings", [{}, {"fps": 2.0}, {"num_frames": 2, "video_style": "bare"}, {"max_pixels": 8192}]
)
def test_videos(ask, real_vocabulary_model, processor, clips, settings):  # noqa: F811
    path = clips / "carphone_pristine.mp4"
    words = {"type": "text", "text": "Hm?"}
    messages = [{"role": "user", "content": [{"type": "video", "path": str(path)}, words]}]
    answer = greedy_answer(real_vocabulary_model, processor, messages, processor_kwargs=settings)
    content = [{"type": "video_url", "video_url": {"url": path.as_uri()}}, words]
    found = ask([{"role": "user", "content": content}], extra_body={"mm_processor_kwargs": settings})
    assert text(found) == answer


def test_page(run, server, hub_folder):  # noqa: F811
    """The Python of the page on serving, as printed."""
    run("docs/serving.md", **{"http://localhost:8000": server, 'model="NEO-2B"': f'model="{hub_folder}"'})


def test_settings_for_another_server_are_refused(ask, conversations):  # noqa: F811
    """vLLM would ignore them, where `transformers serve` follows them."""
    with pytest.raises(openai.BadRequestError, match="have num_frames, which vLLM takes in mm_processor_kwargs"):
        ask(as_openai(conversations[0]), extra_body={"chat_template_kwargs": {"num_frames": 3}})
    assert text(ask(as_openai(conversations[3]), extra_body={"chat_template_kwargs": {"enable_thinking": False}}))


def test_good_requests_among_bad_ones(ask, conversations, expected):  # noqa: F811
    """Malformed requests, clients that hang up and good requests at the same time."""
    requests = [as_openai(messages) for messages in conversations]
    bad = [
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]},
        {"messages": [{"role": "user", "content": [{"type": "audio_url", "audio_url": {"url": "data:,"}}]}]},
        {"messages": [{"role": "assistant", "content": "Hello!"}]},
        {"messages": requests[0], "extra_body": {"mm_processor_kwargs": {"max_pixels": -1}}},
        {"messages": requests[0], "extra_body": {"mm_processor_kwargs": {"num_frames": "many"}}},
        {"messages": [{"role": "user", "content": "word " * 9000}]},
    ]

    def fail(request):
        with pytest.raises(openai.APIStatusError) as caught:
            ask(**request)
        return caught.value.status_code

    def hang_up(_):
        stream = ask(requests[0], max_tokens=1500, stream=True)
        next(iter(stream))
        stream.close()

    with ThreadPoolExecutor(8) as pool:
        codes = pool.map(fail, bad * 2)
        hung_up = pool.map(hang_up, range(8))
        answers = pool.map(ask, requests * 6)
        assert set(codes) <= {400, 501}  # 501: there is no audio
        assert [text(answer) for answer in answers] == expected * 6
        list(hung_up)


def test_image_tokens_of_clients_are_text(ask, hub_folder, processor):  # noqa: F811
    """Token ids of images without images do no harm."""
    ids = [processor.image_start_token_id, processor.image_token_id, processor.image_end_token_id, 100]
    assert ask.client.completions.create(model=str(hub_folder), prompt=ids, max_tokens=2).choices[0].text is not None


def test_streamed_tokens_arrive_one_by_one(ask, conversations):  # noqa: F811
    start = time.monotonic()
    stream = ask(as_openai(conversations[0]), max_tokens=200, stream=True, extra_body={"ignore_eos": True})
    times = [time.monotonic() - start for _ in stream]
    assert times[len(times) // 4] < times[-1] / 2


def test_structured_output(ask, conversations):  # noqa: F811
    for limits, pattern in (({"choice": ["yes", "no"]}, "yes|no"), ({"regex": "[0-9]{3}"}, "[0-9]{3}")):
        answer = ask(as_openai(conversations[0]), max_tokens=8, extra_body={"structured_outputs": limits})
        assert re.fullmatch(pattern, text(answer))
