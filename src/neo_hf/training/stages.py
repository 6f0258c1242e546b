"""The three stages of training (NEO paper, section 3.2): what each of them trains."""

import logging

from torch import nn

from neo_hf.modeling_neo import NeoForConditionalGeneration

logger = logging.getLogger(__name__)

STAGES = ("pretrain", "midtrain", "sft")

# What NEO adds to the attention of an LLM, by the names of the modules.
SPATIAL_ATTENTION = ("q_proj_hw", "k_proj_hw", "q_norm_h", "q_norm_w", "k_norm_h", "k_norm_w")


def prepare_for_stage(model: NeoForConditionalGeneration, stage: str) -> dict[str, nn.Parameter]:
    """
    Set `requires_grad` of every parameter as a stage of training wants it.

    Args:
        model: changed in place.
        stage: "pretrain" trains the patch embedding, the pre-Buffer and the spatial attention of the post-LLM, and
            keeps the rest of the LLM as it was; "midtrain" and "sft" train everything.

    Returns:
        The parameters that the stage trains, by name. Their number is logged.

    Raises:
        ValueError: another stage, or a model whose pre-Buffer depth is unknown.
    """
    if stage not in STAGES:
        raise ValueError(f"stage must be one of {STAGES}, got {stage!r}.")
    if stage == "pretrain":
        trained_modules = [model.model.patch_embed, model.pre_buffer]
        trained_modules += [getattr(layer.self_attn, name) for layer in model.post_llm for name in SPATIAL_ATTENTION]
    else:
        trained_modules = [model]
    model.requires_grad_(False)
    for module in trained_modules:
        module.requires_grad_(True)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    count, total = (sum(p.numel() for p in parameters) for parameters in (trained.values(), model.parameters()))
    logger.info(
        "Stage %s trains %s of %s parameters (%.1f %%).", stage, f"{count:,}", f"{total:,}", 100 * count / total
    )
    return trained
