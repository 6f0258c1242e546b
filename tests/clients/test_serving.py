"""`pipeline`, `transformers serve` with the openai client and `transformers chat` give what `generate()` gives."""

import base64
import io
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from helpers import greedy_answer, image_message
from transformers import pipeline


@pytest.fixture(scope="module")
def conversations(photographs):
    first, second = photographs
    answer = {"role": "assistant", "content": [{"type": "text", "text": "A flower."}]}
    return [
        [image_message(first, text="What is this?")],
        [image_message(second, first, text="What differs?")],
        [image_message(first), answer, image_message(second, text="And this?")],
        [image_message(text="Hello!")],
    ]


@pytest.fixture(scope="module")
def expected(real_vocabulary_model, processor, conversations):
    return [greedy_answer(real_vocabulary_model, processor, messages) for messages in conversations]


@pytest.fixture(scope="module")
def pipe(hub_folder):
    return pipeline("image-text-to-text", model=str(hub_folder), trust_remote_code=True)


GREEDY = {"max_new_tokens": 5, "do_sample": False}


def test_pipeline(pipe, conversations, expected):
    for messages, answer in zip(conversations, expected, strict=True):
        found = pipe(text=messages, return_full_text=False, generate_kwargs=GREEDY)
        assert [found[0]["generated_text"]] == [answer]
    # Pipelines cannot batch samples with images and without.
    batch = pipe(text=conversations[:3], return_full_text=False, batch_size=3, generate_kwargs=GREEDY)
    assert [answers[0]["generated_text"] for answers in batch] == expected[:3]


def test_pipeline_of_plain_prompts(pipe, real_vocabulary_model, processor, photographs):
    prompts = ["<image>\nWhat", "<image><image>\nWhat else"]
    images = [photographs[:1], photographs]
    found = pipe(images=images, text=prompts, batch_size=2, generate_kwargs=GREEDY, return_full_text=False)
    inputs = processor(images=images, text=prompts, return_tensors="pt")
    output = real_vocabulary_model.generate(**inputs, **GREEDY)[:, inputs["input_ids"].shape[1] :]
    assert [answer["generated_text"] for answer in found] == processor.batch_decode(output, skip_special_tokens=True)


def test_pipeline_of_videos(pipe, real_vocabulary_model, processor, clips):
    content = [{"type": "video", "path": str(clips / "carphone_pristine.mp4")}, {"type": "text", "text": "Hm?"}]
    messages = [{"role": "user", "content": content}]
    for settings in ({}, {"num_frames": 3}):
        found = pipe(text=messages, return_full_text=False, generate_kwargs=GREEDY, **settings)
        answer = greedy_answer(real_vocabulary_model, processor, messages, processor_kwargs=settings)
        assert found[0]["generated_text"] == answer


def test_pipeline_continues_an_answer(pipe, real_vocabulary_model, processor, photographs):
    messages = [image_message(photographs[0]), {"role": "assistant", "content": [{"type": "text", "text": "It is"}]}]
    found = pipe(text=messages, return_full_text=False, generate_kwargs=GREEDY)
    prompt = "<|im_start|>user\n<image>\nHm?<|im_end|>\n<|im_start|>assistant\nIt is"
    inputs = processor(images=photographs[:1], text=prompt, return_tensors="pt")
    output = real_vocabulary_model.generate(**inputs, **GREEDY)[0, inputs["input_ids"].shape[1] :]
    assert found[0]["generated_text"] == processor.decode(output, skip_special_tokens=True)


def as_url(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return {"url": "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()}


def as_openai(messages):
    """The same messages, with images as the OpenAI API carries them."""

    def part(p):
        return {"type": "image_url", "image_url": as_url(p["image"])} if p["type"] == "image" else p

    return [message | {"content": [part(p) for p in message["content"]]} for message in messages]


@pytest.fixture(scope="module")
def ask(server, hub_folder):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{server}/v1", api_key="none", timeout=120)

    def ask(messages, max_tokens=5, **kwargs):
        return client.chat.completions.create(
            model=str(hub_folder), messages=messages, max_tokens=max_tokens, temperature=0, **kwargs
        )

    ask.client = client
    return ask


def text(completion):
    return completion.choices[0].message.content


def test_server(ask, hub_folder, conversations, expected):
    requests = [as_openai(messages) for messages in conversations]
    assert [text(ask(messages)) for messages in requests] == expected
    streams = [ask(messages, stream=True) for messages in requests]
    assert ["".join(chunk.choices[0].delta.content or "" for chunk in stream) for stream in streams] == expected
    with ThreadPoolExecutor(4) as pool:
        assert [text(answer) for answer in pool.map(ask, requests * 2)] == expected * 2
    # What is listed depends on the version: the models of the cache, or those that are loaded.
    assert {model.id for model in ask.client.models.list().data} <= {str(hub_folder)}


@pytest.fixture(scope="module")
def video_dialect():
    """Where the two servers differ: the field for settings of the processor, and what a local file is called."""
    return "chat_template_kwargs", str


def test_server_with_videos(ask, video_dialect, real_vocabulary_model, processor, clips):
    settings_field, name_of = video_dialect
    path = clips / "carphone_pristine.mp4"
    words = {"type": "text", "text": "Hm?"}
    messages = [{"role": "user", "content": [{"type": "video", "path": str(path)}, words]}]
    answer = greedy_answer(real_vocabulary_model, processor, messages, processor_kwargs={"num_frames": 3})
    for url in (name_of(path), f"data:video/mp4;base64,{base64.b64encode(path.read_bytes()).decode()}"):
        content = [{"type": "video_url", "video_url": {"url": url}}, words]
        found = ask([{"role": "user", "content": content}], extra_body={settings_field: {"num_frames": 3}})
        assert text(found) == answer


def test_server_survives(ask, conversations, expected):
    """A wrong request is an error, a client that hangs up is forgotten, and both leave the server as it was."""
    openai = pytest.importorskip("openai")
    broken = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    with pytest.raises(openai.APIStatusError):
        ask([{"role": "user", "content": [broken]}])
    with pytest.raises(openai.APIStatusError):
        ask([{"role": "assistant", "content": "Hello!"}])
    assert text(ask([{"role": "user", "content": "<image> What is this?"}]))  # typed: text, not a placeholder
    request = as_openai(conversations[0])
    assert text(ask(request)) == expected[0]

    stream = ask(request, max_tokens=4000, stream=True)
    next(iter(stream))
    stream.close()
    start = time.monotonic()
    assert text(ask(request)) == expected[0]
    assert time.monotonic() - start < 30  # 4,000 tokens take minutes


def test_chat_command(server, hub_folder, tmp_path):
    command = [Path(sys.executable).with_name("transformers"), "chat", hub_folder, server, "max_new_tokens=3"]
    run = subprocess.run(
        [*map(str, command), "--save-folder", str(tmp_path)],
        input="Hello!\nn\n!exit\n",
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"HF_HUB_OFFLINE": "0"},  # offline, it asks no server at all
    )
    assert run.returncode == 0, run.stderr
    assert "3 tokens in" in run.stdout
