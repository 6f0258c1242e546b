"""A scheduler that never cuts an image."""

from vllm.config import VllmConfig
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request


def uncut_length(request: Request, num_computed_tokens: int, num_new_tokens: int) -> int:
    """
    The largest number of new tokens, up to `num_new_tokens`, after which no image or video frame has only begun: its
    tokens attend to all of it, so its last token is computed with its first. A hit in the prefix cache may have ended
    within an image; the rest of it comes whole, then.
    """
    end = num_computed_tokens + num_new_tokens
    for feature in request.mm_features:
        for first, last in feature.mm_position.extract_embeds_range():
            if first < end <= last:
                return max(first - num_computed_tokens, 0)
    return num_new_tokens


class _WholeImages:
    """Mixin for vLLM's schedulers, which would cut images that do not fit, or after a hit in the prefix cache."""

    def _try_schedule_encoder_inputs(
        self, request: Request, num_computed_tokens: int, num_new_tokens: int, *args, **kwargs
    ):
        num_new_tokens = uncut_length(request, num_computed_tokens, num_new_tokens)
        schedule = super()._try_schedule_encoder_inputs  # type: ignore[misc]
        return schedule(request, num_computed_tokens, num_new_tokens, *args, **kwargs)


class NeoScheduler(_WholeImages, Scheduler):
    pass


class NeoAsyncScheduler(_WholeImages, AsyncScheduler):
    pass


def make_scheduler(vllm_config: VllmConfig, **kwargs) -> Scheduler:
    """Called by vLLM like a scheduler class. It decides late whether scheduling is asynchronous."""
    # With this, on for CUDA, a video would have to fit into a step whole, and would wait forever if it does not.
    vllm_config.scheduler_config.disable_chunked_mm_input = False
    kind = NeoAsyncScheduler if vllm_config.scheduler_config.async_scheduling else NeoScheduler
    return kind(vllm_config=vllm_config, **kwargs)
