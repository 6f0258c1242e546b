import contextlib
import copy
import io
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest
import torch
from helpers import GOLDEN, image_message

from neo_hf import __version__, loading
from neo_hf.cache_neo import CACHE_NAME
from neo_hf.image_processing_neo import load_image
from neo_hf.loading import NANO, load_model_and_processor
from neo_hf_cli import main, prompts
from neo_hf_cli.conversation import Conversation

IMAGE = str(GOLDEN / "preprocess" / "images" / "00_RGB_300x200.png")
RAW = GOLDEN / "neo_tiny" / "raw"


@pytest.fixture(scope="module")
def folder(hub_folder):
    return str(hub_folder)


def run(*argv):
    with pytest.raises(SystemExit) as stop:
        main([*argv])
    return stop.value.code


def answer(folder, *turns, images=()):
    """What `generate` answers to the last of turns that alternate between user and assistant."""
    model, processor = load_model_and_processor(folder)
    messages = [
        {"role": ("user", "assistant")[i % 2], "content": [{"type": "text", "text": text}]}
        for i, text in enumerate(turns)
    ]
    messages[0]["content"] = [*({"type": "image", "path": path} for path in images), *messages[0]["content"]]
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    output = model.generate(**inputs, max_new_tokens=4)[0, inputs["input_ids"].shape[1] :]
    return processor.decode(output, skip_special_tokens=True)


def test_question(folder, capsys):
    assert run("chat", folder, "--image", IMAGE, "--image", IMAGE, "Same?", "--max-new-tokens", "4") == 0
    assert capsys.readouterr().out.strip() == answer(folder, "Same?", images=[IMAGE, IMAGE]).strip()


def test_conversation_over_a_pipe(folder, capsys, monkeypatch):
    lines = [
        "Hello",
        "",
        "  ",
        "/nothing",
        "/image none.png",
        "And now?",
        "/clear",
        f"/image '{IMAGE}'",
        "Hello",
        "/exit",
    ]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join([*lines, "not read"])))
    assert run("chat", folder, "--max-new-tokens", "4") == 0
    first = answer(folder, "Hello")
    second = answer(folder, "Hello", first, "And now?")
    third = answer(folder, "Hello", images=[IMAGE])
    out, err = capsys.readouterr()
    assert [line.strip() for line in out.splitlines()] == [first.strip(), second.strip(), third.strip()]
    assert "error: there is no command /nothing." in err
    assert "error: Cannot read the image none.png" in err


@pytest.mark.parametrize("forwards", [0, 2])
def test_what_an_interrupt_leaves(folder, forwards):
    """The part of an answer stays; a question without any is forgotten, and its image goes with the next one."""
    model, processor = load_model_and_processor(folder)
    image = {"type": "image", "image": load_image(IMAGE)}
    conversation = Conversation(model, processor, "", [image], {}, max_new_tokens=4)
    remaining = iter(range(forwards))

    def interrupt(*args):
        if next(remaining, None) is None:
            raise KeyboardInterrupt

    # Within a step: the first layer has cached a token that the others have not.
    handle = model.model.language_model.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        conversation.ask("Hello")
    handle.remove()
    if forwards == 0:
        assert (conversation.ids, conversation.media) == ([], [image])
        conversation.ask("Hello")
    assert conversation.media == []
    messages = [{"role": "system", "content": ""}, image_message(image["image"], text="Hello")]
    prompt = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    length = prompt["input_ids"].shape[1]
    written = model.generate(**prompt, max_new_tokens=forwards or 4)[0].tolist()
    assert conversation.ids[: len(written)] == written

    computed = []
    model.register_forward_pre_hook(lambda _, args, inputs: computed.append(inputs["input_ids"]), with_kwargs=True)
    conversation.ask("And now?")
    assert computed[0].shape[1] < length  # the image is not computed again
    asked = torch.tensor([conversation.ids[: len(written) - 1 + computed[0].shape[1]]])
    images = {name: prompt[name] for name in ("pixel_values", "image_grid_hw")}
    whole = model.generate(asked, attention_mask=torch.ones_like(asked), **images, max_new_tokens=4)[0].tolist()
    assert conversation.ids[: len(whole)] == whole


def test_an_interrupt_is_not_lost(folder):
    """Nor where an exception would be: the token is finished, nothing after it is written."""
    model, processor = load_model_and_processor(folder)
    conversation = Conversation(model, processor, "", [], {}, max_new_tokens=8)
    lengths = []

    def press(*args):
        lengths.append(len(conversation.ids))
        if len(lengths) == 3:
            with contextlib.suppress(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)

    model.model.language_model.layers[1].register_forward_pre_hook(press)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        conversation.ask("Hello")
    assert len(lengths) == 3
    assert len(conversation.ids) == lengths[0] + 3 + 1  # the end of the turn
    assert signal.getsignal(signal.SIGINT) is before


def test_example_image(capsys):
    """The first command of the README, whose answer NEO-nano knows."""
    assert run("chat", "nano", "--image", "example", "Describe the picture.") == 0
    expected = "a red circle at the top left, a blue square at the top right, a yellow star at the bottom left\n"
    assert capsys.readouterr().out == expected


@pytest.mark.parametrize("argv", [["--help"], ["--version"], ["chat", "--help"], ["convert"]])
def test_answers_without_torch(argv):
    """Help and usage errors come before the imports that take seconds."""
    script = """
        import sys, neo_hf_cli
        try:
            neo_hf_cli.main()
        finally:
            assert not {"torch", "transformers", "neo_hf"} & set(sys.modules)
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(script), *argv], capture_output=True, text=True)
    assert "Usage" in run.stdout + run.stderr or __version__ in run.stdout
    assert "AssertionError" not in run.stderr


def cached_layers(model):
    """Keys and values of a token in all layers."""
    cache = model(input_ids=torch.tensor([[9]]), use_cache=True)[CACHE_NAME]
    return [x for layer in cache.layers for x in (layer.keys, layer.values)]


def test_info(folder, capsys):
    assert run("info", folder, "--image", IMAGE) == 0
    out = capsys.readouterr().out
    model, _ = load_model_and_processor(folder)
    assert f"parameters        {model.num_parameters():,}\n" in out
    assert "pre-Buffer, layers 0 to 0" in out
    assert "post-LLM, layers 1 to 2" in out
    assert "4,096 to 65,536 pixels, 32 x 32 per visual token" in out
    cache = sum(x.shape[1] * x.shape[3] for x in cached_layers(model)) * 4 / 1e3
    assert f"{cache:.1f} kB per token in the cache, in torch.float32" in out
    assert "200 x 300 pixels (height x width), seen as 192 x 288: 54 visual tokens" in out


@pytest.mark.parametrize(
    ("stored", "has_instructions", "expected"),
    [
        (torch.bfloat16, True, torch.bfloat16),
        (torch.bfloat16, False, torch.float32),
        (torch.float16, True, torch.float32),
    ],
)
def test_dtype_on_a_cpu(
    stored, has_instructions, expected, real_vocabulary_model, processor, tmp_path, monkeypatch, capsys
):
    """What is slow on a CPU runs in float32, and `info` says so."""
    monkeypatch.setattr(loading, "multiplies_bfloat16", lambda: has_instructions)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    copy.deepcopy(real_vocabulary_model).to(stored).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    found, _ = prompts.load(str(tmp_path))
    assert found.dtype == expected
    assert run("info", str(tmp_path)) == 0
    out = capsys.readouterr().out
    assert f"runs here in      {expected}" in out
    assert ("no fast products of" in out) == (stored != expected)


def test_info_of_a_raw_checkpoint(capsys):
    assert run("info", str(RAW)) == 0
    assert "pre-Buffer depth unknown" in capsys.readouterr().out


def test_nano_is_a_folder_where_there_is_one(folder, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nano").mkdir()  # no model
    assert run("info", "nano") == 0
    assert f"model             {NANO}\n" in capsys.readouterr().out
    shutil.copytree(folder, tmp_path / "nano", dirs_exist_ok=True)
    assert run("info", "nano") == 0
    assert "model             nano\n" in capsys.readouterr().out


def test_raw_checkpoint_with_tokenizer(tmp_path, tokenizer):
    """Ids that the raw configuration does not give come from the tokenizer."""
    for file in RAW.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tokenizer.save_pretrained(tmp_path)
    model, processor = load_model_and_processor(tmp_path, dtype=torch.float32)
    assert model.config.image_token_id == processor.image_token_id == 151669
    assert processor.image_processor.max_pixels == 4194304


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["chat", str(RAW), "--image", "missing.png", "?"], 1, "Cannot read the image missing.png"),
        (["chat", str(RAW), "?"], 1, "needs a tokenizer"),
        (["chat"], 2, "MODEL"),
        (["info", "--nix"], 2, "--nix"),
    ],
)
def test_errors(capsys, argv, code, message):
    assert run(*argv) == code
    assert message in capsys.readouterr().err


def test_version(capsys):
    assert run("--version") == 0
    assert capsys.readouterr().out == f"neo-hf {__version__}\n"


class UnavailableHub(BaseHTTPRequestHandler):
    """Answers as a Hub that is down, and counts what is asked about the model."""

    requests = 0

    def do_HEAD(self):
        type(self).requests += "someone/neo" in self.path
        self.send_error(503)

    do_GET = do_HEAD

    def log_message(self, *args):
        pass


@pytest.mark.parametrize("command", [["info", "someone/neo"], ["convert", "someone/neo", "out"]])
def test_unknown_model_is_refused_without_retries(command, tmp_path):
    UnavailableHub.requests = 0
    with HTTPServer(("127.0.0.1", 0), UnavailableHub) as hub:
        Thread(target=hub.serve_forever, daemon=True).start()
        run = subprocess.run(
            [sys.executable, "-m", "neo_hf_cli", *command],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=os.environ
            | {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"},
            timeout=300,
        )
        hub.shutdown()
    assert run.returncode == 1
    assert "neo-hf: error: 'someone/neo' is neither a folder nor a cached model" in run.stderr
    assert UnavailableHub.requests == 1


def test_video(folder, capsys, clips):
    clip = str(clips / "carphone_pristine.mp4")
    options = ["--frames", "2", "--start", "1", "--end", "3", "--max-new-tokens", "4"]
    assert run("chat", folder, "--video", clip, "Hm?", *options) == 0
    model, processor = load_model_and_processor(folder)
    content = [{"type": "video", "path": clip}, {"type": "text", "text": "Hm?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"num_frames": 2, "start": 1.0, "end": 3.0},
    )
    output = model.generate(**inputs, max_new_tokens=4)[0, inputs["input_ids"].shape[1] :]
    assert capsys.readouterr().out.strip() == processor.decode(output, skip_special_tokens=True).strip()


def test_watch(folder, capsys, clips):
    clip = str(clips / "carphone_pristine.mp4")
    assert run("watch", folder, "Hm?", "--video", clip, "--every", "1.5", "--max-new-tokens", "3") == 0
    lines = capsys.readouterr().out
    assert "[00:00.00] " in lines
    assert "[00:01.47] " in lines
    assert lines.count(" tokens in the cache\n") == 2


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["chat", "--video", "none.mp4", "Hm?"], "none.mp4: there is no such file"),
        (["watch", "--video", "none.mp4", "--every", "1", "Hm?"], "none.mp4: there is no such file"),
    ],
)
def test_bad_video(capsys, argv, message):
    assert run(argv[0], "no/such/model", *argv[1:]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--auth", "me"], "--auth must be USER:PASSWORD"),
        (["--compare", "nano"], "--compare needs a model of another name"),
    ],
)
def test_web_checks_its_options_first(options, message, capsys):
    assert run("web", "nano", *options) == 1
    assert message in capsys.readouterr().err
