"""The training loss: weighted cross entropy of the next token, where that is text of the same document.

Shapes: B rows, L tokens, E hidden size. Weights and normalisation as in training the released models
("token", "square", "sample": which weights a token gets is the collator's business).
"""

from .configuration_neo import NeoConfig  # noqa: F401  (imported first: it refuses an unsupported transformers)
from .indexing_neo import document_starts

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

IGNORE_INDEX = -100


def next_token_targets(
    labels: torch.Tensor,
    *,
    image_token_id: int,
    loss_weight: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    document_ids: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    What each token is to predict. Pixels, padding and the first tokens of rows and documents are predicted by nobody.

    Args:
        labels: (B, L) token ids, -100 where a token is not to be predicted.
        image_token_id: id of `<IMG_CONTEXT>`.
        loss_weight: (B, L), the weight of predicting each token, aligned with `labels`; 1 where not given.
        attention_mask: (B, S), 0 on padding, cached tokens included. One of another rank says nothing of padding.
        document_ids: (B, L), equal on the tokens of one document of a packed row.

    Returns:
        Targets (B, L) int64, the token after each or -100, and their weights (B, L) float32, 0 there.

    Raises:
        ValueError: `loss_weight` has another shape than `labels`.
    """
    if loss_weight is not None and loss_weight.shape != labels.shape:
        raise ValueError(
            f"loss_weight must have the shape of labels {tuple(labels.shape)}, got {tuple(loss_weight.shape)}."
        )
    ignored = labels == image_token_id
    predicts_nothing = torch.zeros_like(ignored)
    if attention_mask is not None and attention_mask.ndim == 2:
        predicts_nothing = attention_mask[:, -labels.shape[1] :].to(labels.device) == 0
        ignored = ignored | predicts_nothing
    if document_ids is not None:
        ignored = ignored | document_starts(document_ids.to(labels.device))
    targets = F.pad(labels.masked_fill(ignored, IGNORE_INDEX)[:, 1:], (0, 1), value=IGNORE_INDEX)
    targets = targets.masked_fill(predicts_nothing, IGNORE_INDEX)
    weights = None if loss_weight is None else F.pad(loss_weight[:, 1:].to(labels.device), (0, 1))
    return targets, target_weights(targets, weights)


def target_weights(targets: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    """`weights` of `targets` (both (B, L)) as float32, 1 where not given, 0 where the target is -100."""
    counted = targets != IGNORE_INDEX
    return counted.float() if weights is None else weights.float().masked_fill(~counted, 0)


def weighted_cross_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor | None,
    vocab_size: int,
    num_items_in_batch: torch.Tensor | int | None = None,
    shift_labels: torch.Tensor | None = None,
    loss_weight: torch.Tensor | None = None,
    **kwargs,
) -> torch.Tensor:
    """
    sum(weight * cross entropy) / sum(weight), in float32; called as the losses of transformers are.

    Args:
        logits: (..., vocabulary).
        labels: (..., L), to be shifted by one, where there are no `shift_labels`.
        num_items_in_batch: divide by this in place of this batch's own sum of weights: the sum over all batches and
            processes of a step, so that each token counts alike in whichever of them it is.
        shift_labels: (...,) the target of each position, -100 where there is none.
        loss_weight: (...,) aligned with `shift_labels`; 1 where not given.

    Returns:
        Scalar; 0, with a gradient of 0, where no token has a target.
    """
    if shift_labels is None:
        assert labels is not None
        shift_labels = F.pad(labels[..., 1:], (0, 1), value=IGNORE_INDEX)
    shift_labels = shift_labels.to(logits.device)
    token_loss = F.cross_entropy(
        logits.reshape(-1, vocab_size).float(), shift_labels.flatten(), reduction="none", ignore_index=IGNORE_INDEX
    )
    weights = target_weights(shift_labels, loss_weight).to(logits.device).flatten()
    total = weights.sum() if num_items_in_batch is None else torch.as_tensor(num_items_in_batch).to(logits.device)
    return (token_loss * weights).sum() / torch.where(total > 0, total, 1)


class NeoOutputHead(nn.Linear):
    """Hidden states to logits, or straight to the loss: then only the logits of a few tokens exist at a time."""

    # About 1.2 GB in float32 with 151,936 words, backward pass included.
    chunk_tokens = 512

    def forward(
        self,
        hidden_states: torch.Tensor,
        targets: torch.Tensor | None = None,
        loss_weight: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """
        Args:
            hidden_states: (..., E), or (tokens, E) where there are targets.
            targets: (tokens,) the target of each token.
            loss_weight: (tokens,) their weights.
            num_items_in_batch: what to divide the loss by.

        Returns:
            Logits (..., vocabulary); or with targets the loss, a scalar, in one call of this module: FSDP and ZeRO
            gather its weights for a call, and expect the same calls from all processes.
        """
        if targets is None or loss_weight is None:
            return super().forward(hidden_states)

        def chunk_loss(hidden_states: torch.Tensor, targets: torch.Tensor, loss_weight: torch.Tensor) -> torch.Tensor:
            logits = F.linear(hidden_states, self.weight)
            return weighted_cross_entropy(
                logits, None, logits.shape[-1], num_items_in_batch, shift_labels=targets, loss_weight=loss_weight
            )

        # Without tokens there is one empty chunk, which has a gradient.
        chunks = zip(*(x.split(self.chunk_tokens) for x in (hidden_states, targets, loss_weight)), strict=True)
        return torch.stack([checkpoint(chunk_loss, *chunk, use_reentrant=False) for chunk in chunks]).sum()


__all__ = ["NeoOutputHead", "weighted_cross_entropy"]
