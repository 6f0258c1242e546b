"""Raw checkpoints: the layout in which NEO was trained and released (`model_type` "neo_chat")."""

from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming

# Prefixes of the raw names and of the model's own, the one key map of loading and conversion.
RAW_TO_NEO = {
    "vision_model.embeddings.": "model.patch_embed.",
    "language_model.model.": "model.language_model.",
    "language_model.lm_head.": "lm_head.",
}


def register_raw_checkpoints():
    """Let `from_pretrained` read raw checkpoints as they are. Saving writes the model's own names."""
    register_checkpoint_conversion_mapping(
        "NeoForConditionalGeneration",
        [WeightRenaming("^" + raw.replace(".", r"\."), neo) for raw, neo in RAW_TO_NEO.items()],
        overwrite=True,
    )
