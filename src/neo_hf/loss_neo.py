"""The training loss: weighted cross entropy of the next token, if it is text in the same document.

Shapes: B rows, L tokens, E hidden size. Weighting and normalisation are as in the training of the released models; the
collator chooses the weights ("token", "square" or "sample").
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
    The target of each token. Visual tokens, padding and the first tokens of rows and documents are never targets.

    Args:
        labels: (B, L) token ids, -100 to ignore.
        image_token_id: id of `<IMG_CONTEXT>`.
        loss_weight: (B, L), the weight of each label; 1 by default.
        attention_mask: (B, S), 0 on padding, cached tokens included. Masks of another rank are ignored.
        document_ids: (B, L), the same for all tokens of a document in a packed row.

    Returns:
        Targets (B, L) int64, the token after each or -100, and their weights (B, L) float32, 0 where it
            is -100.

    Raises:
        ValueError: `loss_weight` does not have the shape of `labels`.
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
    """`weights` of `targets` (both (B, L)) as float32, 1 by default, 0 where the target is -100."""
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
    sum(weight * cross entropy) / sum(weight), in float32, with the signature of transformers' losses.

    Args:
        logits: (..., vocabulary).
        labels: (..., L), shifted by one in here; used if there are no `shift_labels`.
        num_items_in_batch: divisor instead of this batch's sum of weights: the sum over all batches and processes of
            a step, so that each token counts equally.
        shift_labels: (...,) the target of each position, -100 where there is none.
        loss_weight: (...,) aligned with `shift_labels`; 1 by default.

    Returns:
        Scalar; 0, with a gradient of 0, if no token has a target.
    """
    if shift_labels is None:
        assert labels is not None
        shift_labels = F.pad(labels[..., 1:], (0, 1), value=IGNORE_INDEX)
    shift_labels = shift_labels.to(logits.device)
    token_loss = cross_entropy(logits.reshape(-1, vocab_size), shift_labels.flatten())
    weights = target_weights(shift_labels, loss_weight).to(logits.device).flatten()
    return weighted_mean(token_loss, weights, num_items_in_batch)


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The loss (tokens,) of each target, in float32, 0 where it is -100."""
    return F.cross_entropy(logits.float(), targets, reduction="none", ignore_index=IGNORE_INDEX)


def weighted_mean(
    token_loss: torch.Tensor, weights: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
) -> torch.Tensor:
    """The sum of `weights` times `token_loss` (both (tokens,)), divided by that of the weights or another divisor."""
    total = weights.sum() if num_items_in_batch is None else torch.as_tensor(num_items_in_batch).to(token_loss.device)
    return (token_loss * weights).sum() / torch.where(total > 0, total, 1)


class NeoOutputHead(nn.Linear):
    """Hidden states to logits, or directly to the loss, with the logits of only a few tokens in memory at a time."""

    # About 1.2 GB in float32 with a vocabulary of 151,936, backward pass included.
    chunk_tokens = 512

    def forward(  # type: ignore[override]
        self,
        hidden_states: torch.Tensor,
        targets: torch.Tensor | None = None,
        loss_weight: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            hidden_states: (..., E), or (tokens, E) with targets.
            targets: (tokens,) the target of each token.
            loss_weight: (tokens,) their weights.
            num_items_in_batch: divisor of the loss.

        Returns:
            Logits (..., vocabulary). With targets, the scalar loss, and the cross entropy (tokens,) of each without a
            gradient, also in one call of this module: FSDP and ZeRO gather its weights per call, and expect the same
            calls from all processes.
        """
        if targets is None or loss_weight is None:
            return super().forward(hidden_states)

        def chunk_loss(
            hidden_states: torch.Tensor, targets: torch.Tensor, loss_weight: torch.Tensor
        ) -> tuple[torch.Tensor, torch.Tensor]:
            token_loss = cross_entropy(F.linear(hidden_states, self.weight), targets)
            return weighted_mean(token_loss, loss_weight, num_items_in_batch), token_loss.detach()

        # Without tokens there is one empty chunk, so that the loss has a gradient.
        chunks = zip(*(x.split(self.chunk_tokens) for x in (hidden_states, targets, loss_weight)), strict=True)
        losses, token_losses = zip(
            *(checkpoint(chunk_loss, *chunk, use_reentrant=False) for chunk in chunks), strict=True
        )
        return torch.stack(losses).sum(), torch.cat(token_losses)


__all__ = ["NeoOutputHead", "weighted_cross_entropy"]
