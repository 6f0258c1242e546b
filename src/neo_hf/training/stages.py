"""The three training stages (NEO paper, section 3.2): which parameters each of them trains."""

import logging
from collections.abc import Iterable

from torch import nn

from neo_hf.modeling_neo import NeoForConditionalGeneration

logger = logging.getLogger(__name__)

STAGES = ("pretrain", "midtrain", "sft")

# The modules that NEO adds to the attention of an LLM.
SPATIAL_ATTENTION = ("q_proj_hw", "k_proj_hw", "q_norm_h", "q_norm_w", "k_norm_h", "k_norm_w")


def prepare_for_stage(model: NeoForConditionalGeneration, stage: str) -> dict[str, nn.Parameter]:
    """
    Set `requires_grad` of every parameter for a training stage.

    Args:
        model: changed in place.
        stage: "pretrain" trains the patch embedding, the pre-Buffer and the spatial attention of the post-LLM, and
            freezes the rest of the LLM; "midtrain" and "sft" train everything.

    Returns:
        The trained parameters by name. Their number is logged.

    Raises:
        ValueError: unknown stage, or the depth of the pre-Buffer is unknown.
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
    count, total = parameter_count(trained.values()), parameter_count(model.parameters())
    logger.info(
        "Stage %s trains %s of %s parameters (%.1f %%).", stage, f"{count:,}", f"{total:,}", 100 * count / total
    )
    return trained


def parameter_count(parameters: Iterable[nn.Parameter]) -> int:
    """Number of parameters, also where they are sharded."""
    # Under ZeRO-3, parameters are partitioned: `numel()` is 0, and DeepSpeed keeps the whole number.
    return sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in parameters)
