"""Checks of files and inputs whose errors in Transformers and PyTorch do not say what is wrong."""

import json
import os

import torch
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_INDEX_NAME


def check_shard_index(folder: str):
    """Raise an OSError if the index of shards in a folder cannot be read. transformers does not check or name it."""
    for file in (os.path.join(folder, name) for name in (SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_INDEX_NAME)):
        if not os.path.isfile(file):
            continue
        try:
            with open(file, encoding="utf-8") as reader:
                index = json.load(reader)
            set(index["metadata"]), set(index["weight_map"].values())
        except Exception as error:
            raise OSError(
                f"{file} cannot be read: it must hold a JSON object with metadata and weight_map, the file of each "
                f"tensor ({type(error).__name__}: {error})."
            ) from error


def check_input_ids(input_ids: torch.Tensor | None):
    """Raise a ValueError if these are not (B, L) of a dtype that embeddings take."""
    if input_ids is not None and (input_ids.ndim != 2 or input_ids.dtype not in (torch.int64, torch.int32)):
        raise ValueError(
            f"input_ids must be an int64 or int32 tensor of shape (rows, tokens), got {tuple(input_ids.shape)} "
            f"{input_ids.dtype}."
        )


def check_token_ids(low: int, high: int, vocab_size: int):
    """Raise a ValueError quoting the smallest or largest token id if it is outside the vocabulary."""
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"input_ids must lie between 0 and {vocab_size - 1}, got {low if low < 0 else high}. Was the tokenizer "
            "made for this model?"
        )
