"""What vLLM must know about NEO before it builds anything, and the settings that NEO's attention depends on."""

from .. import NeoConfig
from ..loading import resolve_model
from . import TOKENIZER_MODE

from functools import cache, wraps

from vllm.config import ModelConfig, VllmConfig
from vllm.engine import arg_utils
from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.platforms import current_platform
from vllm.transformers_utils.model_arch_config_convertor import ModelArchConfigConvertorBase
from vllm.v1.attention.backends.registry import AttentionBackendEnum

SCHEDULER = "neo_hf.vllm.scheduling.make_scheduler"


@cache  # or each call would wrap the functions once more
def accept_nano():
    """
    Let `nano` name NEO-nano. vLLM has no place to register a name, so this wraps what uses the name of a model first:
    offline, `get_model_path`, which looks for its folder; otherwise `create_engine_config`, which asks the Hub.
    """
    get_model_path, create_engine_config = arg_utils.get_model_path, arg_utils.EngineArgs.create_engine_config

    @wraps(get_model_path)
    def get_path(model, *args, **kwargs):
        return get_model_path(resolve_model(model), *args, **kwargs)

    @wraps(create_engine_config)
    def create_config(self, *args, **kwargs):
        self.model = resolve_model(self.model)
        return create_engine_config(self, *args, **kwargs)

    arg_utils.get_model_path = get_path
    arg_utils.EngineArgs.create_engine_config = create_config


class NeoArchitecture(ModelArchConfigConvertorBase):
    hf_config: NeoConfig

    def get_head_size(self) -> int:
        """The width of queries and keys. vLLM caches values as wide, padded with zeros."""
        return self.hf_text_config.qk_head_dim

    def is_mm_prefix_lm(self, supports_multimodal: bool = True) -> bool:
        """Whether images attend to themselves in both directions; not if the server takes text only."""
        return supports_multimodal


class NeoSettings(VerifyAndUpdateConfig):
    @staticmethod
    def verify_and_update_model_config(model_config: ModelConfig):
        # vLLM keeps three indices per token only for models with this field; its values are not used.
        model_config.hf_config.mrope_section = [1, 1, 1]
        model_config.tokenizer_mode = TOKENIZER_MODE
        # NEO's processor converts images to RGB and samples the frames of videos.
        defaults: dict[str, dict] = {
            "image": {"image_mode": None},
            "video": {"video_backend": "neo", "num_frames": -1},
        }
        given = model_config.multimodal_config.media_io_kwargs
        for modality, settings in defaults.items():
            given[modality] = settings | (given.get(modality) or {})

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig):
        scheduler = vllm_config.scheduler_config
        if scheduler.scheduler_cls not in (None, SCHEDULER):
            raise ValueError(
                f"NEO needs its own scheduler, which never cuts an image, but scheduler_cls is "
                f"{scheduler.scheduler_cls!r}: remove --scheduler-cls."
            )
        scheduler.scheduler_cls = SCHEDULER
        # Each running sequence adds a token to a step, beside which an image must fit.
        vllm_config.model_config.hf_config.max_image_tokens = scheduler.max_num_batched_tokens - scheduler.max_num_seqs
        attention = vllm_config.attention_config
        if attention.backend is None and not current_platform.is_cpu():
            attention.backend = AttentionBackendEnum.TRITON_ATTN
