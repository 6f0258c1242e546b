"""The native primitive: a Qwen3 block with Multi-Head Native Attention (NEO paper, section 3.1)."""

from .attention_neo import even_parts
from .configuration_neo import NeoTextConfig
from .rotary_neo import apply_rotary

from collections.abc import Callable

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP, Qwen3RMSNorm
from transformers.utils.import_utils import is_tracing

# Tokens of a row that an MLP processes at once without gradients. Otherwise, its activations would take most of the
# memory of a long prompt.
MLP_CHUNK = 1024
# Tokens whose queries or keys are normalised and rotated at once on a CPU without gradients. Otherwise, the results in
# between would not stay in the processor's caches, and for a long prompt the allocator would return each of them to
# the system, which clears every page of the next.
ROTARY_CHUNK = 256


class NeoAttention(nn.Module):
    """Multi-Head Native Attention (NEO paper, section 3.1)."""

    is_causal = True  # if there is no mask, as for text alone

    def __init__(self, config: NeoTextConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = config.head_dim**-0.5  # the LLM's scale, although queries and keys are 2 * head_dim wide
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
        attend: Callable,
        attention_mask=None,
        past_key_values: Cache | None = None,
        cache: Cache | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        hidden_states (B, L, E) -> (B, L, E) and, in eager mode, the weights (B, A, L, S). `attend` and
        `attention_mask` come from `plan_attention`.
        """
        cache = past_key_values if cache is None else cache
        d = self.head_dim
        widths = (d // 2, d // 4, d // 4)
        at_once = torch.is_grad_enabled() or is_tracing(hidden_states) or hidden_states.device.type != "cpu"

        def thw(temporal: nn.Linear, spatial: nn.Linear, *norms: nn.Module) -> torch.Tensor:
            def normalize_and_rotate(temporal, spatial, cos, sin):
                cos, sin = (table.split(widths, dim=-1) for table in (cos, sin))
                halves: list[torch.Tensor] = []
                for x, norm, c, s in zip((temporal, *spatial.chunk(2, dim=-1)), norms, cos, sin, strict=True):
                    halves += apply_rotary(norm(x), c, s)
                # Under autocast norms return float32, which some kernels cannot combine with half-precision values.
                return torch.cat(halves, dim=-1).to(spatial.dtype)  # (B, L, heads, 2d)

            projected = [projection(hidden_states).unflatten(-1, (-1, d)) for projection in (temporal, spatial)]
            inputs = (*projected, *position_embeddings)
            if at_once or hidden_states.shape[1] <= ROTARY_CHUNK:
                return normalize_and_rotate(*inputs).transpose(1, 2)
            result = projected[0].new_empty(*projected[0].shape[:-1], 2 * d)
            for chunk, *parts in zip(*(x.split(ROTARY_CHUNK, dim=1) for x in (result, *inputs)), strict=True):
                chunk.copy_(normalize_and_rotate(*parts))
            return result.transpose(1, 2)  # (B, heads, L, 2d)

        query = thw(self.q_proj, self.q_proj_hw, self.q_norm, self.q_norm_h, self.q_norm_w)
        key = thw(self.k_proj, self.k_proj_hw, self.k_norm, self.k_norm_h, self.k_norm_w)
        value = self.v_proj(hidden_states).unflatten(-1, (-1, d)).transpose(1, 2)  # (B, K, L, d)

        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)

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
        return self.o_proj(output.reshape(*hidden_states.shape[:-1], -1)), weights


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
        for start, end in even_parts(0, hidden_states.shape[1], MLP_CHUNK):
            chunk = hidden_states[:, start:end]
            chunk += self.mlp(self.post_attention_layernorm(chunk))  # in place: nothing else holds this tensor
        return hidden_states


__all__ = ["NeoAttention", "NeoDecoderLayer"]
