"""
From records to samples.

A *record* is a conversation as it is stored (`records.py`), or a sample already. A *sample* is what a model is trained
on, a dict of

- `input_ids` (L,) int64 and `labels` (L,) int64, `IGNORE_INDEX` where a token does not count,
- `pixel_values` (P, 3 * patch_size^2) float32 and `image_grid_hw` (N, 2) int64, if it has images or frames,
- `name`: its origin, for error messages.
"""

import os
from itertools import chain, islice, pairwise
from typing import Any

import torch
from transformers.utils.chat_template_utils import render_jinja_template

from neo_hf.image_processing_neo import shared_budget
from neo_hf.loss_neo import IGNORE_INDEX
from neo_hf.processing_neo import NeoProcessor
from neo_hf.training.records import read_conversation


def encode_record(
    record: dict,
    processor: NeoProcessor | None,
    root: str | os.PathLike | None = None,
    name: str = "",
    images_kwargs: dict | None = None,
    videos_kwargs: dict | None = None,
    sanitize_control_tokens: bool = True,
) -> dict:
    """
    Turn a record into a sample.

    The loss covers what the chat template encloses in its generation markers: the assistant's tokens of every turn,
    `<|im_end|>\\n` included. n > 1 images share the pixel budget, `max(2 * max_pixels // n, min_pixels)` each, as in
    the training of the released models, unless `images_kwargs` has `share_pixel_budget=False`.

    Args:
        record: in a format of `records.py`, or a dict with `input_ids` and `labels`: a sample already.
        processor: not needed for samples.
        root: folder that relative paths start from.
        name: of the sample.
        images_kwargs, videos_kwargs: options of the processor.
        sanitize_control_tokens: whether special tokens in the messages are plain text, other than those of boxes in
            answers. `<image>` and `<video>` stay placeholders.

    Raises:
        ValueError: the format is unknown, the number of images differs from the number of their places, there is no
            assistant turn, or an image or video cannot be read.
    """
    if not isinstance(record, dict):
        raise ValueError(f"A record must be a dict, got {record!r:.200}.")
    if record.get("input_ids") is not None:
        return _check_sample(record, processor, name)
    if processor is None:
        raise ValueError("Encoding a conversation needs a processor, got None.")
    messages, media = read_conversation(record, root)
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError("The conversation has no assistant turn: there is nothing to train on.")
    if sanitize_control_tokens:
        messages = processor.mark_messages(messages, placeholders=False)

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
    segments = [text[start:end] for start, end in pairwise(cuts)]  # every second one is an answer
    images_kwargs = {**(images_kwargs or {})}
    if images_kwargs.pop("share_pixel_budget", True):
        limits = {key: getattr(processor.image_processor, key) for key in ("max_pixels", "min_pixels")}
        limits |= {key: value for key, value in images_kwargs.items() if key in limits}
        images_kwargs["max_pixels"] = shared_budget(**limits, count=len(media["image"]))
    kwargs: dict = {
        "images_kwargs": {**images_kwargs, "share_pixel_budget": False},  # the processor would share it per segment
        "videos_kwargs": videos_kwargs or {},
        "text_kwargs": {"padding": False, "add_special_tokens": False},
    }
    inputs = processor(
        text=segments,
        images=_split(media["image"], [segment.count(processor.image_token) for segment in segments]),
        videos=_split(media["video"], [segment.count(processor.video_token) for segment in segments]),
        **kwargs,
    )
    ids = [torch.tensor(segment, dtype=torch.long) for segment in inputs["input_ids"]]
    labels = [segment if number % 2 else torch.full_like(segment, IGNORE_INDEX) for number, segment in enumerate(ids)]
    input_ids = torch.cat(ids)
    is_image = input_ids == processor.image_token_id
    sample = {"input_ids": input_ids, "labels": torch.cat(labels).masked_fill(is_image, IGNORE_INDEX)}
    images = {key: torch.from_numpy(inputs[key]) for key in ("pixel_values", "image_grid_hw") if key in inputs}
    num_patches = len(images["pixel_values"]) if images else 0
    if int(is_image.sum()) * processor.image_processor.spatial_merge_size**2 != num_patches:
        raise ValueError(f"The text contains {processor.image_context_token}, which is reserved for images.")
    return {**sample, **images, "name": name}


def _check_sample(record: dict, processor: NeoProcessor | None, name: str) -> dict:
    """A record that is a sample already, with the right types."""
    dtypes = {"input_ids": torch.long, "labels": torch.long, "image_grid_hw": torch.long, "pixel_values": torch.float}
    sample = {
        key: torch.as_tensor(record[key], dtype=dtype) for key, dtype in dtypes.items() if record.get(key) is not None
    }
    if "labels" not in sample or sample["input_ids"].ndim != 1 or sample["labels"].shape != sample["input_ids"].shape:
        shapes = {key: tuple(value.shape) for key, value in sample.items()}
        raise ValueError(f"A sample needs input_ids (L,) and labels (L,), got {shapes}.")
    if processor is not None:
        is_image = sample["input_ids"] == processor.image_token_id
        sample["labels"] = sample["labels"].masked_fill(is_image, IGNORE_INDEX)
        expected = int(is_image.sum()) * processor.image_processor.spatial_merge_size**2
        if expected != (found := len(sample.get("pixel_values", ()))):
            raise ValueError(f"The image tokens of a sample need {expected} patches, but pixel_values has {found}.")
    if not (sample["labels"][1:] != IGNORE_INDEX).any():
        raise ValueError(f"All labels of the sample are {IGNORE_INDEX}: there is nothing to train on.")
    return sample | {"name": record.get("name") or name}


def _split(items: list, counts: list[int]) -> list[list] | None:
    """Consecutive lists of these lengths, or `None` if there are no items."""
    remaining = iter(items)
    return [list(islice(remaining, count)) for count in counts] if items else None
