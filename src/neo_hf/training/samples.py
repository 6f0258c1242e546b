"""
From records to samples.

A *record* is a conversation or document as it is stored (`records.py`), or a sample already. A *sample* is what a
model is trained on, a dict of

- `input_ids` (L,) int64 and `labels` (L,) int64, `IGNORE_INDEX` where a token does not count,
- `pixel_values` (P, 3 * patch_size^2) and `image_grid_hw` (N, 2) int64, if it has images or frames. Patches are
  normalised float32, or uint8 as they were resized, a quarter of the size: `normalize_patches` makes the former of the
  latter, on any device and bit for bit,
- `name`: its origin, for error messages,
- `source`: the number of its source in a stream, if it is from one.
"""

import os
from itertools import chain, islice, pairwise
from typing import Any

import numpy as np
import torch
from transformers.utils.chat_template_utils import render_jinja_template

from neo_hf.chat_template_neo import IM_START, mark_control_tokens
from neo_hf.image_processing_neo import NeoImageProcessor, shared_budget
from neo_hf.indexing_neo import check_grid
from neo_hf.loss_neo import IGNORE_INDEX
from neo_hf.processing_neo import NeoProcessor
from neo_hf.training.records import Content, read_record


def encode_record(
    record: dict,
    processor: NeoProcessor | None,
    root: str | os.PathLike | None = None,
    name: str = "",
    images_kwargs: dict | None = None,
    videos_kwargs: dict | None = None,
    sanitize_control_tokens: bool = True,
    normalize: bool = True,
) -> dict:
    """
    Turn a record into a sample.

    In a conversation, the loss covers what the chat template encloses in its generation markers: the assistant's
    tokens of every turn, `<|im_end|>\\n` included, unless the turn has `is_input`. In a document, which ends with the
    tokenizer's eos token, it covers all but the images and the `<img>` and `</img>` around them.

    n > 1 images share the pixel budget, `max(2 * max_pixels // n, min_pixels)` each, as in the training of the
    released models, unless `images_kwargs` has `share_pixel_budget=False`.

    Args:
        record: in a format of `records.py`, or a dict with `input_ids` and `labels`: a sample already.
        processor: not needed for samples.
        root: folder that relative paths start from.
        name: of the sample.
        images_kwargs, videos_kwargs: options of the processor.
        sanitize_control_tokens: whether special tokens in the messages are plain text, other than those of boxes in
            answers. `<image>` and `<video>` stay placeholders.
        normalize: whether patches are normalised, float32; otherwise uint8.

    Raises:
        ValueError: the format is unknown, the number of images differs from the number of their places, there is
            nothing to learn, or an image or video cannot be read.
    """
    if not isinstance(record, dict):
        raise ValueError(f"A record must be a dict, got {record!r:.200}.")
    if record.get("input_ids") is not None:
        sample = check_sample(record, processor, name)
        if not (sample["labels"][1:] != IGNORE_INDEX).any():
            raise ValueError(f"All labels of the sample are {IGNORE_INDEX}: there is nothing to train on.")
        return {"name": "", **sample}
    if processor is None:
        raise ValueError("Encoding a record needs a processor, got None.")
    content = read_record(record, root)
    texts, learnt = _segments(content, processor, sanitize_control_tokens)
    media = content.media
    images_kwargs = {**(images_kwargs or {})}
    if images_kwargs.pop("share_pixel_budget", True):
        limits = {key: getattr(processor.image_processor, key) for key in ("max_pixels", "min_pixels")}
        limits |= {key: value for key, value in images_kwargs.items() if key in limits}
        images_kwargs["max_pixels"] = shared_budget(**limits, count=len(media["image"]))
    keep_uint8 = not normalize and _normalizes_alike(processor)
    raw = {"rescale_factor": 1.0, "do_normalize": False} if keep_uint8 else {}
    kwargs: dict = {
        # The processor would share the budget per segment.
        "images_kwargs": {**images_kwargs, **raw, "share_pixel_budget": False},
        "videos_kwargs": {**(videos_kwargs or {}), **raw},
        "text_kwargs": {"padding": False, "add_special_tokens": False},
    }
    inputs = processor(
        text=texts,
        images=_split(media["image"], [text.count(processor.image_token) for text in texts]),
        videos=_split(media["video"], [text.count(processor.video_token) for text in texts]),
        **kwargs,
    )
    ids = [torch.tensor(segment, dtype=torch.long) for segment in inputs["input_ids"]]
    labels = [
        segment if learn else torch.full_like(segment, IGNORE_INDEX)
        for segment, learn in zip(ids, learnt, strict=True)
    ]
    sample = {"input_ids": torch.cat(ids), "labels": torch.cat(labels)}
    is_image = sample["input_ids"] == processor.image_token_id
    ignored = is_image
    if content.text is not None:
        around = [processor.image_start_token, processor.image_end_token]
        ids_around = torch.tensor(processor.tokenizer.convert_tokens_to_ids(around))
        ignored = is_image | torch.isin(sample["input_ids"], ids_around)
    sample["labels"] = sample["labels"].masked_fill(ignored, IGNORE_INDEX)
    images = {key: torch.from_numpy(inputs[key]) for key in ("pixel_values", "image_grid_hw") if key in inputs}
    num_patches = len(images["pixel_values"]) if images else 0
    if int(is_image.sum()) * processor.image_processor.spatial_merge_size**2 != num_patches:
        raise ValueError(f"The text contains {processor.image_context_token}, which is reserved for images.")
    if images and keep_uint8:
        images["pixel_values"] = images["pixel_values"].to(torch.uint8)
    return {**sample, **images, "name": name}


def _segments(content: Content, processor: NeoProcessor, sanitize: bool) -> tuple[list[str], list[bool]]:
    """The prompt in pieces that are tokenised apart, and whether each is learnt."""
    if content.text is not None:
        if not content.text.strip():
            raise ValueError("The document is empty: there is nothing to train on.")
        text = content.text
        if sanitize:
            # Without images, <image> is a word.
            placeholders = [processor.video_token] + [processor.image_token] * (not content.media["image"])
            text = mark_control_tokens(text, processor.tokenizer, placeholders=placeholders)
        return [text + processor.tokenizer.eos_token], [True]
    answers = [message for message in content.messages if message["role"] == "assistant"]
    if not answers:
        raise ValueError("The conversation has no assistant turn: there is nothing to train on.")
    learnt = [not message["is_input"] for message in answers]
    if not any(learnt):
        raise ValueError("All assistant turns of the conversation are is_input: there is nothing to train on.")
    messages = processor.mark_messages(content.messages, placeholders=False) if sanitize else content.messages
    rendered: Any = render_jinja_template(
        [messages],
        chat_template=processor.chat_template,  # type: ignore[arg-type]
        return_assistant_tokens_mask=True,
        **processor.tokenizer.special_tokens_map,
    )
    [text], [spans] = rendered
    if not spans:
        raise ValueError("The chat template has no {% generation %} block around the assistant's text.")
    # Headers and answers are tokenised separately, as in the released training and as in generation. In one string, an
    # answer that starts with a newline would share a token with its header.
    cuts = [0, *chain.from_iterable(spans)]
    cuts += [len(text)] if cuts[-1] < len(text) else []
    texts = [text[start:end] for start, end in pairwise(cuts)]  # every second one is an answer
    return texts, [bool(number % 2) and learnt[number // 2] for number in range(len(texts))]


def _normalizes_alike(processor: NeoProcessor) -> bool:
    """Whether one normalisation of uint8 patches serves the images and the frames of this processor."""
    names = ("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")
    images, frames = (
        [getattr(part, name) for name in names] for part in (processor.image_processor, processor.video_processor)
    )
    return images == frames and bool(processor.image_processor.do_rescale)


def normalize_patches(patches: torch.Tensor, image_processor: NeoImageProcessor) -> torch.Tensor:
    """
    The patches that the image processor returns, of those that were kept as uint8.

    Args:
        patches: (P, channels * patch_size^2) uint8, channel-major. Others are returned as they are.

    Returns:
        (P, channels * patch_size^2) float32, on the same device, equal to the bit.
    """
    if patches.dtype != torch.uint8:
        return patches

    def constant(values) -> torch.Tensor:
        # Tensors on the device: CUDA multiplies by the reciprocal of a number, which rounds otherwise.
        return torch.tensor(np.array(values, dtype=np.float32), device=patches.device).reshape(-1, 1)

    pixels = patches.float() / constant(1 / image_processor.rescale_factor).squeeze()
    if not image_processor.do_normalize:
        return pixels
    mean, std = constant(image_processor.image_mean), constant(image_processor.image_std)
    return ((pixels.unflatten(1, (len(mean), -1)) - mean) / std).flatten(1)


def check_sample(record: dict, processor: NeoProcessor | None = None, name: str = "") -> dict:
    """
    A record that is a sample already, with the right types.

    Args:
        record: `input_ids` and `labels`, with images `pixel_values` and `image_grid_hw`: tensors, arrays or lists.
        processor: of the model, to check tokens and patches against.
        name: of the sample, where it has none of its own.

    Raises:
        ValueError: a value of another shape or type, patches that are not finite, grids that do not match the patches;
            with a processor also ids outside its vocabulary, control tokens in an answer, and images of other sizes
            than their tokens.
    """
    sample = {key: _tensor(key, record[key]) for key in ("input_ids", "labels") if record.get(key) is not None}
    if "labels" not in sample or sample["input_ids"].ndim != 1 or sample["labels"].shape != sample["input_ids"].shape:
        shapes = {key: tuple(value.shape) for key, value in sample.items()}
        raise ValueError(f"A sample needs input_ids (L,) and labels (L,), got {shapes}.")
    for key in ("pixel_values", "image_grid_hw"):
        if record.get(key) is not None:
            sample[key] = _tensor(key, record[key])
    vocab_size = None if processor is None else len(processor.tokenizer)
    for key, ids in (("input_ids", sample["input_ids"]), ("labels", sample["labels"])):
        bad = ids < 0 if vocab_size is None else (ids < 0) | (ids >= vocab_size)
        if key == "labels":
            bad &= ids != IGNORE_INDEX
        if bad.any():
            limit = "" if vocab_size is None else f" and below {vocab_size}, the size of the vocabulary"
            raise ValueError(f"{key} of a sample must be at least 0{limit}, got {int(ids[bad][0])}.")
    merge = 1 if processor is None else processor.image_processor.spatial_merge_size
    grids = _check_images(sample, merge, None if processor is None else processor.image_processor.patch_size)
    if processor is not None:
        _check_tokens(sample, processor, (grids.prod(-1) // merge**2).tolist())
        sample["labels"] = sample["labels"].masked_fill(sample["input_ids"] == processor.image_token_id, IGNORE_INDEX)
    sample |= {"source": record["source"]} if isinstance(record.get("source"), int) else {}
    name = record.get("name") or name
    return {**sample, "name": name} if name else sample


def _tensor(key: str, value: Any) -> torch.Tensor:
    """A value of a sample as a tensor of its type."""
    try:
        tensor = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(f"{key} of a sample must be numbers, got {value!r:.200}.") from error
    if key == "pixel_values":
        return tensor if tensor.dtype == torch.uint8 else tensor.float()
    if tensor.numel() and (tensor.is_floating_point() or tensor.dtype == torch.bool):
        raise ValueError(
            f"{key} of a sample must be whole numbers, got {tensor.dtype} {tensor.flatten()[:5].tolist()}."
        )
    return tensor.long()


def _check_images(sample: dict, merge_size: int, patch_size: int | None) -> torch.Tensor:
    """Check patches and grids against each other. Returns the grids (N, 2)."""
    if ("pixel_values" in sample) != ("image_grid_hw" in sample):
        raise ValueError(f"A sample with images needs both pixel_values and image_grid_hw, got only {sorted(sample)}.")
    if "pixel_values" not in sample:
        return torch.zeros(0, 2, dtype=torch.long)
    patches, grids = sample["pixel_values"], sample["image_grid_hw"]
    check_grid(grids, merge_size)
    total = int(grids.prod(-1).sum())
    if patches.ndim != 2 or len(patches) != total:
        raise ValueError(
            f"The grids {grids.tolist()} of a sample need {total} patches, but pixel_values is {tuple(patches.shape)}."
        )
    if patch_size is not None and total and patches.shape[1] != 3 * patch_size**2:
        raise ValueError(
            f"pixel_values of a sample must be (patches, {3 * patch_size**2}), got {tuple(patches.shape)}."
        )
    if patches.dtype != torch.uint8 and not patches.isfinite().all():
        bad = patches[~patches.isfinite()]
        raise ValueError(f"pixel_values of a sample must be finite, got {len(bad)} values that are not, as {bad[0]}.")
    return grids


def _check_tokens(sample: dict, processor: NeoProcessor, sizes: list[int]):
    """Check that the image tokens are those of images of these sizes, and that no answer begins a turn."""
    ids, labels = sample["input_ids"], sample["labels"]
    runs, counts = (ids == processor.image_token_id).unique_consecutive(return_counts=True)
    if (found := counts[runs].tolist()) != sizes:
        raise ValueError(
            f"The images of a sample have {sizes} visual tokens, but its input_ids hold {found} "
            f"{processor.image_context_token} in a row."
        )
    starts = (ids == processor.tokenizer.convert_tokens_to_ids(processor.image_start_token)).sum()
    if starts != len(sizes):
        raise ValueError(
            f"Each image of a sample follows one {processor.image_start_token}, got {int(starts)} for {len(sizes)} "
            "images."
        )
    if (labels == processor.tokenizer.convert_tokens_to_ids(IM_START)).any():
        raise ValueError(f"An answer of a sample contains {IM_START}, which begins a turn: labels must ignore it.")


def _split(items: list, counts: list[int]) -> list[list] | None:
    """Consecutive lists of these lengths, or `None` if there are no items."""
    remaining = iter(items)
    return [list(islice(remaining, count)) for count in counts] if items else None
