"""A self-test of under a second: a tiny NEO with fixed weights must reproduce its recorded answers.

It covers what a release of transformers can break without an error: how `generate()` carries indices, masks, images
and the cache from step to step. On an untested version of transformers, `from_pretrained` runs it before loading
anything.
"""

from .cache_neo import CACHE_NAME, NeoCache
from .configuration_neo import NEWEST_TESTED, NeoConfig

import hashlib
import platform
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path

import numpy as np
import torch
import transformers
from huggingface_hub import constants
from packaging.version import parse as parse_version
from transformers.utils import logging

logger = logging.get_logger(__name__)

SEED = 72
IMAGE, IMAGE_START, IMAGE_END = 1, 2, 3
TOLERANCE = 1e-3
LOGITS_OF = [20, 40]  # token ids
# Token ids of each prompt, with the token grids (rows, columns) of its images. Prompts of unequal length, so that a
# batch is padded; images of unequal size, none square.
PROMPTS: list[list[int | tuple[int, int]]] = [
    [11, 12, (2, 3), 13, (3, 1), 14, 15, 16],
    [17, (1, 4), 18, 19],
    [20, 21, 22, 23],
]
# Logits of LOGITS_OF at each position of the first prompt, and answers to all prompts: greedy, and by beam search.
# fmt: off
RECORDED_LOGITS = [
    [1.267, -0.943], [1.774, -2.402], [1.747, -2.496], [-0.372, 2.559], [0.727, 0.877], [-0.707, 0.554],
    [1.658, -3.691], [0.966, -3.376], [-2.881, 1.779], [-0.331, 2.538], [1.069, -2.263], [0.045, -2.294],
    [-0.162, 1.888], [0.597, -1.461], [-0.84, -0.688], [-0.514, 0.269], [-1.441, 0.674], [-1.236, 0.905],
    [1.443, -0.043],
]
RECORDED_TOKENS = [
    [35, 63, 18, 54, 49, 14, 7, 34, 34, 34, 21, 18, 48, 12, 34, 21, 4, 63],
    [13, 24, 26, 14, 11, 39, 21, 34, 21, 26, 26, 11, 39, 21, 35, 60, 29, 5],
    [4, 20, 12, 22, 26, 63, 22, 4, 26, 33, 12, 22, 31, 52, 52, 25, 45, 12],
]
RECORDED_BEAMS = [
    [34, 12, 34, 21, 34, 21, 35, 60],
    [38, 26, 50, 12, 11, 23, 21, 26],
    [4, 26, 20, 12, 22, 26, 63, 22],
]
# fmt: on


def build_model(model_class, device: str = "cpu", attn_implementation: str | None = None):
    """The tiny model in float32. Its weights come from NumPy's frozen generator, independent of the torch version."""
    config = NeoConfig(
        text_config={
            "vocab_size": 64,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "num_pre_buffer_layers": 1,
            "eos_token_id": None,
        },
        vision_config={"hidden_size": 16, "patch_size": 4},
        image_token_id=IMAGE,
        image_start_token_id=IMAGE_START,
        image_end_token_id=IMAGE_END,
        tie_word_embeddings=False,
        attn_implementation=attn_implementation,
    )
    with torch.device("meta"):
        model = model_class(config)
    generator = np.random.RandomState(SEED)
    weights = {}
    for name, tensor in sorted(model.state_dict().items()):
        scale = 0.3 if tensor.ndim < 2 else 1.5 * tensor[0].numel() ** -0.5
        values = generator.standard_normal(tuple(tensor.shape)) * scale + ("norm" in name)
        weights[name] = torch.from_numpy(values.astype(np.float32))
    weights["lm_head.weight"][: IMAGE_END + 1] = 0  # it generates text only
    model.load_state_dict(weights, assign=True)
    return model.to(device).eval()


def prompt_inputs(rows: range, device: str = "cpu") -> dict[str, torch.Tensor]:
    """Prompts as arguments of `forward`, left-padded into one batch."""
    ids: list[list[int]] = []
    grids: list[tuple[int, int]] = []
    for row in rows:
        ids.append([])
        for part in PROMPTS[row]:
            if isinstance(part, int):
                ids[-1].append(part)
            else:
                ids[-1] += [IMAGE_START, *[IMAGE] * (part[0] * part[1]), IMAGE_END]
                grids.append(part)
    length = max(map(len, ids))
    inputs = {
        "input_ids": torch.tensor([[0] * (length - len(row)) + row for row in ids]),
        "attention_mask": torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in ids]),
    }
    if grids:
        sizes = [4 * rows * columns for rows, columns in grids]
        # One random stream per size, so that an image is the same in any batch.
        pixels = [np.random.RandomState(size).standard_normal((size, 48)).astype(np.float32) for size in sizes]
        inputs["pixel_values"] = torch.from_numpy(np.concatenate(pixels))
        inputs["image_grid_hw"] = 2 * torch.tensor(grids)
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def _check_prefill(model, device: str):
    logits = model(**prompt_inputs(range(1), device)).logits[0, :, LOGITS_OF].cpu()
    _require_close(logits, torch.tensor(RECORDED_LOGITS))


def _check_padding(model, device: str):
    inputs = prompt_inputs(range(len(PROMPTS)), device)
    together = model(**inputs).logits.cpu()
    for row in range(len(PROMPTS)):
        alone = model(**prompt_inputs(range(row, row + 1), device)).logits[0].cpu()
        _require_close(together[row, -len(alone) :], alone)


def _check_cached_steps(model, device: str):
    tokens, cache = RECORDED_TOKENS[0], NeoCache(model.config.text_config)
    said = [model(**prompt_inputs(range(1), device), past_key_values=cache, use_cache=True)]
    for token in tokens[:-1]:
        step = torch.tensor([[token]], device=device)
        said.append(model(input_ids=step, past_key_values=cache, use_cache=True))
    _require_equal([int(output.logits[0, -1].argmax()) for output in said], tokens)


def _check_continued_cache(model, device: str):
    inputs, cache = prompt_inputs(range(1), device), NeoCache(model.config.text_config)
    cut = inputs["input_ids"][0].tolist().index(IMAGE_END) + 1  # after the first image
    first = {"input_ids": inputs["input_ids"][:, :cut], "image_grid_hw": inputs["image_grid_hw"][:1]}
    first["pixel_values"] = inputs["pixel_values"][: int(first["image_grid_hw"].prod())]
    model(**first, past_key_values=cache, use_cache=True)
    _require_equal(_generate(model, inputs, **{CACHE_NAME: cache}), RECORDED_TOKENS[:1])


def _check_generate(model, device: str):
    _require_equal(_generate(model, prompt_inputs(range(len(PROMPTS)), device)), RECORDED_TOKENS)


def _check_static_cache(model, device: str):
    inputs = prompt_inputs(range(len(PROMPTS)), device)
    # Compiled, it would take a minute.
    tokens = _generate(model, inputs, cache_implementation="static", disable_compile=True, max_new_tokens=8)
    _require_equal(tokens, [row[:8] for row in RECORDED_TOKENS])


def _check_beams(model, device: str):
    inputs = prompt_inputs(range(len(PROMPTS)), device)
    _require_equal(_generate(model, inputs, num_beams=4, max_new_tokens=8), RECORDED_BEAMS)


PARTS: dict[str, Callable] = {
    "a prompt with images": _check_prefill,
    "a batch with padding": _check_padding,
    "decoding step by step": _check_cached_steps,
    "a second turn on a cache": _check_continued_cache,
    "generate()": _check_generate,
    "generate() with a static cache": _check_static_cache,
    "generate() with beams": _check_beams,
}


def _generate(model, inputs: dict[str, torch.Tensor], **kwargs) -> list[list[int]]:
    settings = {"max_new_tokens": len(RECORDED_TOKENS[0]), "do_sample": False, "pad_token_id": 0} | kwargs
    output = model.generate(**inputs, synced_gpus=False, **settings)
    return output[:, inputs["input_ids"].shape[1] :].tolist()


def _require_close(logits: torch.Tensor, expected: torch.Tensor):
    difference = float((logits - expected).abs().max())
    if not difference <= TOLERANCE:  # also refuses NaN
        raise AssertionError(f"logits are off by up to {difference:.2g}, {TOLERANCE:g} is allowed")


def _require_equal(tokens: list, expected: list):
    if tokens != expected:
        raise AssertionError(f"generated {tokens}, expected {expected}")


@torch.no_grad()
def self_test(model_class, device: str = "cpu", attn_implementation: str | None = None) -> dict[str, str]:
    """
    Run all parts of the self-test.

    Args:
        model_class: `NeoForConditionalGeneration`.
        device: where to run, in float32.
        attn_implementation: as in `from_pretrained`.

    Returns:
        The reason of each failure, by name of the part; empty if all parts passed.
    """
    failures = {}
    with torch.autocast(torch.device(device).type, enabled=False):
        for name, check in PARTS.items():
            try:
                check(build_model(model_class, device, attn_implementation), device)
            except Exception as error:  # an unknown version of transformers may raise anything
                failures[name] = str(error) if type(error) is AssertionError else f"{type(error).__name__}: {error}"
    return failures


@cache
def check_transformers(model_class):
    """
    If transformers is newer than `NEWEST_TESTED`, warn, and run the self-test unless it passed before in this
    environment (an empty file in the Hugging Face cache folder records this).

    Raises:
        ImportError: the self-test failed.
    """
    if parse_version(transformers.__version__).release[:2] <= NEWEST_TESTED:
        return
    newest = ".".join(map(str, NEWEST_TESTED))
    pin = f'pip install "transformers<{NEWEST_TESTED[0]}.{NEWEST_TESTED[1] + 1}"'
    versions = f"transformers {transformers.__version__} and torch {torch.__version__}"
    marker = _marker()
    if not _exists(marker):
        failures = self_test(model_class)
        if failures:
            raise ImportError(
                f"NEO does not work with {versions}: its self-test fails, so answers would be wrong. It was tested "
                f"with transformers up to {newest}: {pin}, or look for a newer NEO.\n"
                + "\n".join(f"- {name}: {reason}" for name, reason in failures.items())
            )
        with suppress(OSError):  # the cache folder may not be writable
            marker.parent.mkdir(parents=True, exist_ok=True)
            marker.touch()
    logger.warning(
        f"NEO was tested with transformers up to {newest}, this is {transformers.__version__}. Its self-test passes "
        f"here. `neo-hf doctor` tells more; {pin} gives a version that was tested."
    )


def _marker() -> Path:
    what = f"transformers-{transformers.__version__}-torch-{torch.__version__}"
    code = hashlib.sha256(f"{platform.python_version()} {platform.platform()}".encode())
    for file in sorted(Path(__file__).parent.glob("*_neo.py")):
        code.update(file.read_bytes())
    return Path(constants.HF_HOME) / "neo-hf" / f"self-test-passed-{what}-{code.hexdigest()[:16]}"


def _exists(path: Path) -> bool:
    with suppress(OSError):
        return path.exists()
    return False
