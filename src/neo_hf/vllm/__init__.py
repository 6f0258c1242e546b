"""
NEO in vLLM: a plug-in that vLLM loads by itself (entry point group `vllm.general_plugins`).

The model's own modules run inside vLLM's Transformers backend. vLLM calls `register` in each of its processes.
"""

from ..configuration_neo import NeoConfig

ARCHITECTURE = "NeoForConditionalGeneration"
TOKENIZER_MODE = "neo"


def register():
    """Tell vLLM about NEO's configuration, model, processor and scheduling. May be called any number of times."""
    from .configuration import NeoArchitecture, NeoSettings, accept_nano

    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.renderers.registry import RENDERER_REGISTRY
    from vllm.tokenizers.registry import TokenizerRegistry
    from vllm.transformers_utils.model_arch_config_convertor import MODEL_ARCH_CONFIG_CONVERTORS

    accept_nano()
    MODEL_ARCH_CONFIG_CONVERTORS[NeoConfig.model_type] = NeoArchitecture
    MODELS_CONFIG_MAP[ARCHITECTURE] = NeoSettings
    TokenizerRegistry.tokenizers[TOKENIZER_MODE] = ("neo_hf.vllm.tokenization", "NeoTokenizer")
    RENDERER_REGISTRY.renderers[TOKENIZER_MODE] = ("neo_hf.vllm.tokenization", "NeoRenderer")
    # By name, since vLLM inspects model classes in a process of its own.
    ModelRegistry.register_model(ARCHITECTURE, "neo_hf.vllm.modeling:NeoForVllm")
