"""NEO's attention mask: text is causal, an image is bidirectional inside, documents of a packed row are apart."""

from .attention_neo import KeyRuns, can_compile_kernels
from .configuration_neo import NeoTextConfig
from .indexing_neo import document_starts, image_ids

import copy

import torch
from torch.nn import functional as F
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask
from transformers.utils import logging
from transformers.utils.import_utils import is_tracing

logger = logging.get_logger(__name__)

# On CUDA, shorter prompts go by SDPA with a dense mask: compiling a kernel takes longer than all of them together.
MIN_FLEX_LENGTH = 1024


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
    document that stands before it or belongs to the same image (NEO paper, section 3.1).

    Args:
        inputs_embeds: (B, L, ...), looked at for shape, dtype and device only.
        attention_mask: (B, S), 0 on padding, or a mask that is already in that form, which is returned as it is.
        position_ids: (3, B, L) T, H and W indices of the new tokens. Images lie wholly within the new tokens.
        document_ids: (B, L), equal on the tokens of one document of a packed row.

    Returns:
        For "neo", `KeyRuns` where there are several queries, unless SDPA is the better choice; for "flex_attention" a
        `BlockMask`. Else what `transformers.masking_utils.create_causal_mask` returns, `None` where plain causal
        attention is right.
    """
    if attention_mask is not None and not (isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2):
        return attention_mask
    length = inputs_embeds.shape[1]
    implementation = config._attn_implementation
    if length == 1 and implementation != "eager" and attention_mask is None and not _is_static(past_key_values):
        return None  # a single query sees all keys
    padding = attention_mask
    if document_ids is not None and attention_mask is not None:
        # Padding becomes a document of its own.
        document_ids = document_ids.masked_fill(attention_mask == 0, document_ids.min() - 1)
        attention_mask = None
    images = image_ids(position_ids[0], document_ids) if length > 1 else None
    if images is not None and not is_tracing(images):
        if not (images >= 0).any():
            images = None  # text only: causal kernels without a mask apply
        if _takes_runs(config, inputs_embeds, images, document_ids, attention_mask):
            runs = find_key_runs(inputs_embeds, padding, past_key_values, images, document_ids)
            if runs is not None:
                return runs.block_mask if implementation == "flex_attention" else runs

    positions = None
    if document_ids is not None:
        # transformers knows packed rows by positions that start anew, and looks for those only where there is no
        # attention mask.
        places = torch.arange(length, device=document_ids.device)
        positions = places - torch.where(document_starts(document_ids), places, 0).cummax(-1).values
    if images is not None and past_key_values is not None:
        # The mask is indexed by place in the cache. Cached tokens need no numbers: no image reaches back to them.
        kv_length, _ = past_key_values.get_mask_sizes(length, 0)
        places = torch.arange(length, device=images.device) + past_key_values.get_query_offset(0)
        images = images.new_full((images.shape[0], kv_length), -1).index_copy(1, places, images)
    if implementation == "neo" or (implementation == "flex_attention" and length == 1):
        config = copy.copy(config)
        config._attn_implementation = "sdpa"
    return create_causal_mask(
        config,
        inputs_embeds,
        attention_mask,
        past_key_values,
        position_ids=positions,
        block_sequence_ids=images,
        # To find out that a single query may do without a mask, a GPU would have to be waited for.
        allow_is_causal_skip=length > 1,
    )


def _is_static(past_key_values: Cache | None) -> bool:
    return getattr(past_key_values, "is_compileable", False)


def _takes_runs(config: NeoTextConfig, inputs_embeds: torch.Tensor, images, document_ids, attention_mask) -> bool:
    """Whether attention goes by `KeyRuns`, if the mask allows it; docs/design.md says why."""
    if config._attn_implementation == "flex_attention":
        return True
    if config._attn_implementation != "neo" or config.attention_dropout:
        return False
    if inputs_embeds.device.type != "cuda":
        return inputs_embeds.device.type == "cpu"
    is_causal = images is None and document_ids is None and (attention_mask is None or bool(attention_mask.all()))
    if is_causal or inputs_embeds.shape[1] < MIN_FLEX_LENGTH:
        return False
    if not can_compile_kernels("cuda"):
        logger.warning_once(
            "FlexAttention needs Triton and a C compiler, which were not found: attention goes by SDPA, with a mask "
            "whose size is the square of the length."
        )
        return False
    return True


def find_key_runs(
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    past_key_values: Cache | None,
    images: torch.Tensor | None,
    document_ids: torch.Tensor | None = None,
) -> KeyRuns | None:
    """
    Which keys each new token sees, in time that grows with the length.

    Args:
        inputs_embeds: (B, L, ...), looked at for shape and device only.
        attention_mask: (B, S), 0 on padding.
        images: (B, L) from `image_ids`, or None where all is text.
        document_ids: (B, L), equal on the tokens of one document. Padding is not of the document next to it.

    Returns:
        None where padding stands between tokens that see each other: that is more than one run of keys.
    """
    rows, length = inputs_embeds.shape[:2]
    offset, num_keys = 0, length
    if past_key_values is not None:
        offset = int(past_key_values.get_query_offset(0))
        num_keys, _ = past_key_values.get_mask_sizes(length, 0)
    end = offset + length
    places = torch.arange(offset, end, device=inputs_embeds.device).expand(rows, -1)
    first, last = torch.zeros_like(places), places + 1
    if images is not None:
        goes_on = F.pad((images[:, 1:] == images[:, :-1]) & (images[:, 1:] >= 0), (0, 1))
        last = last.masked_fill(goes_on, end).flip(-1).cummin(-1).values.flip(-1)
    if document_ids is not None:
        first = torch.where(document_starts(document_ids), places, 0).cummax(-1).values
    if attention_mask is not None:
        if attention_mask.shape[1] < end or (past_key_values is None and attention_mask.shape[1] > end):
            return None
        attended = attention_mask[:, :end] != 0
        if document_ids is None:
            first = attended.int().argmax(-1, keepdim=True)
            stop = first + attended.sum(-1, keepdim=True)
            everything = torch.arange(end, device=attended.device)
            if not torch.equal(attended, (everything >= first) & (everything < stop)):
                return None
            last = last.minimum(stop)
        is_padding = ~attended[:, offset:]
        first, last = first.expand_as(last).masked_fill(is_padding, num_keys), last.masked_fill(is_padding, 0)
    return KeyRuns(first, last, num_keys)
