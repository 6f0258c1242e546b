"""Batches of samples, padded or packed, in the form that `NeoForConditionalGeneration.forward` takes."""

from dataclasses import dataclass

import torch

from neo_hf.loss_neo import IGNORE_INDEX
from neo_hf.training.samples import check_sample

# The weight of predicting a token, by the number of tokens in its document that count.
LOSS_WEIGHTINGS = {"token": lambda count: 1.0, "square": lambda count: count**-0.5, "sample": lambda count: 1 / count}


@dataclass
class PaddedCollator:
    """
    A batch with one sample per row, padded on the right to the longest.

    Args:
        pad_token_id: any token of the vocabulary.
        loss_weighting: the weight of each of the n tokens of a sample that count: "token": 1; "square": 1/sqrt(n);
            "sample": 1/n.
        pad_to_multiple_of: pad further, to a multiple of this many tokens, as sequence parallelism needs it.

    Calling it returns:
        `input_ids`, `attention_mask` and `labels` (B, L) int64; `loss_weight` (B, L) float32, the weight of predicting
        this token, 0 where it does not count; with images, `pixel_values` (P, 3 * patch_size^2), float32 or, as in all
        of the samples, uint8, and `image_grid_hw` (N, 2) int64; `sample_names`, a list, if all samples have names;
        `source_ids` (B, L) int64, -1 on padding, if all samples say which source of a stream they are from.

    Raises:
        ValueError: unknown loss_weighting; when called, a sample is not what `check_sample` expects.
    """

    pad_token_id: int
    loss_weighting: str = "square"
    pad_to_multiple_of: int = 1

    def __post_init__(self):
        check_loss_weighting(self.loss_weighting)

    def __call__(self, samples: list[dict]) -> dict:
        length = max(len(sample["input_ids"]) for sample in samples)
        length += -length % self.pad_to_multiple_of
        batch = join_rows([[sample] for sample in samples], length, self.pad_token_id, self.loss_weighting)
        batch["attention_mask"] = (batch.pop("document_ids") == 0).long()
        return batch


@dataclass
class PackedCollator:
    """
    A batch of rows from a `PackedDataset` or `fill_rows`, padded to `max_length` tokens.

    Args:
        pad_token_id, loss_weighting: as for `PaddedCollator`.
        max_length: tokens per row.

    Calling it returns:
        the same as `PaddedCollator`, with `document_ids` (B, L) int64 in place of the attention mask: 0, 1, ... in
        each row; padding is a document of its own.

    Raises:
        ValueError: unknown loss_weighting; when called, a row is too long or not a list of samples, or a sample is
            not what `check_sample` expects.
    """

    pad_token_id: int
    max_length: int
    loss_weighting: str = "square"

    def __post_init__(self):
        check_loss_weighting(self.loss_weighting)

    def __call__(self, rows: list[list[dict]]) -> dict:
        for row in rows:
            if not isinstance(row, list):
                raise ValueError(f"A row must be a list of samples, as PackedDataset yields, got {type(row)}.")
            if (length := sum(len(sample["input_ids"]) for sample in row)) > self.max_length:
                names = [sample.get("name") for sample in row]
                raise ValueError(f"A row must have at most {self.max_length} tokens, got {length} of {names}.")
        return join_rows(rows, self.max_length, self.pad_token_id, self.loss_weighting)


def check_loss_weighting(loss_weighting: str):
    if loss_weighting not in LOSS_WEIGHTINGS:
        raise ValueError(f"loss_weighting must be one of {', '.join(LOSS_WEIGHTINGS)}, got {loss_weighting!r}.")


def join_rows(rows: list[list[dict]], length: int, pad_token_id: int, loss_weighting: str) -> dict:
    """A batch of rows of documents, padded on the right to `length` tokens."""
    rows = [[check_sample(sample) for sample in row] for row in rows]
    shape = (len(rows), length)
    batch: dict = {
        "input_ids": torch.full(shape, pad_token_id),
        "labels": torch.full(shape, IGNORE_INDEX),
        "loss_weight": torch.zeros(shape),
        "document_ids": torch.zeros(shape, dtype=torch.long),
        "source_ids": torch.full(shape, -1),
    }
    for number, row in enumerate(rows):
        end = 0
        for document, sample in enumerate(row):
            place = (number, slice(end, end + len(sample["input_ids"])))
            labels = sample["labels"].clone()
            labels[:1] = IGNORE_INDEX  # the token before it belongs to another document
            counts = labels != IGNORE_INDEX
            batch["input_ids"][place] = sample["input_ids"]
            batch["labels"][place] = labels
            batch["document_ids"][place] = document
            batch["source_ids"][place] = sample.get("source", -1)
            if counts.any():
                batch["loss_weight"][place] = counts * LOSS_WEIGHTINGS[loss_weighting](int(counts.sum()))
            end += len(labels)
        batch["document_ids"][number, end:] = len(row)
    samples = [sample for row in rows for sample in row]
    if not all("source" in sample for sample in samples):
        del batch["source_ids"]
    images = [sample for sample in samples if "pixel_values" in sample]
    if images:
        if len(dtypes := {str(sample["pixel_values"].dtype) for sample in images}) > 1:
            raise ValueError(
                f"pixel_values of the samples of a batch must be all uint8 or all float32, got {sorted(dtypes)}."
            )
        for key in ("pixel_values", "image_grid_hw"):
            batch[key] = torch.cat([sample[key] for sample in images])
    if all("name" in sample for sample in samples):
        batch["sample_names"] = [sample["name"] for sample in samples]
    return batch
