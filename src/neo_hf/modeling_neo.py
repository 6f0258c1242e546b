"""NEO, a native vision-language model: one decoder-only transformer reads pixels and words.

How it differs from Qwen3 (sections of the NEO paper):
1. Pixels enter through a patch embedding of two matrix products, a GELU and a rotary encoding, not through a vision
   encoder (3.1).
2. Each token has three indices (T, H, W); an image's tokens share one T and count rows and columns (3.1,
   Native-RoPE).
3. Attention gets two more projections, `q_proj_hw` and `k_proj_hw`, for space: queries and keys are [T, H, W], twice
   as wide as values, each part with its own norm and rotation; the scale stays head_dim^-1/2 (3.1, Multi-Head Native
   Attention).
4. Text is causal, an image is bidirectional inside (3.1).
5. Layers [0, p) are the pre-Buffer, the others the post-LLM: one list, the same block (3.2).

Shapes: B rows, L new tokens, S keys (cached ones included), E hidden size, D patch features, A attention heads,
K key/value heads, d head_dim; P patches and V visual tokens of N images.
"""

from .attention_neo import can_compile_kernels, neo_attention_forward
from .cache_neo import CACHE_NAME, NeoCache
from .configuration_neo import NeoConfig, NeoTextConfig, NeoVisionConfig
from .generation_neo import NeoGenerationMixin
from .indexing_neo import allocate_position_ids, check_grid, place_in_grids, without_time
from .loss_neo import next_token_targets, target_weights, weighted_cross_entropy
from .masking_neo import create_neo_mask
from .self_test_neo import check_transformers

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from safetensors import SafetensorError
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.masking_utils import find_packed_sequence_indices
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP, Qwen3RMSNorm, eager_attention_forward
from transformers.utils import can_return_tuple, logging
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.import_utils import is_tracing
from transformers.utils.output_capturing import capture_outputs

logger = logging.get_logger(__name__)

# Tokens of a row that go through an MLP at once without gradients: else its activations take most of the memory of a
# long prompt.
MLP_CHUNK = 1024
# Patches that are embedded at once, for the same reason.
PATCH_CHUNK = 4096


def inverse_frequencies(theta: float, channels: int, device: torch.device) -> torch.Tensor:
    """Rotary inverse frequencies theta^(-(0, 2, 4, ...) / channels), (channels / 2,) float32."""
    return 1.0 / theta ** (torch.arange(0, channels, 2, dtype=torch.float32, device=device) / channels)


def rotate_patches(features: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, theta: float) -> torch.Tensor:
    """
    Two-dimensional rotary encoding of patch features (P, D), in float32: the first D/2 channels turn by the column,
    the last D/2 by the row of the patch (both (P,)). Pairs are interleaved, (0, 1), (2, 3), ..., as the checkpoints
    were trained; the decoder's are half-split.
    """
    frequencies = inverse_frequencies(theta, features.shape[-1] // 2, features.device)  # (D/4,)
    angles = torch.cat([columns[:, None] * frequencies, rows[:, None] * frequencies], dim=-1)  # (P, D/2)
    cos, sin = angles.cos(), angles.sin()
    even, odd = features.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack(_rotate(even, odd, cos, sin), dim=-1).flatten(-2).to(features.dtype)


def _rotate(
    x: torch.Tensor, y: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.addcmul(x * cos, y, sin, value=-1), torch.addcmul(y * cos, x, sin)


class NeoPatchProjection(nn.Conv2d):
    """
    A convolution whose stride is its kernel, applied to inputs that are already cut into kernel-sized pieces
    (pieces, in_channels * kernel * kernel): one matrix product. Keeps the released Conv2d weight layout.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int):
        super().__init__(in_channels, out_channels, kernel_size, stride=kernel_size)

    def forward(self, pieces: torch.Tensor) -> torch.Tensor:
        return F.linear(pieces, self.weight.flatten(1), self.bias)


class NeoPatchEmbedding(nn.Module):
    """Pixels to visual tokens (NEO paper, section 3.1). All images of a batch go through together."""

    def __init__(self, config: NeoVisionConfig, output_size: int):
        super().__init__()
        self.config = config
        self.patch_embedding = NeoPatchProjection(config.num_channels, config.hidden_size, config.patch_size)
        self.dense_embedding = NeoPatchProjection(config.hidden_size, output_size, config.spatial_merge_size)

    def forward(self, pixel_values: torch.Tensor, grid_hw: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            pixel_values: (P, channels * patch_size * patch_size), channel-major, patches row-major over each image.
            grid_hw: (N, 2) (rows, columns) of each image in patches.

        Returns:
            Patch features (P, D) and visual tokens (V, E), row-major over each image.
        """
        config, merge = self.config, self.config.spatial_merge_size
        num_patches, patch_dim = pixel_values.shape
        expected_dim = config.num_channels * config.patch_size**2
        if patch_dim != expected_dim:
            raise ValueError(f"pixel_values must be (patches, {expected_dim}), got {tuple(pixel_values.shape)}.")
        check_grid(grid_hw, merge)
        if not is_tracing(grid_hw) and (total := int(grid_hw.prod(-1).sum())) != num_patches:
            raise ValueError(
                f"pixel_values and image_grid_hw do not match: {num_patches} patches, but the grids "
                f"{grid_hw.tolist()} hold {total}."
            )
        grid_hw = grid_hw.to(pixel_values.device)
        _, rows, columns = place_in_grids(torch.arange(num_patches, device=pixel_values.device), grid_hw)
        theta = config.rope_parameters["rope_theta"]
        pixel_values = pixel_values.to(self.patch_embedding.weight.dtype)
        size = num_patches if is_tracing(pixel_values) else PATCH_CHUNK
        chunks = zip(*(x.split(size) for x in (pixel_values, rows, columns)), strict=True)
        features = torch.cat([rotate_patches(F.gelu(self.patch_embedding(x)), r, c, theta) for x, r, c in chunks])

        # Number of the patch at each place of each token: the token's upper left one, then the others of its square.
        tokens = torch.arange(num_patches // merge**2, device=pixel_values.device)
        image, rows, columns = place_in_grids(tokens, grid_hw // merge)
        sizes, width = grid_hw.prod(-1), grid_hw[image, 1]
        first = (sizes.cumsum(0) - sizes)[image] + merge * (rows * width + columns)  # (V,)
        step = torch.arange(merge, device=first.device)
        square = first[:, None, None] + step[:, None] * width[:, None, None] + step  # (V, merge, merge)
        # The weight is (E, D, merge, merge): features come first in each piece.
        pieces = features[square.flatten(1)].transpose(1, 2).flatten(1)  # (V, D * merge * merge)
        return features, self.dense_embedding(pieces)


def rotary_tables(
    position_ids: torch.Tensor, head_dim: int, rope_parameters: dict, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Native-RoPE (NEO paper, section 3.1): cosines and sines of all axes side by side, once per forward.

    Args:
        position_ids: (3, B, L) T, H and W indices.

    Returns:
        cos, sin: (B, L, 1, d), T in the first d/2 channels, H and W in d/4 each; computed in float32, cast to `dtype`.
    """
    widths = {"temporal": head_dim, "height": head_dim // 2, "width": head_dim // 2}
    per_axis = [
        index[..., None].float()
        * inverse_frequencies(rope_parameters[axis]["rope_theta"], channels, position_ids.device)
        for index, (axis, channels) in zip(position_ids, widths.items(), strict=True)
    ]
    angles = torch.cat(per_axis, dim=-1)[:, :, None]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def apply_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Turn half-split pairs (i, i + n/2) of `x` (B, L, heads, n) by the angles of cos, sin (B, L, 1, n/2). Returns both
    halves (B, L, heads, n/2).
    """
    first, second = x.chunk(2, dim=-1)
    return _rotate(first, second, cos, sin)


class NeoAttention(nn.Module):
    """Multi-Head Native Attention (NEO paper, section 3.1)."""

    is_causal = True  # where the mask is left out, as in text

    def __init__(self, config: NeoTextConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = config.head_dim**-0.5  # the LLM's own, although queries and keys are 2 * head_dim wide
        self.attention_dropout = config.attention_dropout

        def projection(heads: int) -> nn.Linear:
            return nn.Linear(config.hidden_size, heads * config.head_dim, bias=config.attention_bias)

        self.q_proj = projection(config.num_attention_heads)
        self.q_proj_hw = projection(config.num_attention_heads)
        self.k_proj = projection(config.num_key_value_heads)
        self.k_proj_hw = projection(config.num_key_value_heads)
        self.v_proj = projection(config.num_key_value_heads)
        self.o_proj = nn.Linear(
            config.num_attention_heads * config.head_dim, config.hidden_size, bias=config.attention_bias
        )
        self.q_norm = Qwen3RMSNorm(config.head_dim, eps=config.rms_norm_eps)
        self.q_norm_h = Qwen3RMSNorm(config.head_dim // 2, eps=config.rms_norm_eps)
        self.q_norm_w = Qwen3RMSNorm(config.head_dim // 2, eps=config.rms_norm_eps)
        self.k_norm = Qwen3RMSNorm(config.head_dim, eps=config.rms_norm_eps)
        self.k_norm_h = Qwen3RMSNorm(config.head_dim // 2, eps=config.rms_norm_eps)
        self.k_norm_w = Qwen3RMSNorm(config.head_dim // 2, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask=None,
        past_key_values: Cache | None = None,
        cache: Cache | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """hidden_states (B, L, E) -> (B, L, E) and, in eager mode, the weights (B, A, L, S)."""
        cache = past_key_values if cache is None else cache
        d = self.head_dim
        widths = (d // 2, d // 4, d // 4)
        cos, sin = (table.split(widths, dim=-1) for table in position_embeddings)

        def thw(temporal: nn.Linear, spatial: nn.Linear, norm: nn.Module, *norms: nn.Module) -> torch.Tensor:
            # One projection after the other: of a long prompt, each is large.
            halves = [*apply_rotary(norm(temporal(hidden_states).unflatten(-1, (-1, d))), cos[0], sin[0])]
            hw = spatial(hidden_states).unflatten(-1, (-1, d)).chunk(2, dim=-1)
            for x, norm, c, s in zip(hw, norms, cos[1:], sin[1:], strict=True):
                halves += apply_rotary(norm(x), c, s)
            return torch.cat(halves, dim=-1).transpose(1, 2)  # (B, heads, L, 2d)

        query = thw(self.q_proj, self.q_proj_hw, self.q_norm, self.q_norm_h, self.q_norm_w)
        key = thw(self.k_proj, self.k_proj_hw, self.k_norm, self.k_norm_h, self.k_norm_w)
        value = self.v_proj(hidden_states).unflatten(-1, (-1, d)).transpose(1, 2)  # (B, K, L, d)

        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)

        implementation = self.config._attn_implementation
        attend: Callable = neo_attention_forward  # by SDPA where the mask is a tensor
        if implementation not in ("neo", "sdpa") and not (implementation == "flex_attention" and query.shape[2] == 1):
            attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        output, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )  # (B, L, A, d)
        return self.o_proj(output.flatten(2)), weights


class NeoDecoderLayer(GradientCheckpointingLayer):
    """The native primitive: a Qwen3 block with native attention (NEO paper, section 3.1)."""

    def __init__(self, config: NeoTextConfig, layer_idx: int):
        super().__init__()
        self.self_attn = NeoAttention(config, layer_idx)
        self.mlp = Qwen3MLP(config)
        self.input_layernorm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        hidden_states = hidden_states + self.self_attn(self.input_layernorm(hidden_states), **kwargs)[0]
        if torch.is_grad_enabled() or is_tracing(hidden_states):
            return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
        for chunk in hidden_states.split(MLP_CHUNK, dim=1):  # in place: of use to nobody but a hook, if at all
            chunk += self.mlp(self.post_attention_layernorm(chunk))
        return hidden_states


class NeoPreTrainedModel(PreTrainedModel):
    config: NeoConfig
    base_model_prefix = "model"
    input_modalities: tuple[str, ...] = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["NeoDecoderLayer", "NeoPatchEmbedding"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": NeoDecoderLayer, "attentions": NeoAttention}

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        """ "neo" where none is asked for; SDPA in place of a FlexAttention that cannot be compiled here."""
        if requested_attention is None:
            return "neo"
        device_type = "cuda" if torch.cuda.is_available() else "cpu"
        if requested_attention == "flex_attention" and not can_compile_kernels(device_type):
            logger.warning_once(
                "attn_implementation='flex_attention' needs a C++ compiler, on CUDA Triton and a C compiler; not "
                "found: attention goes by SDPA."
            )
            requested_attention = "sdpa"
        return super().get_correct_attn_implementation(requested_attention, is_init_check)

    def _init_weights(self, module: nn.Module):
        if isinstance(module, NeoPatchProjection):
            # PyTorch's own default for Conv2d; another initializer_range than the default scales it alike.
            scale = self.config.get_text_config().initializer_range / NeoTextConfig.initializer_range
            bound = scale / math.sqrt(module.weight[0].numel())
            init.uniform_(module.weight, -bound, bound)
            init.uniform_(module.bias, -bound, bound)
        else:
            super()._init_weights(module)

    @property
    def pre_buffer(self) -> nn.ModuleList:
        """The layers before the post-LLM, a view of the layer list (NEO paper, section 3.2)."""
        return self.get_decoder().layers[: self._num_pre_buffer_layers()]

    @property
    def post_llm(self) -> nn.ModuleList:
        """The layers that come from the LLM, a view of the layer list (NEO paper, section 3.2)."""
        return self.get_decoder().layers[self._num_pre_buffer_layers() :]

    # -1 matches no token: a configuration that does not know the ids reads text.
    @property
    def _image_token_id(self) -> int:
        return -1 if self.config.image_token_id is None else self.config.image_token_id

    @property
    def _image_start_token_id(self) -> int:
        return -1 if self.config.image_start_token_id is None else self.config.image_start_token_id

    def _num_pre_buffer_layers(self) -> int:
        config = self.config.get_text_config()
        if config.num_pre_buffer_layers is None:
            raise ValueError(
                f"The depth of the pre-Buffer of this {config.num_hidden_layers}-layer model is unknown: set "
                "config.text_config.num_pre_buffer_layers."
            )
        return config.num_pre_buffer_layers

    def save_pretrained(self, save_directory, *args, save_original_format: bool = False, **kwargs):
        # By default transformers writes the names that were read: those of the raw checkpoint, where it was one.
        super().save_pretrained(save_directory, *args, save_original_format=save_original_format, **kwargs)


class NeoTextModel(NeoPreTrainedModel):
    """The decoder: token embedding, pre-Buffer, post-LLM, norm."""

    config: NeoTextConfig
    input_modalities = ("text",)

    def __init__(self, config: NeoTextConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([NeoDecoderLayer(config, index) for index in range(config.num_hidden_layers)])
        self.norm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        inputs_embeds: torch.Tensor,
        position_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        document_ids: torch.Tensor | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """inputs_embeds (B, L, E), position_ids (3, B, L), document_ids (B, L) -> last_hidden_state (B, L, E)."""
        cache = past_key_values if cache is None else cache
        if document_ids is not None:
            use_cache = False  # a packed row is never continued
        if use_cache and cache is None:
            cache = NeoCache(self.config)
        mask = create_neo_mask(self.config, inputs_embeds, attention_mask, cache, position_ids, document_ids)
        position_embeddings = rotary_tables(
            position_ids, self.config.head_dim, self.config.rope_parameters, inputs_embeds.dtype
        )
        hidden_states = inputs_embeds
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=mask,
                **{CACHE_NAME: cache},
                **kwargs,
            )
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(hidden_states), **{CACHE_NAME: cache if use_cache else None}
        )


@dataclass
class NeoModelOutputWithPast(BaseModelOutputWithPast):
    """
    image_hidden_states (`torch.Tensor` of shape `(V, E)`, *optional*):
        The visual tokens, where images were given.
    """

    image_hidden_states: torch.Tensor | None = None


@dataclass
class NeoCausalLMOutputWithPast(CausalLMOutputWithPast):
    """
    image_hidden_states (`torch.Tensor` of shape `(V, E)`, *optional*):
        The visual tokens, where images were given.
    """

    image_hidden_states: torch.Tensor | None = None


class NeoModel(NeoPreTrainedModel):
    """Patch embedding and decoder, without the output head."""

    def __init__(self, config: NeoConfig):
        super().__init__(config)
        self.patch_embed = NeoPatchEmbedding(config.vision_config, config.text_config.hidden_size)
        self.language_model = NeoTextModel(config.text_config)
        self.post_init()

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        image_grid_hw: torch.Tensor | None = None,
        image_grid_thw: torch.Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """
        Embed images once, to feed them as `mm_encoder_outputs={"image": ...}` as often as wanted.

        Args:
            pixel_values: (P, channels * patch_size * patch_size) normalised patches, from the image processor.
            image_grid_hw: (N, 2) (rows, columns) of each image in patches.
            image_grid_thw: (N, 3) (1, rows, columns), in place of `image_grid_hw`.

        Returns:
            `last_hidden_state`: patch features (P, D). `pooler_output`: a tuple with the visual tokens
            (rows * columns / spatial_merge_size^2, E) of each image.

        Raises:
            ValueError: `image_grid_hw` is missing, does not fold into visual tokens or does not match the patches.
        """
        image_grid_hw = without_time(image_grid_hw, image_grid_thw)
        if image_grid_hw is None:
            raise ValueError(
                f"pixel_values {tuple(pixel_values.shape)} need image_grid_hw, (rows, columns) of each image in "
                "patches; the processor returns both."
            )
        if image_grid_hw.shape[0] == 0:  # as collators make of samples without images
            return BaseModelOutputWithPooling(last_hidden_state=pixel_values, pooler_output=())
        features, tokens = self.patch_embed(pixel_values, image_grid_hw)
        if is_tracing(tokens):  # a graph that tells images apart would be one for their number
            return BaseModelOutputWithPooling(last_hidden_state=features, pooler_output=(tokens,))
        sizes = (image_grid_hw.prod(-1) // self.config.vision_config.spatial_merge_size**2).tolist()
        return BaseModelOutputWithPooling(last_hidden_state=features, pooler_output=tokens.split(sizes))

    def get_token_ids(self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> torch.Tensor:
        """
        Token ids (B, L) as far as indices need them: `input_ids`, or where there are only embeddings, -1 but for
        `<IMG_CONTEXT>` and `<img>`, which are known by theirs. Visual tokens that are already filled in are not:
        give `position_ids` with those.
        """
        if input_ids is not None:
            return input_ids
        assert inputs_embeds is not None
        token_ids = torch.full(inputs_embeds.shape[:2], -1, device=inputs_embeds.device)
        for token_id in (self._image_token_id, self._image_start_token_id):
            if token_id >= 0:
                embedding = self.get_input_embeddings()(torch.tensor(token_id, device=inputs_embeds.device))
                token_ids = token_ids.masked_fill((inputs_embeds == embedding).all(-1), token_id)
        return token_ids

    def get_position_ids(
        self,
        token_ids: torch.Tensor,
        image_grid_hw: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        document_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        T, H and W indices (3, B, L) of new tokens, counting on from what is cached.

        Args:
            token_ids: (B, L) the new tokens.
            image_grid_hw: (N, 2) (rows, columns) in patches of the images among the new tokens.
            attention_mask: (B, S), 0 on padding, cached tokens included.
            past_key_values: the cache that the new tokens follow.
            document_ids: (B, L), equal on the tokens of one document of a packed row.
        """
        past_length = past_key_values.get_seq_length() if past_key_values is not None else 0
        position_ids = allocate_position_ids(
            token_ids,
            image_grid_hw,
            image_token_id=self._image_token_id,
            image_start_token_id=self._image_start_token_id,
            spatial_merge_size=self.config.vision_config.spatial_merge_size,
            # A 4-D mask does not say what is padding: its tokens count, which moves all of a row alike.
            attention_mask=attention_mask[:, -token_ids.shape[1] :]
            if attention_mask is not None and attention_mask.ndim == 2
            else None,
            document_ids=document_ids,
        )
        if past_length:
            deltas = getattr(past_key_values, "rope_deltas", None)
            if deltas is None or deltas.shape[0] != token_ids.shape[0]:
                raise ValueError(
                    "The cache does not say where its rows ended (it was not filled by this model, or its batch was "
                    f"changed to {token_ids.shape[0]} rows): give position_ids."
                )
            position_ids[0] += past_length + deltas
        return position_ids

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_grid_hw: torch.Tensor | None = None,
        document_ids: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        image_grid_thw: torch.Tensor | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        **kwargs,
    ) -> NeoModelOutputWithPast:
        """
        Args:
            input_ids: (B, L) token ids, or `inputs_embeds` (B, L, E) in their place.
            attention_mask: (B, S), 0 on padding on either side; cached tokens included.
            position_ids: (3, B, L) T, H and W indices; computed where not given. (B, L) is transformers' convention
                for packed rows where it starts anew within a row, else the indices of text.
            past_key_values: cached keys (B, K, S, 2d) and values (B, K, S, d); also by its newer name, `cache`.
            pixel_values: (P, channels * patch_size * patch_size) patches of all images, in prompt order.
            image_grid_hw: (N, 2) (rows, columns) of each image in patches.
            document_ids: (B, L), equal on the tokens of one document of a packed row, different for neighbours.
            mm_encoder_outputs: `{"image": ...}` from `get_image_features`, in place of `pixel_values`.
            image_grid_thw: (N, 3) (1, rows, columns), in place of `image_grid_hw`, as TRL's GRPO carries grids.

        Raises:
            ValueError: inputs that exclude each other, images and image tokens that do not match in number, grids
                that do not match the patches, token ids outside the vocabulary.
        """
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        cache = past_key_values if cache is None else cache
        if document_ids is not None and cache is not None:
            raise ValueError("document_ids describe whole packed rows, which cannot follow past_key_values.")
        image_grid_hw = without_time(image_grid_hw, image_grid_thw)
        for name in ("output_hidden_states", "output_attentions"):
            if getattr(self.config, name):  # the decoder looks into its own configuration only
                kwargs.setdefault(name, True)
        image_features = (mm_encoder_outputs or {}).get("image")
        if image_features is not None and pixel_values is not None:
            raise ValueError("Give either pixel_values or mm_encoder_outputs['image'], not both.")

        if inputs_embeds is None:
            assert input_ids is not None
            check_token_ids(input_ids, self.config.text_config.vocab_size)
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if pixel_values is not None:
            image_features = self.get_image_features(pixel_values, image_grid_hw, return_dict=True)
        if image_features is not None and not len(image_features.pooler_output):
            image_features = None

        token_ids = None
        image_hidden_states = None
        if image_features is not None:
            token_ids = self.get_token_ids(input_ids, inputs_embeds)
            image_hidden_states = torch.cat(tuple(image_features.pooler_output))
            image_features = None  # frees the features of patches
            inputs_embeds = self._fill_in(inputs_embeds, token_ids, image_hidden_states)
        elif self.training and torch.is_grad_enabled():
            # Text alone uses the patch embedding too, for nothing: processes gather its weights and average its
            # gradients together, whatever each of them reads.
            vision, merge = self.config.vision_config, self.config.vision_config.spatial_merge_size
            blank = torch.zeros(merge**2, vision.num_channels * vision.patch_size**2, device=inputs_embeds.device)
            _, blank_token = self.patch_embed(blank, torch.tensor([[merge, merge]]))
            inputs_embeds = inputs_embeds + 0 * blank_token.to(inputs_embeds)

        if position_ids is not None and position_ids.ndim == 2:
            unmasked = attention_mask is None or bool((attention_mask == 1).all())
            if document_ids is None and unmasked and cache is None:
                document_ids = find_packed_sequence_indices(position_ids.expand(inputs_embeds.shape[:2]))
            if document_ids is not None or image_hidden_states is not None:
                position_ids = None  # one number per token cannot place images: computed below
            else:
                text = position_ids.expand(inputs_embeds.shape[:2])
                position_ids = torch.stack([text, torch.zeros_like(text), torch.zeros_like(text)])
        elif position_ids is not None and position_ids.shape[0] != 3:
            raise ValueError(
                f"position_ids must be (3, rows, tokens) or (rows, tokens), got {tuple(position_ids.shape)}."
            )
        is_new_sequence = False
        if position_ids is None:
            is_new_sequence = cache is None or cache.get_seq_length() == 0
            if token_ids is None:
                token_ids = self.get_token_ids(input_ids, inputs_embeds)
            position_ids = self.get_position_ids(token_ids, image_grid_hw, attention_mask, cache, document_ids)

        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            position_ids=position_ids,
            attention_mask=attention_mask,
            cache=cache,
            document_ids=document_ids,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        filled = outputs.get(CACHE_NAME)
        is_prompt = is_new_sequence or inputs_embeds.shape[1] > 1
        if filled is not None and is_prompt and not is_tracing(inputs_embeds):
            # The next T index is not the length: the cache of the sequence remembers by how much they differ. A token
            # of text moves both by one.
            next_index = position_ids[0].amax(-1, keepdim=True) + 1
            if input_ids is not None:
                next_index = next_index + (input_ids[:, -1:] == self._image_start_token_id)
            filled.rope_deltas = next_index - filled.get_seq_length()
        return NeoModelOutputWithPast(**outputs, image_hidden_states=image_hidden_states)

    def _fill_in(self, inputs_embeds: torch.Tensor, token_ids: torch.Tensor, visual: torch.Tensor) -> torch.Tensor:
        is_image = token_ids == self._image_token_id
        if not is_tracing(visual) and (count := int(is_image.sum())) != visual.shape[0]:
            raise ValueError(
                f"Image tokens and images do not match: the input holds {count} image tokens (id "
                f"{self.config.image_token_id}), the images give {visual.shape[0]} visual tokens."
            )
        return inputs_embeds.masked_scatter(is_image[..., None], visual.to(inputs_embeds.device, inputs_embeds.dtype))


def check_token_ids(input_ids: torch.Tensor, vocab_size: int):
    """Raise a ValueError that quotes a token id outside the vocabulary. Skips decoding steps, which it would stall."""
    if input_ids.shape[-1] < 2 or is_tracing(input_ids):
        return
    low, high = (int(x) for x in input_ids.aminmax())
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"input_ids must lie between 0 and {vocab_size - 1}, got {low if low < 0 else high}. Was the tokenizer "
            "made for this model?"
        )


class NeoOutputHead(nn.Linear):
    """Hidden states to logits, or straight to a loss: then only the logits of a few tokens exist at a time."""

    # About 1.2 GB in float32 with 151,936 words, backward pass included.
    chunk_tokens = 512

    def forward(
        self, hidden_states: torch.Tensor, loss_of: Callable[..., torch.Tensor] | None = None, *columns: torch.Tensor
    ) -> torch.Tensor:
        """
        Args:
            hidden_states: (..., E), or (tokens, E) where there is a loss.
            loss_of: called with the logits of some tokens and their part of `columns`, gives their part of the loss.
                It is called again in the backward pass. All this is one call of this module, as FSDP and ZeRO gather
                its weights for a call, and expect the same calls from all processes.
            columns: (tokens, ...).

        Returns:
            Logits (..., vocabulary), or the loss, a scalar.
        """
        if loss_of is None:
            return super().forward(hidden_states)

        def chunk_loss(hidden_states: torch.Tensor, *columns: torch.Tensor) -> torch.Tensor:
            return loss_of(F.linear(hidden_states, self.weight), *columns)

        # Without tokens there is one empty chunk, which has a gradient.
        chunks = zip(*(column.split(self.chunk_tokens) for column in (hidden_states, *columns)), strict=True)
        return torch.stack([checkpoint(chunk_loss, *chunk, use_reentrant=False) for chunk in chunks]).sum()


class NeoForConditionalGeneration(NeoPreTrainedModel, NeoGenerationMixin):
    """NEO with its output head: reads text and images, writes text."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: NeoConfig):
        super().__init__(config)
        self.model = NeoModel(config)
        self.lm_head = NeoOutputHead(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.loss_function = weighted_cross_entropy
        self.template = "neo1_0"
        self.system_message = ""
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, output_loading_info=False, **kwargs):
        """
        As in transformers, from a Hub id, a folder of `save_pretrained` or a raw checkpoint. Where there is no output
        head, it is the input embedding, whatever the configuration says.

        Raises:
            ImportError: this transformers is newer than those tested, and NEO's self-test fails with it.
        """
        check_transformers(NeoForConditionalGeneration)
        # Harnesses for the released class pass these of transformers 4, switched off.
        for name in ("load_in_8bit", "load_in_4bit"):
            if kwargs.pop(name, False):
                raise ValueError(f"{name}=True: give quantization_config=BitsAndBytesConfig({name}=True) instead.")
        try:
            model, info = super().from_pretrained(
                pretrained_model_name_or_path, *model_args, output_loading_info=True, **kwargs
            )
        except SafetensorError as error:
            raise OSError(
                f"A file of weights in {pretrained_model_name_or_path} cannot be read, it may be truncated: {error}"
            ) from error
        missing, unexpected = info["missing_keys"] - {"lm_head.weight"}, info["unexpected_keys"]
        if getattr(model, "_weight_conversions", None) and (missing or unexpected):
            # The names were raw ones: nobody loads a part of such a checkpoint on purpose.
            raise ValueError(
                f"{pretrained_model_name_or_path} does not fit its configuration: it lacks {sorted(missing)} and "
                f"has {sorted(unexpected)} left over."
            )
        embedding_name = next(iter(cls._tied_weights_keys.values()))
        if "lm_head.weight" in info["missing_keys"] and embedding_name not in info["missing_keys"]:
            model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = True
            model.tie_weights()
            info["missing_keys"].discard("lm_head.weight")
        if model.generation_config.eos_token_id is None:  # a raw checkpoint without generation_config.json
            model.generation_config.eos_token_id = model.config.text_config.eos_token_id
        return (model, info) if output_loading_info else model

    def get_image_features(self, *args, **kwargs):
        """See `NeoModel.get_image_features`."""
        return self.model.get_image_features(*args, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_grid_hw: torch.Tensor | None = None,
        document_ids: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        loss_weight: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        skip_logits: bool | None = None,
        image_grid_thw: torch.Tensor | None = None,
        cache: Cache | None = None,
        **kwargs,
    ) -> NeoCausalLMOutputWithPast:
        """
        As `NeoModel.forward`, and:

        Args:
            labels: (B, L) token ids to be predicted by the token before each, -100 where none is. `<IMG_CONTEXT>`,
                padding and the first token of a document never count. `shift_labels` in their place are taken as the
                target of each token itself, as in transformers.
            logits_to_keep: compute logits of the last so many tokens only, 0 for all; or which, as an index tensor.
            loss_weight: (B, L), the weight of predicting each token, aligned with the labels; 1 where not given.
            num_items_in_batch: what to divide the loss by in place of the sum of weights of this batch.
            skip_logits: return the loss alone, which needs a fraction of the memory.

        Returns:
            `logits` (B, L, vocabulary) and, where there are labels, `loss`: the mean cross entropy by weight, 0 where
            no token counts.
        """
        shift_labels = kwargs.pop("shift_labels", None)
        if use_cache is None and (labels is not None or shift_labels is not None):
            use_cache = False  # a layer that is run again, to recompute activations, would fill it twice
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            cache=cache,
            inputs_embeds=inputs_embeds,
            pixel_values=pixel_values,
            image_grid_hw=image_grid_hw,
            image_grid_thw=image_grid_thw,
            document_ids=document_ids,
            mm_encoder_outputs=mm_encoder_outputs,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        kept_tokens = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        hidden_states = outputs.last_hidden_state[:, kept_tokens]
        targets = None
        if shift_labels is not None:
            shift_labels = shift_labels.to(hidden_states.device)
            targets = shift_labels.masked_fill(shift_labels == self._image_token_id, -100)
            weights = target_weights(targets, None if loss_weight is None else loss_weight.to(targets.device))
        elif labels is not None:
            if hidden_states.shape[1] != labels.shape[1]:
                raise ValueError(
                    f"labels of {labels.shape[1]} tokens need the logits of all of them, but logits_to_keep="
                    f"{logits_to_keep} keeps {hidden_states.shape[1]}. Give shift_labels of the tokens that are kept."
                )
            targets, weights = next_token_targets(
                labels.to(hidden_states.device),
                image_token_id=self._image_token_id,
                loss_weight=loss_weight,
                attention_mask=attention_mask,
                document_ids=document_ids,
            )
        if skip_logits and targets is None:
            raise ValueError("skip_logits=True leaves nothing to compute without labels.")

        def loss_of(logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            return self.loss_function(
                logits=logits,
                labels=labels,
                vocab_size=self.config.text_config.vocab_size,
                num_items_in_batch=num_items_in_batch,
                shift_labels=targets,
                loss_weight=weights,
                **kwargs,
            )

        # A head that something else was put around or in place of (an adapter) gives logits only.
        if targets is not None and skip_logits and isinstance(self.lm_head, NeoOutputHead):
            if num_items_in_batch is None:
                num_items_in_batch = weights.sum()
            kept = weights != 0
            logits, loss = None, self.lm_head(hidden_states[kept], loss_of, targets[kept], weights[kept])
        else:
            logits = self.lm_head(hidden_states)
            loss = None if targets is None else loss_of(logits, targets, weights)
        return NeoCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
            **{CACHE_NAME: outputs.get(CACHE_NAME)},
        )


__all__ = ["NeoForConditionalGeneration", "NeoModel", "NeoPreTrainedModel", "NeoTextModel"]
