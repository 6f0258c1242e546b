"""NEO's own modules in vLLM's Transformers backend."""

from ..configuration_neo import NeoConfig
from ..indexing_neo import allocate_position_ids
from ..modeling_neo import NeoModel
from ..native_primitive_neo import NeoAttention
from .attention import check_backend, own_backend
from .configuration import SCHEDULER
from .processing import NeoDummyInputsBuilder, NeoMultiModalProcessor, NeoProcessingInfo

import torch
from transformers import AutoModel
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.transformers import TransformersMultiModalForCausalLM
from vllm.model_executor.models.utils import maybe_prefix
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFeatureSpec
from vllm.sequence import IntermediateTensors


@MULTIMODAL_REGISTRY.register_processor(
    NeoMultiModalProcessor, info=NeoProcessingInfo, dummy_inputs=NeoDummyInputsBuilder
)
class NeoForVllm(TransformersMultiModalForCausalLM):
    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        if vllm_config.scheduler_config.scheduler_cls != SCHEDULER:
            raise ValueError(
                "NEO's scheduler is missing: this version of vLLM does not apply the settings of plug-ins."
            )
        heads = vllm_config.model_config.hf_text_config.num_key_value_heads
        processes = vllm_config.parallel_config.tensor_parallel_size
        if heads % processes:
            raise ValueError(
                f"The {heads} key/value heads cannot be divided among tensor_parallel_size={processes} processes."
            )
        # vLLM puts its own head on the base model; elsewhere, AutoModel gives the model that has one.
        AutoModel.register(NeoConfig, NeoModel, exist_ok=True)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        # Recorded CUDA graphs read the same memory in every step.
        size = vllm_config.scheduler_config.max_num_batched_tokens
        self.positions = torch.zeros(3, 1, size, dtype=torch.long)

    def _create_attention_instances(self, prefix: str = ""):
        for name, module in self.model.named_modules(prefix="model"):
            if isinstance(module, NeoAttention):
                attention = Attention(
                    num_heads=self.model_config.get_num_attention_heads(self.parallel_config),
                    head_size=self.text_config.qk_head_dim,
                    scale=module.scaling,
                    num_kv_heads=self.model_config.get_num_kv_heads(self.parallel_config),
                    cache_config=self.cache_config,
                    quant_config=self.quant_config,
                    prefix=maybe_prefix(prefix, f"{name}.attn"),
                    attn_backend=own_backend(),
                )
                if self.model_config.is_mm_prefix_lm:
                    check_backend(attention.attn_backend.get_name())
                module.attn = attention

    def get_mrope_input_positions(
        self, input_tokens: list[int], mm_features: list[MultiModalFeatureSpec]
    ) -> tuple[torch.Tensor, int]:
        """
        Indices (3, L) of a prompt, as (T, T + H, T + W): vLLM gives generated tokens three equal numbers, which stand
        for H = W = 0 then. And what must be added to the number of a generated token to get its T.
        """
        token_ids = torch.tensor(input_tokens)
        # Clients may send any token ids: only those that stand for an image are visual tokens.
        token_ids[token_ids == self.config.image_token_id] = -1
        for feature in mm_features:
            for first, last in feature.mm_position.extract_embeds_range():
                token_ids[first : last + 1] = self.config.image_token_id
        grids = [_each_frame(feature.data[f"{feature.modality}_grid_thw"].data[None]) for feature in mm_features]
        indices = allocate_position_ids(
            token_ids[None],
            torch.cat(grids) if grids else None,
            image_token_id=self.config.image_token_id,
            image_start_token_id=self.config.image_start_token_id,
            spatial_merge_size=self.config.vision_config.spatial_merge_size,
        )[:, 0]
        next_index = int(indices[0, -1]) + 1 + int(token_ids[-1] == self.config.image_start_token_id)
        indices[1:] += indices[0].clone()
        return indices, next_index - len(input_tokens)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs,
    ) -> torch.Tensor | IntermediateTensors:
        if intermediate_tensors is not None:
            inputs_embeds = intermediate_tensors["hidden_states"]
        position_ids = self.positions[..., : positions.shape[-1]]
        position_ids[:, 0].copy_(positions)
        position_ids[1:] -= position_ids[0]
        outputs = self.model.language_model(
            input_ids=input_ids[None] if inputs_embeds is None else None,  # type: ignore[index]
            inputs_embeds=None if inputs_embeds is None else inputs_embeds[None],
            position_ids=position_ids,
            use_cache=False,
            return_dict=True,
        )
        hidden_states = outputs.last_hidden_state[0]
        return hidden_states if self.pp_group.is_last_rank else IntermediateTensors({"hidden_states": hidden_states})

    def embed_multimodal(self, **kwargs) -> list[torch.Tensor]:
        """The visual tokens (V, E) of each image and of each video."""
        tokens = []
        for pixels, grid in (("pixel_values", "image_grid_thw"), ("pixel_values_videos", "video_grid_thw")):
            if kwargs.get(pixels) is not None:
                frames = kwargs[grid]
                features = self.model.get_image_features(kwargs[pixels], _each_frame(frames), return_dict=True)
                sizes = frames.prod(-1) // self.config.vision_config.spatial_merge_size**2
                tokens += torch.cat(features.pooler_output).split(sizes.tolist())
        return tokens


def _each_frame(grid_thw: torch.Tensor) -> torch.Tensor:
    """(frames, rows, columns) of images and videos (N, 3) -> (rows, columns) of each frame."""
    return grid_thw[:, 1:].repeat_interleave(grid_thw[:, 0], dim=0)
