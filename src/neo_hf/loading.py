"""Open a NEO by name, whatever its layout: a Hub id, a folder in Hub format or a raw checkpoint."""

from .configuration_neo import NeoConfig
from .image_processing_neo import NeoImageProcessor
from .modeling_neo import NeoForConditionalGeneration
from .processing_neo import NeoProcessor
from .tokenization import add_neo_tokens

import os

from transformers import AutoTokenizer, PreTrainedConfig


def is_raw(name_or_path: str | os.PathLike) -> bool:
    """Whether a Hub id or a folder holds a raw checkpoint (`model_type` "neo_chat")."""
    config_dict, _ = PreTrainedConfig.get_config_dict(name_or_path)
    return config_dict.get("model_type") == "neo_chat"


def load_image_processor(name_or_path: str | os.PathLike) -> NeoImageProcessor:
    """The image processor of a NEO; that of a raw checkpoint follows from its configuration."""
    if not is_raw(name_or_path):
        return NeoImageProcessor.from_pretrained(name_or_path)
    vision = NeoConfig.from_pretrained(name_or_path).vision_config
    names = ("patch_size", "spatial_merge_size", "min_pixels", "max_pixels")
    return NeoImageProcessor(**{name: getattr(vision, name) for name in names})


def load_processor(name_or_path: str | os.PathLike) -> NeoProcessor:
    """The processor of a NEO; that of a raw checkpoint is put together from its tokenizer and configuration."""
    if not is_raw(name_or_path):
        return NeoProcessor.from_pretrained(name_or_path)
    try:
        tokenizer = add_neo_tokens(AutoTokenizer.from_pretrained(name_or_path))
    except (ValueError, OSError) as error:
        raise ValueError(
            f"{name_or_path} needs a tokenizer, tokenizer.json or vocab.json and merges.txt: {error}"
        ) from error
    tokenizer.padding_side = "left"
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
