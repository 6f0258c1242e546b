"""Shared by tests: tiny models, prompts without symmetry, recorded numbers."""

import contextlib
import os
import socket
import subprocess
import sys
import textwrap
import time
import urllib.request
from pathlib import Path

import torch
from hypothesis import settings

from neo_hf import NeoConfig, NeoForConditionalGeneration

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden"
IMAGE, IMAGE_START, IMAGE_END, EOS = 501, 502, 503, 505
CASES = ["text_only", "one_image", "two_images", "adjacent_images", "video_4_frames"]


def num_examples(in_ci):
    """Number of Hypothesis examples in the active profile (conftest.py), given the number in the profile "ci"."""
    return in_ci * settings().max_examples // 100


def golden_case(golden, name):
    """The inputs of a recorded case as arguments of `forward`, and its recorded values."""
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
    """A model with random weights, norms and biases included, so that an error in any part shows."""
    torch.manual_seed(seed)
    model = NeoForConditionalGeneration._from_config(config, **kwargs).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.2)
    return model


def random_prompt(generator, images, text=3):
    """Token ids (L,) of text interleaved with images of the given token grids, and the images' patches and grids."""
    ids = torch.randint(0, 500, (text,), generator=generator).tolist()
    for rows, columns in images:
        ids += [IMAGE_START, *[IMAGE] * (rows * columns), IMAGE_END]
        ids += torch.randint(0, 500, (text,), generator=generator).tolist()
    grids = 2 * torch.tensor(images, dtype=torch.long).reshape(-1, 2)
    return torch.tensor(ids), torch.randn(int(grids.prod(-1).sum()), 768, generator=generator), grids


def batch(prompts, side="left"):
    """Pad prompts from `random_prompt` into arguments of `forward`."""
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


def image_message(*images, text="Hm?"):
    """A user's turn with images (Pillow) and text."""
    content = [{"type": "image", "image": image} for image in images]
    return {"role": "user", "content": [*content, {"type": "text", "text": text}]}


def greedy_answer(model, processor, messages, new_tokens=5, **kwargs):
    """The text that `generate()` answers with greedily."""
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", **kwargs
    )
    output = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
    return processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def dense_mask_oracle(row, length, left, packed):
    """Which keys each query sees (length, length), pair by pair; which tokens are attended; the document of each."""
    attended, document_of, image_of = [False] * left, [None] * left, [None] * left
    for document, ids in enumerate(row):
        image = None
        for i, token in enumerate(ids):
            if token == IMAGE_START:
                image = (document, i)
            attended.append(True)
            document_of.append(document if packed else 0)
            image_of.append(image if token == IMAGE else None)
    rest = length - len(attended)
    attended, document_of, image_of = attended + [False] * rest, document_of + [None] * rest, image_of + [None] * rest
    sees = torch.zeros(length, length, dtype=torch.bool)
    for q in range(length):
        for k in range(length):
            same_image = image_of[q] is not None and image_of[q] == image_of[k]
            sees[q, k] = attended[q] and attended[k] and document_of[q] == document_of[k] and (k <= q or same_image)
    # Padding may carry the number of an adjacent document.
    return sees, torch.tensor(attended), [d or 0 for d in document_of]


def run_without_package(script, *args, cache):
    """Run Python where `neo_hf` cannot be imported."""
    header = "import sys\nsys.modules['neo_hf'] = None\n"
    environment = os.environ | {"HF_HOME": str(cache), "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    return subprocess.run(
        [sys.executable, "-c", header + textwrap.dedent(script), *map(str, args)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=600,
    )


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def wait_for_server(process, port, log, seconds=240):
    """Wait until the server `process` answers, or fail with what it logged."""
    for _ in range(2 * seconds):
        time.sleep(0.5)
        if process.poll() is not None:
            break
        with contextlib.suppress(OSError), urllib.request.urlopen(f"http://localhost:{port}/health"):
            return
    raise AssertionError(log.read_text())
