"""Open a NEO by name, whatever its layout: a Hub id, a folder in Hub format or a raw checkpoint."""

from .configuration_neo import NeoConfig
from .image_processing_neo import NeoImageProcessor
from .modeling_neo import NeoForConditionalGeneration
from .processing_neo import NeoProcessor
from .tokenization import add_neo_tokens, load_tokenizer

import os
from pathlib import Path

from huggingface_hub import get_hf_file_metadata, hf_hub_url, snapshot_download, try_to_load_from_cache
from transformers import PreTrainedConfig

NANO = Path(__file__).parent / "nano"  # the model that comes with the package


def check_available(name_or_path: str | os.PathLike):
    """
    Refuse a model that is neither a folder, nor in the cache, nor on the Hub. This asks the Hub once; transformers
    would retry for half a minute.

    Raises:
        ValueError: there is no such model, or the Hub cannot be reached.
    """
    if os.path.isdir(name_or_path):
        return
    try:
        if isinstance(try_to_load_from_cache(str(name_or_path), "config.json"), str):
            return
        get_hf_file_metadata(hf_hub_url(str(name_or_path), "config.json"))
    except Exception as error:  # malformed ids, refusals, and whatever the HTTP library raises without a network
        raise ValueError(
            f"{str(name_or_path)!r} is neither a folder nor a cached model, and could not be found on the Hub: {error}"
        ) from error


def is_raw(name_or_path: str | os.PathLike) -> bool:
    """Whether a Hub id or a folder holds a raw checkpoint (`model_type` "neo_chat")."""
    check_available(name_or_path)
    config_dict, _ = PreTrainedConfig.get_config_dict(name_or_path)
    return config_dict.get("model_type") == "neo_chat"


def default_image_processor(config: NeoConfig) -> NeoImageProcessor:
    """The image processor that a configuration asks for."""
    names = ("patch_size", "spatial_merge_size", "min_pixels", "max_pixels")
    return NeoImageProcessor(**{name: getattr(config.vision_config, name) for name in names})


def load_image_processor(name_or_path: str | os.PathLike) -> NeoImageProcessor:
    """The image processor of a NEO; that of a raw checkpoint follows from its configuration."""
    if not is_raw(name_or_path):
        return NeoImageProcessor.from_pretrained(name_or_path)
    return default_image_processor(NeoConfig.from_pretrained(name_or_path))


def load_processor(name_or_path: str | os.PathLike) -> NeoProcessor:
    """The processor of a NEO; that of a raw checkpoint is put together from its tokenizer and configuration."""
    if not is_raw(name_or_path):
        files = ("processor_config.json", "preprocessor_config.json")
        if os.path.isdir(name_or_path) and not any(os.path.exists(os.path.join(name_or_path, name)) for name in files):
            raise ValueError(
                f"{name_or_path} has no processor: it needs {files[0]} and a tokenizer, which the processor's "
                "save_pretrained writes."
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


def load_model_and_processor(
    name_or_path: str | os.PathLike, **kwargs
) -> tuple[NeoForConditionalGeneration, NeoProcessor]:
    """
    Model and processor of a NEO.

    Args:
        name_or_path: Hub id, folder in Hub format or raw folder.
        kwargs: of `NeoForConditionalGeneration.from_pretrained`.
    """
    processor = load_processor(name_or_path)
    model = NeoForConditionalGeneration.from_pretrained(name_or_path, **kwargs).eval()
    for name in ("image_token_id", "image_start_token_id", "image_end_token_id"):
        # Raw configurations leave them to the tokenizer.
        setattr(model.config, name, getattr(processor, name))
    return model, processor


def load_nano() -> tuple[NeoForConditionalGeneration, NeoProcessor]:
    """
    NEO-nano and its processor, in float32: a model of 1.5 million parameters that comes with the package, to try
    everything on. It knows drawn shapes and digits; its card is `nano/README.md` beside this file.
    """
    return load_model_and_processor(NANO)
