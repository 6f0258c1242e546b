"""Configuration of NEO, a native vision-language model: one decoder-only transformer reads pixels and words.

The defaults are NEO-2B. NEO-9B is
`NeoConfig(text_config={"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 42,
"num_attention_heads": 32}, tie_word_embeddings=False)`.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import transformers
from packaging.version import parse as parse_version

# These files also ship alone, next to the weights on the Hub, so whichever is imported first checks the version.
if not (5, 19) <= parse_version(transformers.__version__).release[:2] < (6,):
    raise ImportError(f"NEO needs transformers>=5.19,<6, but transformers {transformers.__version__} is installed.")

NEWEST_TESTED = (5, 24)  # on a newer transformers, `from_pretrained` runs a self-test first

from huggingface_hub.dataclasses import strict
from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig

# `transformers serve` and other tools look up in these mappings what an unknown model class can do.
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

# The fields that hold the ids of `<IMG_CONTEXT>` (one per visual token), `<img>` and `</img>`, with the released ids.
RELEASED_TOKEN_IDS = {"image_token_id": 151669, "image_start_token_id": 151670, "image_end_token_id": 151671}

# The released configurations omit the depth of the pre-Buffer; it follows from the model's depth (paper, Table 1).
PRE_BUFFER_LAYERS_BY_DEPTH = {40: 12, 42: 6}

# Far above any real model, so that a damaged or hostile file is refused before anything is built.
LIMITS = {
    "vocab_size": 2**24,
    "hidden_size": 2**17,
    "intermediate_size": 2**20,
    "num_hidden_layers": 1024,
    "num_attention_heads": 4096,
    "num_key_value_heads": 4096,
    "head_dim": 2**14,
    "max_position_embeddings": 2**31,
    "rms_norm_eps": 1.0,
    "initializer_range": 100.0,
    "patch_size": 1024,
    "spatial_merge_size": 64,
    "num_channels": 64,
    "min_pixels": 2**31,
    "max_pixels": 2**31,
    "rope_theta": 1e30,
}


def require(condition: bool, message: str):
    """Raise a ValueError with this message unless the condition holds."""
    if not condition:
        raise ValueError(message)


def require_within_limits(config: Any, *names: str):
    """Raise a ValueError naming the first of these fields that is not positive or exceeds its limit in `LIMITS`."""
    for name in names:
        value: Any = getattr(config, name)
        require(value > 0, f"{name} must be positive, got {value}.")
        require(value <= LIMITS[name], f"{name} must be at most {LIMITS[name]}, got {value!s:.40}.")


def _is_plain_rope(rope: Any) -> bool:
    if not isinstance(rope, dict) or not set(rope) <= {"rope_type", "rope_theta"}:
        return False
    theta = rope.get("rope_theta")
    if not isinstance(theta, (int, float)) or isinstance(theta, bool):
        return False
    return rope.get("rope_type", "default") == "default" and 0 < theta <= LIMITS["rope_theta"]


class _RopeIsNeverScaled:
    """
    Mixin that checks `rope_parameters` whenever they are set, also after construction: rope scaling is refused, not
    ignored. If entries are nested by axis, a `rope_type` is added beside them, where some engines look for it.
    """

    rope_parameters: Any
    _rope_type_labels: tuple[str, ...] = ()  # the axes that key `rope_parameters`; transformers reads them too

    def __setattr__(self, name: str, value: Any):
        if name == "rope_parameters" and (value or self.rope_parameters):  # empty only during construction
            labels = self._rope_type_labels
            require(value is None or isinstance(value, dict), f"rope_parameters must be a dict, got {value!r:.200}.")
            value = {"rope_type": "default", **(value or {})}
            axes = [value.get(label) for label in labels] or [value]
            require(
                value["rope_type"] == "default"
                and (not labels or set(value) == {"rope_type", *labels})
                and all(map(_is_plain_rope, axes)),
                "NEO has no rope scaling: rope_parameters must be {'rope_type': 'default', 'rope_theta': positive "
                f"number up to {LIMITS['rope_theta']}}}{f' for each of {labels}' if labels else ''}, got {value}.",
            )
        super().__setattr__(name, value)


@strict
class NeoTextConfig(_RopeIsNeverScaled, PreTrainedConfig):
    r"""
    The decoder: Qwen3's fields, a pre-Buffer depth and one set of rotary parameters per axis.

    num_pre_buffer_layers (`int`, *optional*):
        Layers `[0, num_pre_buffer_layers)` are the pre-Buffer, the rest the post-LLM. Defaults to that of the
        released size of the same depth (12 of 40 layers, 6 of 42); at other depths it is `None`, unknown: the model
        still runs, but `pre_buffer` and `post_llm` raise an error.
    rope_parameters (`dict`, *optional*):
        `{"temporal": ..., "height": ..., "width": ...}`, each `{"rope_type": "default", "rope_theta": float}`. The
        temporal axis rotates `head_dim` channels, height and width `head_dim / 2` each (Native-RoPE). Any rope scaling
        is refused.
    """

    model_type = "neo_text"
    base_config_key = "text_config"
    keys_to_ignore_at_inference = ["past_key_values", "cache", "image_hidden_states"]
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
    rope_parameters: Any = None  # a dict after construction
    num_pre_buffer_layers: int | None = None
    tie_word_embeddings: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = 151645

    def __post_init__(self, **kwargs):
        if self.rope_parameters is None:
            self.rope_parameters = {
                "temporal": {"rope_type": "default", "rope_theta": kwargs.pop("rope_theta", 1_000_000.0)},
                "height": {"rope_type": "default", "rope_theta": 10_000.0},
                "width": {"rope_type": "default", "rope_theta": 10_000.0},
            }
        if self.num_pre_buffer_layers is None:
            self.num_pre_buffer_layers = PRE_BUFFER_LAYERS_BY_DEPTH.get(self.num_hidden_layers)
        require(
            "rope_theta" not in kwargs, f"Give either rope_theta or rope_parameters, got both: {self.rope_parameters}."
        )
        super().__post_init__(**kwargs)

        require(
            self.head_dim > 0 and self.head_dim % 4 == 0,
            f"head_dim must be a positive multiple of 4 (height and width turn pairs of channels in a quarter of the "
            f"head each), got {self.head_dim}.",
        )
        sizes = [
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "head_dim",
        ]
        require_within_limits(self, *sizes, "num_key_value_heads", "max_position_embeddings", "rms_norm_eps")
        require(
            0 <= self.initializer_range <= LIMITS["initializer_range"],
            f"initializer_range must be from 0 to {LIMITS['initializer_range']}, got {self.initializer_range}.",
        )
        require(
            self.hidden_act in ACT2FN, f"hidden_act must be one of transformers' activations, got {self.hidden_act!r}."
        )
        require(
            0 <= self.attention_dropout < 1, f"attention_dropout must be from 0 to 1, got {self.attention_dropout}."
        )
        require(
            self.num_attention_heads % self.num_key_value_heads == 0,
            f"num_attention_heads must be a multiple of num_key_value_heads, got {self.num_attention_heads} and "
            f"{self.num_key_value_heads}.",
        )
        require(
            self.num_pre_buffer_layers is None or 0 <= self.num_pre_buffer_layers <= self.num_hidden_layers,
            f"num_pre_buffer_layers must lie between 0 and num_hidden_layers ({self.num_hidden_layers}), got "
            f"{self.num_pre_buffer_layers}.",
        )

    @property
    def qk_head_dim(self) -> int:
        """Width of a head's queries and keys, [T, H, W]; values are `head_dim` wide. transformers reads this name."""
        return 2 * self.head_dim


@strict
class NeoVisionConfig(_RopeIsNeverScaled, PreTrainedConfig):
    r"""
    The patch embedding, the only module between pixels and the decoder.

    patch_size (`int`, *optional*, defaults to 16):
        Side of a patch in pixels.
    spatial_merge_size (`int`, *optional*, defaults to 2):
        A visual token folds `spatial_merge_size` x `spatial_merge_size` patches.
    hidden_size (`int`, *optional*, defaults to 1024):
        Width of a patch's features.
    min_pixels, max_pixels (`int`, *optional*, defaults to 65536 and 4194304):
        Pixel budget of an image; the image processor's default.
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
    rope_parameters: Any = None  # a dict after construction

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)  # rope_theta defaults to 10,000
        require_within_limits(self, "patch_size", "spatial_merge_size", "num_channels")
        require(
            self.hidden_size > 0 and self.hidden_size % 4 == 0,
            f"vision hidden_size must be a positive multiple of 4 (x and y each turn pairs of channels in one half), "
            f"got {self.hidden_size}.",
        )
        require(
            0 < self.min_pixels <= self.max_pixels,
            f"min_pixels must be positive and at most max_pixels, got {self.min_pixels} and {self.max_pixels}.",
        )
        require_within_limits(self, "hidden_size", "min_pixels", "max_pixels")


@strict
class NeoConfig(PreTrainedConfig):
    r"""
    The whole model.

    text_config (`NeoTextConfig` or `dict`, *optional*):
        The decoder. Defaults to NEO-2B's.
    vision_config (`NeoVisionConfig` or `dict`, *optional*):
        The patch embedding.
    image_token_id, image_start_token_id, image_end_token_id (`int`, *optional*, defaults to 151669, 151670, 151671):
        Ids of `<IMG_CONTEXT>` (one per visual token), `<img>` and `</img>`. `None`: unknown, text only.
    tie_word_embeddings (`bool`, *optional*):
        Whether the output head shares the weights of the input embedding. Defaults to `text_config`'s value.
    """

    model_type = "neo"
    sub_configs = {"text_config": NeoTextConfig, "vision_config": NeoVisionConfig}
    # Readers of other layouts: `model_type` of a `config.json` -> function from its dict to this class's fields.
    readers: ClassVar[dict[str, Callable[[dict[str, Any]], dict[str, Any]]]] = {}
    keys_to_ignore_at_inference = ["past_key_values", "cache", "image_hidden_states"]

    text_config: Any = None  # built below
    vision_config: Any = None
    image_token_id: int | None = RELEASED_TOKEN_IDS["image_token_id"]
    image_start_token_id: int | None = RELEASED_TOKEN_IDS["image_start_token_id"]
    image_end_token_id: int | None = RELEASED_TOKEN_IDS["image_end_token_id"]
    tie_word_embeddings: bool | None = None

    def __post_init__(self, **kwargs):
        for name, config_class in self.sub_configs.items():
            value = getattr(self, name)
            if not isinstance(value, PreTrainedConfig):
                require(value is None or isinstance(value, dict), f"{name} must be a dict, got {value!r:.200}.")
                setattr(self, name, config_class(**(value or {})))
        kwargs["auto_map"] = {**AUTO_MAP, **(kwargs.get("auto_map") or {})}
        super().__post_init__(**kwargs)
        if self.tie_word_embeddings is None:
            self.tie_word_embeddings = self.text_config.tie_word_embeddings
        self.text_config.tie_word_embeddings = self.tie_word_embeddings

        vocab_size = self.text_config.vocab_size
        token_ids = {name: getattr(self, name) for name in RELEASED_TOKEN_IDS}
        for name, token_id in token_ids.items():
            require(
                token_id is None or 0 <= token_id < vocab_size,
                f"{name} must be a token id below vocab_size ({vocab_size}), got {token_id}.",
            )
        known = [token_id for token_id in token_ids.values() if token_id is not None]
        require(len(set(known)) == len(known), f"The ids of NEO's image tokens must differ, got {token_ids}.")

    def __setattr__(self, name: str, value: Any):
        require(
            name not in ("rope_parameters", "rope_scaling") or value is None,
            f"NEO has no rope scaling, and its rotary parameters are text_config.rope_parameters and "
            f"vision_config.rope_parameters, got {name}={value} on the whole model.",
        )
        super().__setattr__(name, value)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        return super().from_dict(cls._read(config_dict), **kwargs)

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        model_type, supported = config_dict.get("model_type", cls.model_type), [NeoConfig.model_type, *cls.readers]
        require(
            model_type in supported,
            f"{pretrained_model_name_or_path} is not a NEO checkpoint: model_type must be one of {supported}, got "
            f"{model_type!r}.",
        )
        return cls._read(config_dict), kwargs

    @classmethod
    def _dict_from_json_file(cls, json_file) -> dict[str, Any]:
        content = super()._dict_from_json_file(json_file)
        require(isinstance(content, dict), f"{json_file} must hold a JSON object, got {content!r:.200}.")
        return content

    @classmethod
    def _read(cls, config_dict: dict[str, Any]) -> dict[str, Any]:
        reader = cls.readers.get(config_dict.get("model_type", cls.model_type))
        return config_dict if reader is None else reader(config_dict)


__all__ = ["NeoConfig", "NeoTextConfig", "NeoVisionConfig"]
