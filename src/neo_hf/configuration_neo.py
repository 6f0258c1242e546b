"""Configuration of NEO, a native vision-language model: one decoder-only transformer reads pixels and words.

The defaults are NEO-2B. NEO-9B is
`NeoConfig(text_config={"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 42,
"num_attention_heads": 32}, tie_word_embeddings=False)`.
"""

from typing import Any

import transformers
from packaging.version import parse as parse_version

# These files also travel alone, next to the weights on the Hub: the first of them to be imported says what it needs.
if not (5, 19) <= parse_version(transformers.__version__).release[:2] < (6,):
    raise ImportError(f"NEO needs transformers>=5.19,<6, but transformers {transformers.__version__} is installed.")

NEWEST_TESTED = (5, 24)  # on a newer transformers, `from_pretrained` runs a self-test first

from huggingface_hub.dataclasses import strict
from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig

# `transformers serve` and others ask these mappings of names what a class that they do not know can do.
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

for mapping_names in (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES):
    mapping_names.setdefault("neo", "NeoForConditionalGeneration")

AUTO_MAP = {
    "AutoConfig": "configuration_neo.NeoConfig",
    "AutoModel": "modeling_neo.NeoForConditionalGeneration",
    "AutoModelForImageTextToText": "modeling_neo.NeoForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_neo.NeoForConditionalGeneration",
    "AutoImageProcessor": "image_processing_neo.NeoImageProcessor",
    "AutoProcessor": "processing_neo.NeoProcessor",
    "AutoVideoProcessor": "video_processing_neo.NeoVideoProcessor",
}

# What a decoder has in common with Qwen3, under the same names.
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

# The released configs do not say where the pre-Buffer ends; their depths do (paper, Table 1).
PRE_BUFFER_LAYERS_BY_DEPTH = {40: 12, 42: 6}


def _require(condition: bool, message: str):
    if not condition:
        raise ValueError(message)


@strict
class NeoTextConfig(PreTrainedConfig):
    r"""
    The decoder: Qwen3's fields, a pre-Buffer depth and one set of rotary parameters per axis.

    num_pre_buffer_layers (`int`, *optional*):
        Layers `[0, num_pre_buffer_layers)` are the pre-Buffer, the rest the post-LLM. Where it is not given, it is
        that of the released size of the same depth (12 of 40 layers, 6 of 42); at other depths it stays `None`,
        unknown: the model runs all the same, but `pre_buffer` and `post_llm` ask for it.
    rope_parameters (`dict`, *optional*):
        `{"temporal": ..., "height": ..., "width": ...}`, each `{"rope_type": "default", "rope_theta": float}`. The
        temporal axis turns `head_dim` channels, height and width `head_dim / 2` each (Native-RoPE).
    """

    model_type = "neo_text"
    base_config_key = "text_config"
    keys_to_ignore_at_inference = ["past_key_values", "cache", "image_hidden_states"]
    # Tells the base class that `rope_parameters` is nested under these keys.
    _rope_type_labels = ("temporal", "height", "width")
    base_model_tp_plan = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.q_proj_hw": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.k_proj_hw": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.q_norm": "replicated_with_grad_allreduce",
        "layers.*.self_attn.q_norm_h": "replicated_with_grad_allreduce",
        "layers.*.self_attn.q_norm_w": "replicated_with_grad_allreduce",
        "layers.*.self_attn.k_norm": "replicated_with_grad_allreduce",
        "layers.*.self_attn.k_norm_h": "replicated_with_grad_allreduce",
        "layers.*.self_attn.k_norm_w": "replicated_with_grad_allreduce",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }

    vocab_size: int = 151936
    hidden_size: int = 2048
    intermediate_size: int = 6144
    num_hidden_layers: int = 40
    num_attention_heads: int = 16
    num_key_value_heads: int = 8
    head_dim: int = 128
    hidden_act: str = "silu"
    max_position_embeddings: int = 40960
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    attention_bias: bool = False
    attention_dropout: float | int = 0.0
    rope_parameters: Any = None  # a dict once built
    num_pre_buffer_layers: int | None = None
    tie_word_embeddings: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = 151645

    def __post_init__(self, **kwargs):
        if self.rope_parameters is None:
            self.rope_parameters = {
                "temporal": {"rope_type": "default", "rope_theta": float(kwargs.pop("rope_theta", 1_000_000.0))},
                "height": {"rope_type": "default", "rope_theta": 10_000.0},
                "width": {"rope_type": "default", "rope_theta": 10_000.0},
            }
        if self.num_pre_buffer_layers is None:
            self.num_pre_buffer_layers = PRE_BUFFER_LAYERS_BY_DEPTH.get(self.num_hidden_layers)
        _require(
            "rope_theta" not in kwargs
            and set(self.rope_parameters) == set(self._rope_type_labels)
            and all(
                p.get("rope_type", "default") == "default" and p.get("rope_theta", 0) > 0
                for p in self.rope_parameters.values()
            ),
            "rope_parameters must hold {'rope_type': 'default', 'rope_theta': positive number} for each of "
            f"{self._rope_type_labels}, got {self.rope_parameters}.",
        )
        super().__post_init__(**kwargs)

        sizes = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
        for name in [*sizes, "num_key_value_heads", "max_position_embeddings", "rms_norm_eps"]:
            _require(getattr(self, name) > 0, f"{name} must be positive, got {getattr(self, name)}.")
        _require(
            self.hidden_act in ACT2FN, f"hidden_act must be one of transformers' activations, got {self.hidden_act!r}."
        )
        _require(
            0 <= self.attention_dropout < 1, f"attention_dropout must be from 0 to 1, got {self.attention_dropout}."
        )
        _require(
            self.num_attention_heads % self.num_key_value_heads == 0,
            f"num_attention_heads must be a multiple of num_key_value_heads, got {self.num_attention_heads} and "
            f"{self.num_key_value_heads}.",
        )
        _require(
            self.head_dim > 0 and self.head_dim % 4 == 0,
            f"head_dim must be a positive multiple of 4 (height and width turn pairs of channels in a quarter of the "
            f"head each), got {self.head_dim}.",
        )
        _require(
            self.num_pre_buffer_layers is None or 0 <= self.num_pre_buffer_layers <= self.num_hidden_layers,
            f"num_pre_buffer_layers must lie between 0 and num_hidden_layers ({self.num_hidden_layers}), got "
            f"{self.num_pre_buffer_layers}.",
        )

    @property
    def qk_head_dim(self) -> int:
        """Width of a head's queries and keys, [T, H, W]; values are `head_dim` wide. The name says so to caches."""
        return 2 * self.head_dim


@strict
class NeoVisionConfig(PreTrainedConfig):
    r"""
    The patch embedding, all there is between pixels and the decoder.

    patch_size (`int`, *optional*, defaults to 16):
        Side of a patch in pixels.
    spatial_merge_size (`int`, *optional*, defaults to 2):
        A visual token folds `spatial_merge_size` x `spatial_merge_size` patches.
    hidden_size (`int`, *optional*, defaults to 1024):
        Width of a patch's features.
    min_pixels, max_pixels (`int`, *optional*, defaults to 65536 and 4194304):
        Pixel budget of an image, the default of the image processor.
    rope_parameters (`dict`, *optional*):
        `{"rope_type": "default", "rope_theta": float}` of the two-dimensional rotary encoding of patch features.
    """

    model_type = "neo_vision"
    base_config_key = "vision_config"

    patch_size: int = 16
    spatial_merge_size: int = 2
    num_channels: int = 3
    hidden_size: int = 1024
    min_pixels: int = 65536
    max_pixels: int = 4194304
    rope_parameters: Any = None  # a dict once built

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)  # fills in rope_theta 10 000 where none is given
        for name in ("patch_size", "spatial_merge_size", "num_channels"):
            _require(getattr(self, name) > 0, f"{name} must be positive, got {getattr(self, name)}.")
        _require(
            self.hidden_size > 0 and self.hidden_size % 4 == 0,
            f"vision hidden_size must be a positive multiple of 4 (x and y each turn pairs of channels in one half), "
            f"got {self.hidden_size}.",
        )
        _require(
            0 < self.min_pixels <= self.max_pixels,
            f"min_pixels must be positive and at most max_pixels, got {self.min_pixels} and {self.max_pixels}.",
        )
        _require(
            self.rope_parameters["rope_type"] == "default" and self.rope_parameters["rope_theta"] > 0,
            "vision rope_parameters must be {'rope_type': 'default', 'rope_theta': positive number}, got "
            f"{self.rope_parameters}.",
        )


@strict
class NeoConfig(PreTrainedConfig):
    r"""
    The whole model. Also reads the `config.json` of a raw checkpoint (`model_type` "neo_chat").

    text_config (`NeoTextConfig` or `dict`, *optional*):
        The decoder. Defaults to NEO-2B's.
    vision_config (`NeoVisionConfig` or `dict`, *optional*):
        The patch embedding.
    image_token_id, image_start_token_id, image_end_token_id (`int`, *optional*, defaults to 151669, 151670, 151671):
        Ids of `<IMG_CONTEXT>` (one per visual token), `<img>` and `</img>`. `None`: unknown, text only.
    tie_word_embeddings (`bool`, *optional*):
        Whether the output head is the input embedding. Defaults to `text_config`'s value.
    """

    model_type = "neo"
    sub_configs = {"text_config": NeoTextConfig, "vision_config": NeoVisionConfig}
    keys_to_ignore_at_inference = ["past_key_values", "cache", "image_hidden_states"]

    text_config: Any = None  # built below
    vision_config: Any = None
    image_token_id: int | None = 151669
    image_start_token_id: int | None = 151670
    image_end_token_id: int | None = 151671
    tie_word_embeddings: bool | None = None

    def __post_init__(self, **kwargs):
        for name, config_class in self.sub_configs.items():
            value = getattr(self, name)
            if not isinstance(value, PreTrainedConfig):
                setattr(self, name, config_class(**(value or {})))
        kwargs["auto_map"] = {**AUTO_MAP, **(kwargs.get("auto_map") or {})}
        super().__post_init__(**kwargs)
        if self.tie_word_embeddings is None:
            self.tie_word_embeddings = self.text_config.tie_word_embeddings
        self.text_config.tie_word_embeddings = self.tie_word_embeddings

        vocab_size = self.text_config.vocab_size
        for name in ("image_token_id", "image_start_token_id", "image_end_token_id"):
            token_id = getattr(self, name)
            _require(
                token_id is None or 0 <= token_id < vocab_size,
                f"{name} must be a token id below vocab_size ({vocab_size}), got {token_id}.",
            )
        ids = [self.image_token_id, self.image_start_token_id, self.image_end_token_id]
        known = [token_id for token_id in ids if token_id is not None]
        _require(len(set(known)) == len(known), f"The ids of <IMG_CONTEXT>, <img> and </img> must differ, got {ids}.")

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        if config_dict.get("model_type") == "neo_chat":
            config_dict = raw_config_to_neo(config_dict)
        return super().from_dict(config_dict, **kwargs)

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        model_type = config_dict.get("model_type", "neo")
        _require(
            model_type in ("neo", "neo_chat"),
            f"{pretrained_model_name_or_path} is no NEO: model_type must be 'neo' or 'neo_chat', got {model_type!r}.",
        )
        if model_type == "neo_chat":
            config_dict = raw_config_to_neo(config_dict)
        return config_dict, kwargs


class NeoChatConfig(NeoConfig):
    """Registered for the raw `model_type` "neo_chat", so that `AutoConfig` reads raw folders; gives a `NeoConfig`."""

    model_type = "neo_chat"

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        return NeoConfig.from_dict(config_dict, **kwargs)


def _unwrap(value):
    # A trailing comma in the released configuration code turns some numbers into one-element lists.
    return value[0] if isinstance(value, (list, tuple)) and len(value) == 1 else value


def raw_config_to_neo(raw: dict[str, Any]) -> dict[str, Any]:
    """
    Translate a raw `config.json` (`model_type` "neo_chat") into the fields of `NeoConfig`.

    The pre-Buffer depth is `extra_num_layers` where training wrote it. Special token ids that the file does not give
    are the released ones where the vocabulary reaches that far, else `None`.

    Raises:
        ValueError: a section is missing, or a setting has a value that NEO does not have; it is quoted.
    """
    for section in ("vision_config", "llm_config"):
        _require(
            isinstance(raw.get(section), dict), f"A raw NEO config needs a '{section}' section, got {sorted(raw)}."
        )
    raw = {key: _unwrap(value) for key, value in raw.items()}
    vision = {key: _unwrap(value) for key, value in raw["vision_config"].items()}
    text = {key: _unwrap(value) for key, value in raw["llm_config"].items()}

    for name in ("hidden_size", "num_hidden_layers", "vocab_size"):
        _require(name in text, f"llm_config must give {name}, got only {sorted(text)}.")
    _require(
        text.get("model_type", "qwen3") == "qwen3",
        f"llm_config.model_type must be 'qwen3', got {text.get('model_type')!r}.",
    )
    _require(
        not text.get("use_sliding_window"), "NEO has no sliding window, but llm_config.use_sliding_window is true."
    )
    # What newer versions of transformers write in place of rope_theta and rope_scaling.
    rope_parameters = {"rope_type": "default"} | (text.get("rope_parameters") or {})
    scaling = text.get("rope_scaling") or (rope_parameters if rope_parameters["rope_type"] != "default" else None)
    _require(not scaling, f"NEO has no rope scaling, got {scaling}.")
    layer_types = set(text.get("layer_types") or ["full_attention"])
    _require(layer_types == {"full_attention"}, f"All layers of NEO are full attention, got {sorted(layer_types)}.")
    llm_hidden_size = vision.get("llm_hidden_size", text["hidden_size"])
    _require(
        llm_hidden_size == text["hidden_size"],
        f"vision_config.llm_hidden_size is {llm_hidden_size}, but llm_config.hidden_size {text['hidden_size']}.",
    )
    downsample_ratio = vision.get("downsample_ratio", raw.get("downsample_ratio", 0.5))
    _require(
        0 < downsample_ratio <= 1 and (1 / downsample_ratio).is_integer(),
        f"downsample_ratio must be 1 over a whole number, got {downsample_ratio}.",
    )

    def rope(theta: float) -> dict[str, Any]:
        return {"rope_type": "default", "rope_theta": float(theta)}

    text_config = {key: text[key] for key in QWEN3_FIELDS if key in text}
    text_config["rope_parameters"] = {
        "temporal": rope(rope_parameters.get("rope_theta", text.get("rope_theta", 1_000_000.0))),
        "height": rope(text.get("rope_theta_hw", 10_000.0)),
        "width": rope(text.get("rope_theta_hw", 10_000.0)),
    }
    text_config["num_pre_buffer_layers"] = text.get("extra_num_layers")
    vision_fields = ("patch_size", "num_channels", "hidden_size", "min_pixels", "max_pixels")
    vision_config = {key: vision[key] for key in vision_fields if key in vision}
    vision_config["spatial_merge_size"] = round(1 / downsample_ratio)
    vision_config["rope_parameters"] = rope(vision.get("rope_theta_vision", 10_000.0))

    def token_id(raw_name: str, default: int) -> int | None:
        return raw.get(raw_name, default if default < text["vocab_size"] else None)

    return {
        "model_type": "neo",
        "text_config": text_config,
        "vision_config": vision_config,
        "image_token_id": token_id("img_context_token_id", 151669),
        "image_start_token_id": token_id("img_start_token_id", 151670),
        "image_end_token_id": token_id("img_end_token_id", 151671),
        "tie_word_embeddings": text.get("tie_word_embeddings", raw.get("tie_word_embeddings")),
        "dtype": raw.get("torch_dtype") or raw.get("dtype") or text.get("torch_dtype"),
    }


__all__ = ["NeoConfig", "NeoTextConfig", "NeoVisionConfig"]
