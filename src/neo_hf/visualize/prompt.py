"""What the model sees of a prompt, as numbers: units, indices, mask, and the attention of an answer's token.

Shapes: L tokens, N images (or video frames).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch.nn import functional as F
from transformers import DynamicCache

from neo_hf.attention_neo import find_key_runs
from neo_hf.configuration_neo import NeoConfig
from neo_hf.image_processing_neo import NeoImageProcessor
from neo_hf.indexing_neo import allocate_position_ids, document_starts, place_in_grids
from neo_hf.modeling_neo import NeoForConditionalGeneration
from neo_hf.processing_neo import NeoProcessor


@dataclass(frozen=True)
class Unit:
    """Consecutive tokens [start, stop) of a row that belong together; `document` counts from 0."""

    start: int
    stop: int
    document: int


@dataclass(frozen=True)
class TextUnit(Unit):
    """The text between two images or document boundaries, decoded."""

    text: str


@dataclass(frozen=True)
class ImageUnit(Unit):
    """The visual tokens of image `number` in the row: `grid` (rows, columns), `pixels` (height, width, 3) uint8."""

    number: int
    grid: tuple[int, int]
    pixels: np.ndarray


@dataclass(frozen=True)
class Prompt:
    """
    A row as the model sees it, without padding.

    input_ids: (L,) int64.
    position_ids: (3, L) int64 T, H and W indices.
    mask: (L, L) bool, whether a query (row) attends to a key (column).
    units: cover all tokens, in order and without gaps.
    pixel_values, image_grid_hw: patches and (N, 2) grids of its images, `None` if it has none.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    mask: torch.Tensor
    units: list[Unit]
    pixel_values: torch.Tensor | None
    image_grid_hw: torch.Tensor | None

    @property
    def images(self) -> list[ImageUnit]:
        """The units that are images, in order."""
        return [unit for unit in self.units if isinstance(unit, ImageUnit)]


def read_prompt(config: NeoConfig, processor: NeoProcessor, inputs: Mapping[str, torch.Tensor]) -> Prompt:
    """
    The units, indices and mask of a prompt.

    Args:
        inputs: arguments of `forward` for one row, from the processor or a collator: `input_ids` (1, L) and, if any,
            `attention_mask` (1, L), `pixel_values`, `image_grid_hw`, `position_ids` (3, 1, L), and `document_ids`
            (1, L) of a packed row. The mask takes L^2 bytes.

    Raises:
        ValueError: there is more than one row, `position_ids` have another shape, or the number of image tokens does
            not match the images.
    """
    rows, length = inputs["input_ids"].shape
    if rows != 1 or not length:
        raise ValueError(f"Expected one prompt: input_ids must be (1, tokens), got {(rows, length)}.")
    attended = torch.ones(length, dtype=torch.bool)
    if (attention_mask := inputs.get("attention_mask")) is not None:
        attended = attention_mask[0].cpu() != 0
    input_ids = inputs["input_ids"].cpu()[:, attended]
    document_ids = inputs.get("document_ids")
    if document_ids is not None:
        document_ids = document_ids.cpu()[:, attended]
    pixels, grid_hw = (
        None if (tensor := inputs.get(name)) is None else tensor.cpu() for name in ("pixel_values", "image_grid_hw")
    )
    position_ids = inputs.get("position_ids")
    if position_ids is None:
        position_ids = allocate_position_ids(
            input_ids,
            grid_hw,
            image_token_id=processor.image_token_id,
            image_start_token_id=processor.image_start_token_id,
            spatial_merge_size=processor.image_processor.spatial_merge_size,
            document_ids=document_ids,
        )
    elif position_ids.shape != (3, 1, length):
        raise ValueError(f"position_ids must be {(3, 1, length)} (T, H and W), got {tuple(position_ids.shape)}.")
    else:
        position_ids = position_ids.cpu()[:, :, attended]

    return Prompt(
        input_ids=input_ids[0],
        position_ids=position_ids[:, 0],
        mask=find_key_runs(position_ids, document_ids=document_ids).dense()[0, 0],
        units=_find_units(input_ids, document_ids, pixels, grid_hw, processor),
        pixel_values=pixels,
        image_grid_hw=grid_hw,
    )


def _find_units(
    input_ids: torch.Tensor,
    document_ids: torch.Tensor | None,
    pixels: torch.Tensor | None,
    grid_hw: torch.Tensor | None,
    processor: NeoProcessor,
) -> list[Unit]:
    images, grids = [], []
    number = torch.full_like(input_ids, -1)  # of the image, -1 on text
    if grid_hw is not None and len(grid_hw):
        if pixels is None:
            raise ValueError(f"image_grid_hw describes {len(grid_hw)} images, but there are no pixel_values.")
        merge_size = processor.image_processor.spatial_merge_size
        for patches, (rows, columns) in zip(pixels.split(grid_hw.prod(-1).tolist()), grid_hw.tolist(), strict=True):
            images.append(patches_to_image(patches, rows, columns, processor.image_processor))
            grids.append((rows // merge_size, columns // merge_size))
        is_image = input_ids == processor.image_token_id
        place, _, _ = place_in_grids(is_image.cumsum(-1) - 1, torch.tensor(grids))
        number = torch.where(is_image, place, -1)
    opens = document_starts(torch.zeros_like(input_ids) if document_ids is None else document_ids)
    starts = document_starts(number) | opens  # where the image or the document changes
    documents = (opens.cumsum(-1) - 1)[0].tolist()
    edges = [*starts[0].nonzero()[:, 0].tolist(), input_ids.shape[1]]
    units: list[Unit] = []
    for start, stop in pairwise(edges):
        if (image := int(number[0, start])) < 0:
            units.append(TextUnit(start, stop, documents[start], processor.tokenizer.decode(input_ids[0, start:stop])))
        else:
            units.append(ImageUnit(start, stop, documents[start], image, grids[image], images[image]))
    return units


def patches_to_image(patches: torch.Tensor, rows: int, columns: int, processor: NeoImageProcessor) -> np.ndarray:
    """
    The image that was cut into normalised patches.

    Args:
        patches: (rows * columns, 3 * patch_size^2), row by row, channel-major within a patch.

    Returns:
        (rows * patch_size, columns * patch_size, 3) uint8.
    """
    size = processor.patch_size
    pixels = patches.float().cpu().reshape(rows, columns, 3, size, size).permute(0, 3, 1, 4, 2)
    pixels = pixels.reshape(rows * size, columns * size, 3)
    pixels = pixels * torch.tensor(processor.image_std) + torch.tensor(processor.image_mean)
    return (255 * pixels).round().clamp(0, 255).to(torch.uint8).numpy()


@torch.no_grad()
def answer_attention(
    model: NeoForConditionalGeneration, prompt: Prompt, layer: int | None = None
) -> tuple[np.ndarray, int]:
    """
    Where the model looks when it predicts the token after `prompt`: the attention of the last token. Everything before
    it goes through the cache, so that only one query's weights are held. In a packed row, the last document is
    continued. The attention implementation is switched to eager during the call.

    Args:
        layer: index of the layer; by default, the mean over all layers.

    Returns:
        (L,) float32 weights, mean over heads, 0 on other documents, which sum to 1; and the id of the most likely next
        token.

    Raises:
        ValueError: there is no such layer, or the prompt ends with an image.
    """
    num_layers = model.config.text_config.num_hidden_layers
    if layer is not None and not 0 <= layer < num_layers:
        raise ValueError(f"layer must be 0 to {num_layers - 1}, got {layer}.")
    last = prompt.units[-1]
    if isinstance(last, ImageUnit):
        raise ValueError("The prompt ends with an image, but an answer follows text.")
    document = [unit for unit in prompt.units if unit.document == last.document]
    start = document[0].start
    input_ids = prompt.input_ids[None, start:].to(model.device)
    position_ids = prompt.position_ids[:, None, start:].to(model.device)
    images = {}
    if count := sum(isinstance(unit, ImageUnit) for unit in document):
        assert prompt.image_grid_hw is not None
        assert prompt.pixel_values is not None
        grid_hw = prompt.image_grid_hw[-count:]
        patches = prompt.pixel_values[-int(grid_hw.prod(-1).sum()) :]
        images = {"pixel_values": patches.to(model.device), "image_grid_hw": grid_hw.to(model.device)}

    cache = DynamicCache(config=model.config.get_text_config())
    if input_ids.shape[1] > 1:
        model(
            input_ids=input_ids[:, :-1],
            position_ids=position_ids[..., :-1],
            past_key_values=cache,
            logits_to_keep=1,
            **images,
        )
    decoder = model.get_decoder()
    implementation = decoder.config._attn_implementation
    decoder.set_attn_implementation("eager")
    try:
        outputs = model(
            input_ids=input_ids[:, -1:],
            position_ids=position_ids[..., -1:],
            past_key_values=cache,
            output_attentions=True,
        )
    finally:
        decoder.set_attn_implementation(implementation)
    chosen = outputs.attentions if layer is None else outputs.attentions[layer : layer + 1]
    weights = torch.stack([weights[0, :, 0].float().mean(0).cpu() for weights in chosen]).mean(0)
    return np.pad(weights.numpy(), (start, 0)), int(outputs.logits[0, -1].argmax())


@torch.no_grad()
def with_answer(
    model: NeoForConditionalGeneration, inputs: Mapping[str, torch.Tensor], num_tokens: int
) -> dict[str, torch.Tensor]:
    """
    The inputs of a row (see `read_prompt`), without `position_ids`, extended by the first `num_tokens` tokens of the
    model's greedy answer: what it sees when it predicts the next one.

    Raises:
        ValueError: the answer is shorter.
    """
    given = {name: tensor.to(model.device) for name, tensor in inputs.items() if name != "position_ids"}
    given.setdefault("attention_mask", torch.ones_like(given["input_ids"]))
    output = model.generate(**given, max_new_tokens=num_tokens, do_sample=False)
    if (found := output.shape[1] - given["input_ids"].shape[1]) < num_tokens:
        raise ValueError(f"The answer has only {found} tokens, expected at least {num_tokens}.")
    attention_mask = F.pad(given["attention_mask"], (0, num_tokens), value=1)
    return {**given, "input_ids": output, "attention_mask": attention_mask}
