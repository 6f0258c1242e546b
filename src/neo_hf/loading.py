"""Load a model and its processor from a Hub id, a folder in Hub format or a raw checkpoint."""

from .configuration_neo import RELEASED_TOKEN_IDS, NeoConfig
from .image_processing_neo import NeoImageProcessor
from .modeling_neo import NeoForConditionalGeneration
from .processing_neo import NeoProcessor
from .raw import RAW_MODEL_TYPE
from .tokenization import add_neo_tokens, load_tokenizer

import os
import platform
from pathlib import Path

import torch
from huggingface_hub import get_hf_file_metadata, hf_hub_url, snapshot_download, try_to_load_from_cache

NANO = Path(__file__).parent / "nano"  # the model that comes with the package
EXAMPLE_IMAGE = NANO / "scene.png"  # a sample image for it


def resolve_model(name: str) -> str:
    """
    What a name on a command line stands for: `nano` is the model that comes with the package, unless a model lies in a
    folder of that name. Other names are returned as they are.
    """
    if name == "nano" and not os.path.exists(os.path.join(name, "config.json")):
        return str(NANO)
    return name


def check_available(name_or_path: str | os.PathLike):
    """
    Check that a model is a folder, in the cache or on the Hub. This sends at most one request; transformers would
    retry for half a minute.

    Raises:
        ValueError: there is no such model, or the Hub cannot be reached.
    """
    if os.path.isdir(name_or_path):
        return
    try:
        if isinstance(try_to_load_from_cache(str(name_or_path), "config.json"), str):
            return
        get_hf_file_metadata(hf_hub_url(str(name_or_path), "config.json"))
    except Exception as error:  # malformed ids, HTTP errors, and whatever the HTTP library raises offline
        raise ValueError(
            f"{str(name_or_path)!r} is neither a folder nor a cached model, and could not be found on the Hub: {error}"
        ) from error


def is_raw(name_or_path: str | os.PathLike) -> bool:
    """Whether a Hub id or a folder holds a raw checkpoint."""
    check_available(name_or_path)
    config_dict, _ = NeoConfig._get_config_dict(name_or_path)  # as it is stored
    return config_dict.get("model_type") == RAW_MODEL_TYPE


def default_image_processor(config: NeoConfig) -> NeoImageProcessor:
    """Image processor with the patch size and pixel budget from a configuration."""
    names = ("patch_size", "spatial_merge_size", "min_pixels", "max_pixels")
    return NeoImageProcessor(**{name: getattr(config.vision_config, name) for name in names})


def load_image_processor(name_or_path: str | os.PathLike) -> NeoImageProcessor:
    """Image processor of a model. For a raw checkpoint it is derived from the configuration."""
    if not is_raw(name_or_path):
        return NeoImageProcessor.from_pretrained(name_or_path)
    return default_image_processor(NeoConfig.from_pretrained(name_or_path))


def load_processor(name_or_path: str | os.PathLike) -> NeoProcessor:
    """Processor of a model. For a raw checkpoint it is built from the tokenizer and configuration."""
    if not is_raw(name_or_path):
        files = ("processor_config.json", "preprocessor_config.json")
        if os.path.isdir(name_or_path) and not any(os.path.exists(os.path.join(name_or_path, name)) for name in files):
            raise ValueError(
                f"{name_or_path} has no processor. It needs {files[0]} and a tokenizer, as written by "
                "processor.save_pretrained()."
            )
        return NeoProcessor.from_pretrained(name_or_path)
    folder = name_or_path
    if not os.path.isdir(name_or_path):
        folder = snapshot_download(str(name_or_path), allow_patterns=["*.json", "*.txt"])
    tokenizer = load_tokenizer(folder)
    if tokenizer is None:
        raise ValueError(f"{name_or_path} needs a tokenizer: tokenizer.json, or vocab.json and merges.txt.")
    add_neo_tokens(tokenizer)
    return NeoProcessor(load_image_processor(name_or_path), tokenizer)


def multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for products of bfloat16 matrices, and torch uses them."""
    if platform.machine() in ("x86_64", "AMD64"):
        return torch.cpu._is_avx512_bf16_supported()  # CPUs with AMX have it too
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def choose_dtype(config: NeoConfig, device: str) -> torch.dtype | None:
    """
    The dtype to run a checkpoint in on a device, "cuda" or "cpu"; `None` as it is stored. CPUs multiply float16, and
    bfloat16 if they have no instructions for it, many times slower than float32.
    """
    is_quantized = getattr(config, "quantization_config", None) is not None
    is_half = config.dtype in (torch.float16, torch.bfloat16)
    if device != "cpu" or is_quantized or not is_half or (config.dtype == torch.bfloat16 and multiplies_bfloat16()):
        return config.dtype
    return torch.float32


def load_model_and_processor(
    name_or_path: str | os.PathLike, **kwargs
) -> tuple[NeoForConditionalGeneration, NeoProcessor]:
    """
    Load a model, in evaluation mode, and its processor.

    Args:
        name_or_path: Hub id, folder in Hub format or folder of a raw checkpoint.
        kwargs: passed to `NeoForConditionalGeneration.from_pretrained`.
    """
    processor = load_processor(name_or_path)
    model = NeoForConditionalGeneration.from_pretrained(name_or_path, **kwargs).eval()
    for name in RELEASED_TOKEN_IDS:
        # Raw configurations leave these ids to the tokenizer.
        setattr(model.config, name, getattr(processor, name))
    return model, processor


def load_nano() -> tuple[NeoForConditionalGeneration, NeoProcessor]:
    """
    Load NEO-nano and its processor, in float32. The model has 1.46 million parameters, comes with the package and
    recognises drawn shapes and digits (see `nano/README.md`); `EXAMPLE_IMAGE` is a scene to show it.
    """
    return load_model_and_processor(NANO)
