"""NEO, a native vision-language model, for Hugging Face Transformers.

Importing this package registers NEO with the Auto classes.
"""

from . import raw
from ._version import __version__
from .configuration_neo import NeoConfig, NeoTextConfig, NeoVisionConfig
from .image_processing_neo import NeoImageProcessor
from .indexing_neo import allocate_position_ids
from .loading import load_nano
from .modeling_neo import NeoForConditionalGeneration, NeoModel, NeoTextModel
from .processing_neo import NeoProcessor
from .video_processing_neo import NeoVideoProcessor

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)

# The one in `transformers` is a placeholder where torchvision is not installed.
from transformers.models.auto.video_processing_auto import AutoVideoProcessor

AutoConfig.register("neo", NeoConfig)
# AutoModel gives the model that can generate, as the released repositories do.
for auto_class in (AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM):
    auto_class.register(NeoConfig, NeoForConditionalGeneration)
AutoImageProcessor.register(NeoConfig, image_processor_classes={"pil": NeoImageProcessor})
AutoVideoProcessor.register(NeoConfig, NeoVideoProcessor)
AutoProcessor.register(NeoConfig, NeoProcessor)
raw.register()

# Saving any of these writes the code files next to the weights, so that the folder works without this package.
NeoConfig.register_for_auto_class()
NeoForConditionalGeneration.register_for_auto_class("AutoModel")
NeoImageProcessor.register_for_auto_class("AutoImageProcessor")
NeoProcessor.register_for_auto_class("AutoProcessor")
NeoVideoProcessor.register_for_auto_class()

__all__ = [
    "NeoConfig",
    "NeoForConditionalGeneration",
    "NeoImageProcessor",
    "NeoModel",
    "NeoProcessor",
    "NeoTextConfig",
    "NeoTextModel",
    "NeoVideoProcessor",
    "NeoVisionConfig",
    "__version__",
    "allocate_position_ids",
    "load_nano",
]
