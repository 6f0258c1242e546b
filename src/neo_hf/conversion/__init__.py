"""Conversion: raw and Hub format, Qwen3 to NEO, and the pre-Buffer as a checkpoint of its own."""

from .from_qwen3 import graft_pre_buffer, init_from_qwen3
from .hub_to_raw import convert_hub_to_raw
from .pre_buffer import extract_pre_buffer
from .raw_to_hub import convert_raw_to_hub

__all__ = [
    "convert_hub_to_raw",
    "convert_raw_to_hub",
    "extract_pre_buffer",
    "graft_pre_buffer",
    "init_from_qwen3",
]
