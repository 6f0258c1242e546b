"""
Attention in vLLM: causal in text, bidirectional within an image (NEO paper, section 3.1).

vLLM tells its backends the ranges of tokens that see each other. Some ignore them and attend causally, without a word:
`attention_backend` refuses those, and gives the one for CPUs a mask of its own.
"""

from collections.abc import Iterable
from dataclasses import replace

import torch
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionBackend, CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)

# Backends whose mask within images was checked.
CHECKED = ("TRITON_ATTN",)


def split_runs(first: int, end: int, images: Iterable[tuple[int, int]]) -> list[tuple[int, bool]]:
    """
    Divide the new tokens [first, end) of a sequence into runs of text and images.

    Args:
        images: (first, last) token of each image of the sequence, in order, including those before `first`.

    Returns:
        (end of the run, whether it is causal). All tokens of a run see no key at or after its end.

    Raises:
        ValueError: an image ends after `end`, so some of its keys are missing.
    """
    runs = []
    for image_first, image_last in images:
        image_end = image_last + 1
        if image_end <= first or image_first >= end:
            continue
        if image_end > end:
            raise ValueError(f"The image at tokens [{image_first}, {image_end}) is cut: the step ends at {end}.")
        if image_first > first:
            runs.append((image_first, True))
        runs.append((image_end, False))
        first = image_end
    if first < end:
        runs.append((end, True))
    return runs


class NeoCPUAttentionMetadataBuilder(CPUAttentionMetadataBuilder):
    """Makes each run of a sequence a sequence of its own, which ends with the run and is causal or not."""

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> CPUAttentionMetadata:
        common = common_attn_metadata
        images = common.mm_req_doc_ranges
        if images and any(images.values()):
            starts, ends = common.query_start_loc_cpu.tolist(), common.seq_lens.tolist()
            rows, lengths, seq_lens, causal = [], [], [], []
            for row in range(common.num_reqs):
                first = ends[row] - (starts[row + 1] - starts[row])
                for end, is_causal in split_runs(first, ends[row], images.get(row, ())):
                    rows.append(row)
                    lengths.append(end - first)
                    seq_lens.append(end)
                    causal.append(is_causal)
                    first = end
            query_start_loc = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
            common = replace(
                common,
                num_reqs=len(rows),
                query_start_loc=query_start_loc,
                query_start_loc_cpu=query_start_loc,
                seq_lens=torch.tensor(seq_lens, dtype=common.seq_lens.dtype),
                max_query_len=max(lengths),
                block_table_tensor=common.block_table_tensor[rows],
                causal=torch.tensor(causal, dtype=torch.int32),  # type: ignore[arg-type]
            )
        return super().build(common_prefix_len, common, fast_build)


class NeoCPUAttentionBackend(CPUAttentionBackend):
    @staticmethod
    def get_builder_cls() -> type[NeoCPUAttentionMetadataBuilder]:
        return NeoCPUAttentionMetadataBuilder

    @classmethod
    def supports_mm_prefix(cls) -> bool:
        return True


def own_backend() -> type[AttentionBackend] | None:
    """The backend to use on this platform, `None` for the one that vLLM chooses."""
    return NeoCPUAttentionBackend if current_platform.is_cpu() else None


def check_backend(name: str):
    """
    Raises:
        ValueError: the mask of this backend was never checked.
    """
    if name not in CHECKED and not current_platform.is_cpu():
        raise ValueError(
            f"The attention backend {name} may attend causally within images, which changes answers without a word. "
            f"Choose one of {', '.join(CHECKED)}: --attention-backend {CHECKED[0]}."
        )
