"""NEO, a native vision-language model: one decoder-only transformer reads pixels and words.

How it differs from Qwen3 (sections of the NEO paper):
1. Pixels enter through a patch embedding of two matrix products, a GELU and a rotary encoding, not through a vision
   encoder (3.1).
2. Each token has three indices (T, H, W); an image's tokens share one T and count rows and columns (3.1,
   Native-RoPE).
3. Attention has two more projections for space, `q_proj_hw` and `k_proj_hw`: queries and keys are [T, H, W], twice
   as wide as values, each part with its own norm and rotation; the scale stays head_dim^-1/2 (3.1, Multi-Head Native
   Attention).
4. Attention is causal in text and bidirectional within an image (3.1).
5. Layers [0, p) are the pre-Buffer, the others the post-LLM: one list, the same block (3.2).

Shapes: B rows, L new tokens, S keys (cached ones included), E hidden size, D patch features, A attention heads,
K key/value heads, d head_dim; P patches and V visual tokens of N images.
"""

from .attention_neo import plan_attention
from .cache_neo import CACHE_NAME, NeoCache, remember_end, rope_deltas_of
from .chat_neo import NeoChatMixin
from .checks_neo import check_input_ids, check_shard_index, check_token_ids
from .configuration_neo import NeoConfig, NeoTextConfig
from .generation_neo import NeoGenerationMixin
from .indexing_neo import allocate_position_ids, without_time
from .loss_neo import IGNORE_INDEX, NeoOutputHead, next_token_targets, target_weights, weighted_cross_entropy
from .native_primitive_neo import NeoAttention, NeoDecoderLayer
from .patch_embedding_neo import NeoPatchEmbedding, NeoPatchProjection
from .rotary_neo import rotary_tables
from .self_test_neo import check_transformers

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.masking_utils import find_packed_sequence_indices
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm
from transformers.utils import can_return_tuple, logging
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.import_utils import is_tracing
from transformers.utils.output_capturing import capture_outputs

logger = logging.get_logger(__name__)


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
    # Called with the model and its loading info after `from_pretrained`: support for other layouts hooks in here.
    loading_hooks: ClassVar[list[Callable]] = []

    def get_correct_attn_implementation(self, requested_attention: str | None, *args, **kwargs) -> str:
        """Default to "neo"."""
        return super().get_correct_attn_implementation(requested_attention or "neo", *args, **kwargs)

    def _init_weights(self, module: nn.Module):
        if isinstance(module, NeoPatchProjection):
            # PyTorch's default for Conv2d, scaled by the ratio of initializer_range to its default.
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

    # -1 matches no token: without image token ids, the model reads text only.
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

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, output_loading_info=False, **kwargs):
        """
        As in transformers, from a Hub id or a folder. If a checkpoint has no output head, the head is tied to the
        input embedding, whatever the configuration says.

        Raises:
            ImportError: NEO's self-test fails with the installed transformers, which is newer than those tested.
            OSError: A weight file cannot be read, or, in a folder, their index; the message names the checkpoint.
        """
        check_transformers(NeoForConditionalGeneration)
        # Evaluation harnesses for the released class pass these arguments of transformers 4 as False.
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
        except Exception:
            check_shard_index(os.path.join(str(pretrained_model_name_or_path), kwargs.get("subfolder") or ""))
            raise
        # Saving undoes these renamings. Under ZeRO-3, transformers also keeps those that matched no tensor.
        if renamings := getattr(model, "_weight_conversions", None):
            model._weight_conversions = [renaming for renaming in renamings if renaming.was_used()]
        for hook in cls.loading_hooks:
            hook(model, info)
        return (model, info) if output_loading_info else model


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
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        document_ids: torch.Tensor | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """
        Args:
            input_ids: (B, L) token ids; alternatively, give `inputs_embeds` (B, L, E).
            attention_mask: (B, S), 0 on padding, or a ready-made mask (see `plan_attention`).
            position_ids: (3, B, L) T, H and W indices. By default, those of text that follows the cache.
            document_ids: (B, L), the same for all tokens of a document in a packed row.

        Returns:
            `last_hidden_state` (B, L, E), after the final norm.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        cache = past_key_values if cache is None else cache
        if document_ids is not None:
            use_cache = False  # a packed row is never continued
        if use_cache and cache is None:
            cache = NeoCache(self.config)
        if position_ids is None:
            temporal = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)
            temporal = (temporal + (0 if cache is None else cache.get_seq_length())).expand(inputs_embeds.shape[:2])
            position_ids = torch.stack([temporal, torch.zeros_like(temporal), torch.zeros_like(temporal)])

        dropout = self.config.attention_dropout if self.training else 0.0
        attend, mask = plan_attention(
            self.config, inputs_embeds, attention_mask, position_ids, cache, document_ids, dropout
        )
        position_embeddings = rotary_tables(
            position_ids, self.config.head_dim, self.config.rope_parameters, inputs_embeds.dtype
        )
        hidden_states = inputs_embeds
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                position_embeddings=position_embeddings,
                attend=attend,
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
        The visual tokens, if images were given.
    """

    image_hidden_states: torch.Tensor | None = None


@dataclass
class NeoCausalLMOutputWithPast(CausalLMOutputWithPast):
    """
    image_hidden_states (`torch.Tensor` of shape `(V, E)`, *optional*):
        The visual tokens, if images were given.
    token_loss (`torch.Tensor` of shape `(B, L)`, *optional*):
        With `skip_logits`, the cross entropy of predicting the token after each, without a gradient; 0 where it does
        not count.
    """

    image_hidden_states: torch.Tensor | None = None
    token_loss: torch.Tensor | None = None


class HostFacts(NamedTuple):
    """
    What the host knows about the inputs of a forward, `None` where it is not known.

    image_grid_hw: (N, 2), in host memory.
    num_image_tokens: the number of image tokens in `input_ids`.
    num_targets: the number of tokens that count in the loss.
    """

    image_grid_hw: torch.Tensor | None
    num_image_tokens: int | None = None
    num_targets: int | None = None


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
        Embed images once, to reuse them in any number of calls as `mm_encoder_outputs={"image": ...}`.

        Args:
            pixel_values: (P, channels * patch_size * patch_size) normalised patches, from the image processor.
            image_grid_hw: (N, 2) (rows, columns) of each image in patches.
            image_grid_thw: (N, 3) (1, rows, columns), instead of `image_grid_hw`.

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
        if image_grid_hw.shape[0] == 0:  # collators produce this for samples without images
            return BaseModelOutputWithPooling(last_hidden_state=pixel_values, pooler_output=())
        features, tokens = self.patch_embed(pixel_values, image_grid_hw)
        if is_tracing(tokens):  # splitting would specialise the graph to the number of images
            return BaseModelOutputWithPooling(last_hidden_state=features, pooler_output=(tokens,))
        sizes = (image_grid_hw.prod(-1) // self.config.vision_config.spatial_merge_size**2).tolist()
        return BaseModelOutputWithPooling(last_hidden_state=features, pooler_output=tokens.split(sizes))

    def get_token_ids(self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> torch.Tensor:
        """
        Token ids (B, L) as needed for indices: `input_ids`, or if only embeddings are given, -1 except for
        `<IMG_CONTEXT>` and `<img>`, which are recognised by their embeddings. Visual tokens that are already filled
        in are not recognised: give `position_ids` with them.
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
        num_image_tokens: int | None = None,
    ) -> torch.Tensor:
        """
        T, H and W indices (3, B, L) of new tokens, continuing after the cached ones.

        Args:
            token_ids: (B, L) the new tokens.
            image_grid_hw: (N, 2) (rows, columns) in patches of the images among the new tokens.
            attention_mask: (B, S), 0 on padding, cached tokens included.
            past_key_values: the cache that the new tokens follow.
            document_ids: (B, L), the same for all tokens of a document in a packed row.
            num_image_tokens: the number of image tokens, if known, which saves counting them.
        """
        past_length = past_key_values.get_seq_length() if past_key_values is not None else 0
        position_ids = allocate_position_ids(
            token_ids,
            image_grid_hw,
            image_token_id=self._image_token_id,
            image_start_token_id=self._image_start_token_id,
            spatial_merge_size=self.config.vision_config.spatial_merge_size,
            # A 4-D mask does not identify padding, so padding counts too: this shifts all indices of a row equally.
            attention_mask=attention_mask[:, -token_ids.shape[1] :]
            if attention_mask is not None and attention_mask.ndim == 2
            else None,
            document_ids=document_ids,
            num_image_tokens=num_image_tokens,
        )
        if past_length:
            deltas = rope_deltas_of(past_key_values, past_length)
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
        host_facts: HostFacts | None = None,
        **kwargs,
    ) -> NeoModelOutputWithPast:
        """
        Args:
            input_ids: (B, L) token ids; alternatively, give `inputs_embeds` (B, L, E).
            attention_mask: (B, S), 0 on padding on either side; cached tokens included.
            position_ids: (3, B, L) T, H and W indices, computed by default. (B, L) indices that restart within a row
                mark packed documents, as in transformers; otherwise they are the indices of text.
            past_key_values: cached keys (B, K, S, 2d) and values (B, K, S, d); its newer name is `cache`.
            pixel_values: (P, channels * patch_size * patch_size) patches of all images, in prompt order.
            image_grid_hw: (N, 2) (rows, columns) of each image in patches.
            document_ids: (B, L), the same for all tokens of a document in a packed row, different for adjacent ones.
            mm_encoder_outputs: `{"image": ...}` from `get_image_features`, instead of `pixel_values`.
            image_grid_thw: (N, 3) (1, rows, columns), instead of `image_grid_hw`, as TRL's GRPO passes grids.
            host_facts: what `read_on_host` returned, if it was called before.

        Raises:
            ValueError: inputs are mutually exclusive, images and image tokens do not match in number, grids do not
                match the patches, or token ids have another shape or dtype or are outside the vocabulary.
        """
        check_input_ids(input_ids)
        cache = past_key_values if cache is None else cache
        image_grid_hw = without_time(image_grid_hw, image_grid_thw)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        if document_ids is not None and cache is not None:
            raise ValueError("document_ids describe whole packed rows, which cannot follow a cache.")
        for name in ("output_hidden_states", "output_attentions"):
            if getattr(self.config, name):  # the decoder reads only its own configuration
                kwargs.setdefault(name, True)

        num_image_tokens = None
        if inputs_embeds is None:
            assert input_ids is not None
            image_grid_hw, num_image_tokens, _ = host_facts or self.read_on_host(input_ids, image_grid_hw)
            inputs_embeds = self.get_input_embeddings()(input_ids)
        visual_tokens = self._embed_images(pixel_values, image_grid_hw, mm_encoder_outputs)
        needs_ids = visual_tokens is not None or position_ids is None or position_ids.ndim == 2
        token_ids = self.get_token_ids(input_ids, inputs_embeds) if needs_ids else None
        inputs_embeds = self._place_images(inputs_embeds, token_ids, visual_tokens, num_image_tokens)
        if position_ids is not None and position_ids.ndim == 2:
            position_ids, document_ids = self._read_text_positions(
                position_ids, inputs_embeds, attention_mask, cache, document_ids, visual_tokens is not None
            )
        if position_ids is None:
            assert token_ids is not None
            position_ids = self.get_position_ids(
                token_ids, image_grid_hw, attention_mask, cache, document_ids, num_image_tokens
            )
        elif position_ids.shape[0] != 3:
            raise ValueError(
                f"position_ids must be (3, rows, tokens) or (rows, tokens), got {tuple(position_ids.shape)}."
            )

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
        known_ids = token_ids if input_ids is None else input_ids
        remember_end(outputs.get(CACHE_NAME), position_ids, known_ids, attention_mask, self._image_start_token_id)
        return NeoModelOutputWithPast(**outputs, image_hidden_states=visual_tokens)

    def read_on_host(
        self,
        input_ids: torch.Tensor,
        image_grid_hw: torch.Tensor | None,
        weights: torch.Tensor | None = None,
    ) -> HostFacts:
        """
        Get what the host must know about the inputs in a single read from the device; a decoding step needs none.

        Args:
            weights: of the targets in the loss, to count those that are not 0.

        Raises:
            ValueError: a token id is outside the vocabulary.
        """
        if is_tracing(input_ids):
            return HostFacts(image_grid_hw)
        if input_ids.shape[-1] < 2:
            return HostFacts(image_grid_hw, 0 if image_grid_hw is None else None)
        is_image = input_ids == self._image_token_id
        facts = torch.stack([*input_ids.aminmax(), is_image.sum()])
        is_on_device = (
            isinstance(image_grid_hw, torch.Tensor)
            and image_grid_hw.device == input_ids.device
            and not image_grid_hw.is_floating_point()
        )
        if is_on_device:
            facts = torch.cat([facts, image_grid_hw.flatten()])  # type: ignore[union-attr]
        if weights is not None:
            facts = torch.cat([facts, weights.count_nonzero()[None].to(facts.device)])
        low, high, num_image_tokens, *rest = facts.tolist()
        check_token_ids(low, high, self.config.text_config.vocab_size)
        num_targets = None if weights is None else rest.pop()
        if is_on_device:
            image_grid_hw = torch.tensor(rest, dtype=torch.long).view(image_grid_hw.shape)  # type: ignore[union-attr]
        return HostFacts(image_grid_hw, num_image_tokens, num_targets)

    def _embed_images(self, pixel_values, image_grid_hw, mm_encoder_outputs) -> torch.Tensor | None:
        """Visual tokens (V, E) of all images, `None` if there are none."""
        features = (mm_encoder_outputs or {}).get("image")
        if pixel_values is not None:
            if features is not None:
                raise ValueError("Give either pixel_values or mm_encoder_outputs['image'], not both.")
            features = self.get_image_features(pixel_values, image_grid_hw, return_dict=True)
        if features is None or not len(features.pooler_output):
            return None
        return torch.cat(tuple(features.pooler_output))

    def _place_images(
        self,
        inputs_embeds: torch.Tensor,
        token_ids: torch.Tensor | None,
        visual_tokens: torch.Tensor | None,
        num_image_tokens: int | None,
    ) -> torch.Tensor:
        """`inputs_embeds` (B, L, E) with `<IMG_CONTEXT>` replaced by the visual tokens (V, E)."""
        if visual_tokens is not None:
            assert token_ids is not None
            is_image = token_ids == self._image_token_id
            if num_image_tokens is None and not is_tracing(visual_tokens):
                num_image_tokens = int(is_image.sum())
            if num_image_tokens is not None and num_image_tokens != visual_tokens.shape[0]:
                raise ValueError(
                    f"Image tokens and images do not match: the input holds {num_image_tokens} image tokens (id "
                    f"{self.config.image_token_id}), the images give {visual_tokens.shape[0]} visual tokens."
                )
            visual_tokens = visual_tokens.to(inputs_embeds.device, inputs_embeds.dtype)
            return inputs_embeds.masked_scatter(is_image[..., None], visual_tokens)
        if self.training and torch.is_grad_enabled():
            # Batches of text alone also run the patch embedding, multiplied by zero: distributed processes gather its
            # weights and average its gradients together, whether or not each of them has images.
            vision, merge = self.config.vision_config, self.config.vision_config.spatial_merge_size
            blank = torch.zeros(merge**2, vision.num_channels * vision.patch_size**2, device=inputs_embeds.device)
            _, blank_token = self.patch_embed(blank, torch.tensor([[merge, merge]]))
            return inputs_embeds + 0 * blank_token.to(inputs_embeds)
        return inputs_embeds

    def _read_text_positions(
        self, position_ids, inputs_embeds, attention_mask, cache, document_ids, has_images: bool
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """
        Interpret two-dimensional `position_ids` as indices (3, B, L) of text, or as documents of packed rows. The
        indices are `None` if they must still be allocated, since one number per token cannot place images.
        """
        position_ids = position_ids.expand(inputs_embeds.shape[:2])
        is_unpadded = attention_mask is None or bool((attention_mask == 1).all())
        if document_ids is None and is_unpadded and cache is None:
            document_ids = find_packed_sequence_indices(position_ids)
        if document_ids is not None or has_images:
            return None, document_ids
        return torch.stack([position_ids, torch.zeros_like(position_ids), torch.zeros_like(position_ids)]), None


class NeoForConditionalGeneration(NeoPreTrainedModel, NeoGenerationMixin, NeoChatMixin):
    """NEO with its output head: reads text and images, writes text."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: NeoConfig):
        super().__init__(config)
        self.model = NeoModel(config)
        self.lm_head = NeoOutputHead(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.loss_function = weighted_cross_entropy
        self.post_init()

    def mark_tied_weights_as_initialized(self, loading_info):
        # A checkpoint without a head is tied, whatever its configuration says. Set this before transformers
        # initialises and reports missing weights.
        head, embedding = next(iter(self._tied_weights_keys.items()))
        if head in loading_info.missing_keys and embedding not in loading_info.missing_keys:
            self.config.tie_word_embeddings = self.config.text_config.tie_word_embeddings = True
            self.all_tied_weights_keys = self.get_expanded_tied_weights_keys(all_submodels=True)
        super().mark_tied_weights_as_initialized(loading_info)

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
        kernel_options: dict | None = None,
        **kwargs,
    ) -> NeoCausalLMOutputWithPast:
        """
        As `NeoModel.forward`, with these additional arguments.

        Args:
            labels: (B, L) token ids, each predicted from the position before it, -100 to ignore. `<IMG_CONTEXT>`,
                padding and the first token of a document never count.
            logits_to_keep: number of last tokens to compute logits for, 0 for all; or an index tensor of tokens.
            loss_weight: (B, L), the weight of each label in the loss; 1 by default.
            num_items_in_batch: divisor of the loss, instead of this batch's sum of weights.
            skip_logits: return losses without logits, which takes a fraction of the memory.
            kernel_options: options of FlexAttention, if it is used.
            shift_labels: (B, kept tokens) targets that are already shifted, instead of `labels`; as in transformers.

        Returns:
            `logits` (B, L, vocabulary) and, with labels, `loss`: the weighted mean cross entropy, 0 if no
            token counts. With `skip_logits`, `token_loss` (B, L) in place of the logits.
        """
        check_input_ids(input_ids)
        # Not a parameter: the Trainer's evaluation loss requires every parameter with "label" in its name.
        shift_labels = kwargs.pop("shift_labels", None)
        if use_cache is None and (labels is not None or shift_labels is not None):
            use_cache = False  # gradient checkpointing runs layers twice, which would fill it twice
        if kernel_options is not None:
            kwargs["kernel_options"] = kernel_options
        image_grid_hw = without_time(image_grid_hw, image_grid_thw)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        tokens = input_ids if inputs_embeds is None else inputs_embeds
        if labels is not None and shift_labels is None and tokens is not None:
            num_kept = len(range(tokens.shape[1])[kept]) if isinstance(kept, slice) else len(kept)
            if num_kept != labels.shape[1]:
                raise ValueError(
                    f"labels of {labels.shape[1]} tokens need the logits of all of them, but logits_to_keep keeps "
                    f"{num_kept}. Give shift_labels of the tokens that are kept."
                )
        targets, weights = self._find_targets(labels, shift_labels, loss_weight, attention_mask, document_ids)
        if skip_logits and targets is None:
            raise ValueError("skip_logits=True leaves nothing to compute without labels.")
        # A wrapped or replaced head (an adapter) returns only logits, and a custom loss needs them.
        skips_logits = (
            skip_logits and isinstance(self.lm_head, NeoOutputHead) and self.loss_function is weighted_cross_entropy
        )
        host_facts = None
        if skips_logits and input_ids is not None:
            host_facts = self.model.read_on_host(input_ids, image_grid_hw, weights)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            cache=cache,
            inputs_embeds=inputs_embeds,
            pixel_values=pixel_values,
            image_grid_hw=image_grid_hw,
            document_ids=document_ids,
            mm_encoder_outputs=mm_encoder_outputs,
            use_cache=use_cache,
            host_facts=host_facts,
            return_dict=True,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state[:, kept]
        if targets is not None and weights is not None:
            targets, weights = targets.to(hidden_states.device), weights.to(hidden_states.device)
        logits = loss = token_loss = None
        if skips_logits:
            assert targets is not None
            assert weights is not None
            total = weights.sum() if num_items_in_batch is None else num_items_in_batch
            is_counted = weights.flatten() != 0
            if host_facts is None or host_facts.num_targets is None:
                counted = is_counted.nonzero()[:, 0]  # once, since the host waits for their number
            else:
                counted = is_counted.int().argsort(descending=True, stable=True)[: host_facts.num_targets]
            loss, counted_loss = self.lm_head(
                *(x.flatten(0, 1)[counted] for x in (hidden_states, targets, weights)), total
            )
            token_loss = counted_loss.new_zeros(weights.numel()).index_copy(0, counted, counted_loss)
            token_loss = token_loss.view_as(weights)
        else:
            logits = self.lm_head(hidden_states)
            if targets is not None:
                loss = self.loss_function(
                    logits=logits,
                    labels=labels,
                    vocab_size=self.config.text_config.vocab_size,
                    num_items_in_batch=num_items_in_batch,
                    shift_labels=targets,
                    loss_weight=weights,
                    **kwargs,
                )
        return NeoCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
            token_loss=token_loss,
            **{CACHE_NAME: outputs.get(CACHE_NAME)},
        )

    def _find_targets(
        self, labels, shift_labels, loss_weight, attention_mask, document_ids
    ) -> tuple[torch.Tensor, torch.Tensor] | tuple[None, None]:
        """Target and weight (B, kept tokens) of each token whose logits are kept, `None` without labels."""
        if shift_labels is not None:
            targets = shift_labels.masked_fill(shift_labels == self._image_token_id, IGNORE_INDEX)
            return targets, target_weights(targets, None if loss_weight is None else loss_weight.to(targets.device))
        if labels is None:
            return None, None
        return next_token_targets(
            labels,
            image_token_id=self._image_token_id,
            loss_weight=loss_weight,
            attention_mask=attention_mask,
            document_ids=document_ids,
        )


__all__ = ["NeoForConditionalGeneration", "NeoModel", "NeoPreTrainedModel", "NeoTextModel"]
