"""The raw layout, in which NEO was trained and released (`model_type` "neo_chat"): configuration and names, both ways.

`register` lets `from_pretrained` read raw checkpoints. None of this ships to the Hub.
"""

from .configuration_neo import RELEASED_TOKEN_IDS, NeoConfig, require
from .modeling_neo import NeoForConditionalGeneration, NeoPreTrainedModel

import re
from typing import Any

from transformers import AutoConfig
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming

RAW_MODEL_TYPE = "neo_chat"

# Raw prefixes to the model's own: the single key map, used by loading and by conversion in both directions.
RAW_TO_NEO = {
    "vision_model.embeddings.": "model.patch_embed.",
    "language_model.model.": "model.language_model.",
    "language_model.lm_head.": "lm_head.",
}

# Patterns of tensors that are dropped, with the reason.
IGNORED_TENSORS = {r".*\.rotary_emb\.inv_freq": "rotary frequencies follow from the configuration"}

# Fields of `llm_config`, a Qwen3 configuration, that NEO's decoder keeps under the same names.
QWEN3_FIELDS: tuple[str, ...] = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "attention_bias",
    "attention_dropout",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)
VISION_FIELDS = ("patch_size", "num_channels", "hidden_size", "min_pixels", "max_pixels")
RAW_TOKEN_ID_NAMES = {
    "image_token_id": "img_context_token_id",
    "image_start_token_id": "img_start_token_id",
    "image_end_token_id": "img_end_token_id",
}


class NeoChatConfig(NeoConfig):
    """Registered for the raw `model_type`, so that `AutoConfig` reads raw folders; builds a `NeoConfig`."""

    model_type = RAW_MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        return NeoConfig.from_dict(config_dict, **kwargs)


class _LoadOnlyRenaming(WeightRenaming):
    """A renaming without an inverse: a model read from raw names is saved under its own."""

    __slots__ = ()

    def reverse_transform(self) -> WeightRenaming:
        return WeightRenaming("(?!)", "")  # matches no name


def register():
    """Let `AutoConfig`, `NeoConfig` and all models' `from_pretrained` read raw checkpoints."""
    NeoConfig.readers[RAW_MODEL_TYPE] = raw_config_to_neo
    AutoConfig.register(RAW_MODEL_TYPE, NeoChatConfig)
    # By model type: transformers itself adds or removes "model." when it loads the base model or the full one.
    renamings: list = [_LoadOnlyRenaming("^" + re.escape(raw), neo) for raw, neo in RAW_TO_NEO.items()]
    register_checkpoint_conversion_mapping(NeoConfig.model_type, renamings, overwrite=True)
    NeoPreTrainedModel.loading_hooks.append(_finish_loading)


def _finish_loading(model: NeoPreTrainedModel, info: dict[str, Any]):
    """Check that a raw checkpoint was loaded in full, and set what its configuration says about generation."""
    if not any(isinstance(used, _LoadOnlyRenaming) for used in getattr(model, "_weight_conversions", None) or ()):
        return
    ignored = [*IGNORED_TENSORS, *([] if model.can_generate() else [r"lm_head\..*"])]
    left_over = [name for name in info["unexpected_keys"] if not any(re.fullmatch(p, name) for p in ignored)]
    if info["missing_keys"] or left_over:
        raise ValueError(
            f"The raw checkpoint {model.name_or_path} does not fit its configuration: missing "
            f"{sorted(info['missing_keys'])}, left over {sorted(left_over)}."
        )
    # Without generation_config.json, transformers looks for this in config sections with other names.
    if model.can_generate() and model.generation_config.eos_token_id is None:
        model.generation_config.eos_token_id = model.config.text_config.eos_token_id


def _replace_prefix(name: str, prefixes: dict[str, str]) -> str:
    for old, new in prefixes.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def raw_to_neo_name(name: str) -> str:
    """The model's own name of a raw tensor; other names are returned unchanged."""
    return _replace_prefix(name, RAW_TO_NEO)


def neo_to_raw_name(name: str) -> str:
    """The raw name of one of the model's tensors; other names are returned unchanged."""
    return _replace_prefix(name, {neo: raw for raw, neo in RAW_TO_NEO.items()})


def released_token_ids(vocab_size: int) -> dict[str, int | None]:
    """The released ids of NEO's image tokens; `None` for those outside the vocabulary."""
    return {name: token_id if token_id < vocab_size else None for name, token_id in RELEASED_TOKEN_IDS.items()}


def rope(theta: Any) -> dict[str, Any]:
    """The rotary parameters of one axis. The configuration checks theta."""
    return {"rope_type": "default", "rope_theta": theta}


def raw_config_to_neo(raw: dict[str, Any]) -> dict[str, Any]:
    """
    Translate a raw `config.json` into the fields of `NeoConfig`.

    The depth of the pre-Buffer is `extra_num_layers`, which only training writes. Missing token ids default to the
    released ones, or to `None` if the vocabulary is too small for them.

    Raises:
        ValueError: a section is missing, or a setting has a value that NEO does not support; the message quotes it.
    """
    for section in ("vision_config", "llm_config"):
        require(
            isinstance(raw.get(section), dict), f"A raw NEO config needs a '{section}' section, got {sorted(raw)}."
        )
    raw = _unwrap_numbers(raw)
    vision, text = _unwrap_numbers(raw["vision_config"]), _unwrap_numbers(raw["llm_config"])

    for name in ("hidden_size", "num_hidden_layers", "vocab_size"):
        require(name in text, f"llm_config must give {name}, got only {sorted(text)}.")
    vocab_size = text["vocab_size"]
    require(isinstance(vocab_size, int), f"llm_config.vocab_size must be a whole number, got {vocab_size!r:.200}.")
    llm_type = text.get("model_type", "qwen3")
    require(llm_type == "qwen3", f"llm_config.model_type must be 'qwen3', got {llm_type!r}.")
    require(
        not text.get("use_sliding_window"), "NEO has no sliding window, but llm_config.use_sliding_window is true."
    )
    # Newer versions of transformers write rope_parameters instead of rope_theta and rope_scaling.
    rope_parameters = {"rope_type": "default"} | (text.get("rope_parameters") or {})
    scaling = text.get("rope_scaling") or (rope_parameters if rope_parameters["rope_type"] != "default" else None)
    require(not scaling, f"NEO has no rope scaling, got {scaling}.")
    layer_types = set(text.get("layer_types") or ["full_attention"])
    require(layer_types == {"full_attention"}, f"All layers of NEO are full attention, got {sorted(layer_types)}.")
    llm_hidden_size = vision.get("llm_hidden_size", text["hidden_size"])
    require(
        llm_hidden_size == text["hidden_size"],
        f"vision_config.llm_hidden_size is {llm_hidden_size}, but llm_config.hidden_size is {text['hidden_size']}.",
    )
    downsample_ratio = vision.get("downsample_ratio", raw.get("downsample_ratio", 0.5))
    require(
        isinstance(downsample_ratio, (int, float))
        and 0 < downsample_ratio <= 1
        and (1 / downsample_ratio).is_integer(),
        f"downsample_ratio must be 1 over a whole number, got {downsample_ratio!r:.200}.",
    )

    theta = rope_parameters.get("rope_theta", text.get("rope_theta", 1_000_000.0))
    theta_hw = text.get("rope_theta_hw", 10_000.0)
    text_config = {name: text[name] for name in QWEN3_FIELDS if name in text}
    text_config["rope_parameters"] = {"temporal": rope(theta), "height": rope(theta_hw), "width": rope(theta_hw)}
    text_config["num_pre_buffer_layers"] = text.get("extra_num_layers")
    vision_config = {name: vision[name] for name in VISION_FIELDS if name in vision}
    vision_config["spatial_merge_size"] = round(1 / downsample_ratio)
    vision_config["rope_parameters"] = rope(vision.get("rope_theta_vision", 10_000.0))
    given_ids = {name: raw[raw_name] for name, raw_name in RAW_TOKEN_ID_NAMES.items() if raw_name in raw}
    return {
        "model_type": NeoConfig.model_type,
        "architectures": [NeoForConditionalGeneration.__name__],
        "text_config": text_config,
        "vision_config": vision_config,
        **released_token_ids(vocab_size),
        **given_ids,
        "tie_word_embeddings": text.get("tie_word_embeddings", raw.get("tie_word_embeddings")),
        "dtype": raw.get("torch_dtype") or raw.get("dtype") or text.get("torch_dtype"),
    }


def _unwrap_numbers(section: dict[str, Any]) -> dict[str, Any]:
    """A trailing comma in the released configuration code turns some numbers into one-element lists."""
    return {
        key: value[0] if isinstance(value, (list, tuple)) and len(value) == 1 else value
        for key, value in section.items()
    }


def neo_config_to_raw(config: NeoConfig) -> dict[str, Any]:
    """
    Translate a `NeoConfig` into a raw `config.json`; the inverse of `raw_config_to_neo`.

    Raises:
        ValueError: height and width have different thetas, which the raw layout cannot express.
    """
    text, vision = config.text_config, config.vision_config
    thetas = {axis: text.rope_parameters[axis]["rope_theta"] for axis in ("temporal", "height", "width")}
    require(
        thetas["height"] == thetas["width"],
        f"The raw layout has one rope_theta_hw for height and width, got {thetas}.",
    )
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
    downsample_ratio = 1 / vision.spatial_merge_size
    token_ids = {raw_name: getattr(config, name) for name, raw_name in RAW_TOKEN_ID_NAMES.items()}
    return {
        "architectures": ["NEOChatModel"],
        "model_type": RAW_MODEL_TYPE,
        "template": "neo1_0",
        "downsample_ratio": downsample_ratio,
        "tie_word_embeddings": config.tie_word_embeddings,
        "torch_dtype": None if config.dtype is None else str(config.dtype).removeprefix("torch."),
        "vision_config": {
            "architectures": ["NEOVisionModel"],
            "model_type": "neo_vision",
            **{name: getattr(vision, name) for name in VISION_FIELDS},
            "llm_hidden_size": text.hidden_size,
            "downsample_ratio": downsample_ratio,
            "rope_theta_vision": vision.rope_parameters["rope_theta"],
            "max_position_embeddings_vision": 10000,
        },
        "llm_config": llm_config,
        **{raw_name: token_id for raw_name, token_id in token_ids.items() if token_id is not None},
    }
