"""Raw checkpoints: the layout in which NEO was trained and released (`model_type` "neo_chat")."""

from .configuration_neo import QWEN3_FIELDS, NeoConfig

import re
from typing import Any

from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming

# Prefixes of the raw names and of the model's own: the one key map of loading and of conversion both ways.
RAW_TO_NEO = {
    "vision_model.embeddings.": "model.patch_embed.",
    "language_model.model.": "model.language_model.",
    "language_model.lm_head.": "lm_head.",
}

# Raw names that conversion leaves out, and why.
IGNORED = {r".*\.rotary_emb\.inv_freq": "rotary frequencies follow from the configuration"}


def register_raw_checkpoints():
    """Let `from_pretrained` read raw checkpoints as they are. Saving writes the model's own names."""
    register_checkpoint_conversion_mapping(
        "NeoForConditionalGeneration",
        [WeightRenaming("^" + re.escape(raw), neo) for raw, neo in RAW_TO_NEO.items()],
        overwrite=True,
    )


def _rename(name: str, prefixes: dict[str, str]) -> str:
    for old, new in prefixes.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def raw_to_neo_name(name: str) -> str:
    """The model's own name of a raw tensor; any other name as it is."""
    return _rename(name, RAW_TO_NEO)


def neo_to_raw_name(name: str) -> str:
    """The raw name of one of the model's tensors; any other name as it is."""
    return _rename(name, {neo: raw for raw, neo in RAW_TO_NEO.items()})


def neo_config_to_raw(config: NeoConfig) -> dict[str, Any]:
    """
    The raw `config.json` of a configuration, the inverse of `raw_config_to_neo`.

    Raises:
        ValueError: height and width turn with different thetas, which the raw layout cannot say.
    """
    text, vision = config.text_config, config.vision_config
    thetas = {axis: rope["rope_theta"] for axis, rope in text.rope_parameters.items()}
    if thetas["height"] != thetas["width"]:
        raise ValueError(f"The raw layout has one rope_theta_hw for height and width, got {thetas}.")
    dtype = str(config.dtype).removeprefix("torch.") if config.dtype is not None else None
    llm_config = {name: getattr(text, name) for name in QWEN3_FIELDS}
    llm_config |= {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "rope_theta": thetas["temporal"],
        "rope_theta_hw": thetas["height"],
        "max_position_embeddings_hw": 10000,
        "tie_word_embeddings": config.tie_word_embeddings,
        "use_sliding_window": False,
    }
    if text.num_pre_buffer_layers is not None:
        llm_config["extra_num_layers"] = text.num_pre_buffer_layers
    raw = {
        "architectures": ["NEOChatModel"],
        "model_type": "neo_chat",
        "template": "neo1_0",
        "downsample_ratio": 1 / vision.spatial_merge_size,
        "tie_word_embeddings": config.tie_word_embeddings,
        "torch_dtype": dtype,
        "vision_config": {
            "architectures": ["NEOVisionModel"],
            "model_type": "neo_vision",
            "num_channels": vision.num_channels,
            "patch_size": vision.patch_size,
            "hidden_size": vision.hidden_size,
            "llm_hidden_size": text.hidden_size,
            "downsample_ratio": 1 / vision.spatial_merge_size,
            "rope_theta_vision": vision.rope_parameters["rope_theta"],
            "max_position_embeddings_vision": 10000,
            "min_pixels": vision.min_pixels,
            "max_pixels": vision.max_pixels,
        },
        "llm_config": llm_config,
    }
    ids = {
        "img_context_token_id": config.image_token_id,
        "img_start_token_id": config.image_start_token_id,
        "img_end_token_id": config.image_end_token_id,
    }
    return raw | {name: token_id for name, token_id in ids.items() if token_id is not None}
