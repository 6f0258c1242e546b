"""NEO's attention mask: text is causal, a picture is bidirectional inside, documents of a packed row are apart."""

from .configuration_neo import NeoTextConfig
from .indexing_neo import document_starts, picture_ids

import copy

import torch
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask
from transformers.utils.import_utils import is_tracing


def attention_implementation(config: NeoTextConfig, length: int) -> str:
    """The implementation that attends `length` queries: FlexAttention has nothing to win on a single one."""
    implementation = config._attn_implementation
    return "sdpa" if implementation == "flex_attention" and length == 1 else implementation


def create_neo_mask(
    config: NeoTextConfig,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    past_key_values: Cache | None,
    position_ids: torch.Tensor,
    document_ids: torch.Tensor | None = None,
):
    """
    The attention mask of NEO, in the form that the attention implementation takes: a query sees a key of its own
    document that stands before it or belongs to the same picture (NEO paper, section 3.1).

    Args:
        inputs_embeds: (B, L, ...), looked at for shape, dtype and device only.
        attention_mask: (B, S), 0 on padding, or a mask that is already in that form, which is returned as it is.
        position_ids: (3, B, L) T, H and W indices of the new tokens. Pictures lie wholly within the new tokens.
        document_ids: (B, L), equal on the tokens of one document of a packed row.

    Returns:
        What `transformers.masking_utils.create_causal_mask` returns; `None` where plain causal attention is right.
    """
    length = inputs_embeds.shape[1]
    positions = None
    if document_ids is not None:
        # transformers knows packed rows by positions that start anew, and looks for those only where there is no
        # attention mask: padding becomes a document of its own.
        if attention_mask is not None:
            document_ids = document_ids.masked_fill(attention_mask == 0, document_ids.min() - 1)
            attention_mask = None
        places = torch.arange(length, device=document_ids.device)
        positions = places - torch.where(document_starts(document_ids), places, 0).cummax(-1).values
    pictures = None
    if length > 1:
        pictures = picture_ids(position_ids[0], document_ids)
        if not is_tracing(pictures) and not (pictures >= 0).any():
            pictures = None  # text only: causal kernels without a mask apply
    if pictures is not None and past_key_values is not None:
        # The mask is indexed by place in the cache. Cached tokens need no numbers: no picture reaches back to them.
        kv_length, _ = past_key_values.get_mask_sizes(length, 0)
        places = torch.arange(length, device=pictures.device) + past_key_values.get_query_offset(0)
        pictures = pictures.new_full((pictures.shape[0], kv_length), -1).index_copy(1, places, pictures)
    if (implementation := attention_implementation(config, length)) != config._attn_implementation:
        config = copy.copy(config)
        config._attn_implementation = implementation
    return create_causal_mask(
        config,
        inputs_embeds,
        attention_mask,
        past_key_values,
        position_ids=positions,
        block_sequence_ids=pictures,
    )
