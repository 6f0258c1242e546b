"""
Runs vLLM's Triton attention kernel on a CPU, interpreted, in NEO's widths: the mask of GPUs. Prints the largest
difference from eager attention under NEO's mask, then that from eager attention under a causal mask.
"""

import sys

import torch
import triton
import triton.language
import vllm.triton_utils

# vLLM uses Triton only with a compiler for the device, which interpretation does not need.
vllm.triton_utils.triton, vllm.triton_utils.tl, vllm.triton_utils.HAS_TRITON = triton, triton.language, True

from vllm.v1.attention.backends.utils import compute_mm_prefix_range_tensor  # noqa: E402
from vllm.v1.attention.ops.triton_unified_attention import unified_attention  # noqa: E402

BLOCK = 16  # tokens per block of the cache


def main(head_dim: int, heads: int, kv_heads: int):
    torch.manual_seed(0)
    # (length, new tokens, images as (first, last) token): whole prompts, continued ones, one new token, text alone
    sequences = [(40, 40, [(3, 18), (21, 37)]), (40, 20, [(2, 11), (21, 36)]), (33, 1, [(4, 20)]), (9, 9, [])]
    width = 2 * head_dim
    lengths, new = [s[0] for s in sequences], [s[1] for s in sequences]
    keys = [torch.randn(n, kv_heads, width) for n in lengths]
    values = [torch.randn(n, kv_heads, head_dim) for n in lengths]
    queries = [torch.randn(n, heads, width) for n in new]

    per_sequence = -(-max(lengths) // BLOCK)
    table = torch.randperm(len(sequences) * per_sequence).view(len(sequences), -1)
    k_cache = torch.zeros(table.numel(), BLOCK, kv_heads, width)
    v_cache = torch.zeros_like(k_cache)  # values are padded with zeros to the width of keys
    for row, (key, value) in enumerate(zip(keys, values, strict=True)):
        place = torch.arange(len(key))
        block = table[row, place // BLOCK]
        k_cache[block, place % BLOCK] = key
        v_cache[block, place % BLOCK, :, :head_dim] = value

    query = torch.cat(queries)
    output = torch.empty_like(query)
    unified_attention(
        q=query,
        k=k_cache,
        v=v_cache,
        out=output,
        cu_seqlens_q=torch.tensor([0, *new]).cumsum(0).int(),
        max_seqlen_q=max(new),
        seqused_k=torch.tensor(lengths, dtype=torch.int32),
        max_seqlen_k=max(lengths),
        softmax_scale=head_dim**-0.5,
        causal=True,
        window_size=(-1, -1),
        block_table=table.int(),
        softcap=0,
        q_descale=None,
        k_descale=None,
        v_descale=None,
        mm_prefix_range=compute_mm_prefix_range_tensor(
            {row: images for row, (_, _, images) in enumerate(sequences)}, len(sequences), query.device
        ),
    )
    found = output[..., :head_dim].split(new)

    def difference(bidirectional: bool) -> float:
        worst = 0.0
        for (length, count, images), q, k, v, x in zip(sequences, queries, keys, values, found, strict=True):
            mask = torch.ones(length, length, dtype=torch.bool).tril()
            for first, last in images if bidirectional else []:
                mask[first : last + 1, first : last + 1] = True
            k, v = (y.repeat_interleave(heads // kv_heads, dim=1) for y in (k, v))
            scores = torch.einsum("qhd,khd->hqk", q, k) * head_dim**-0.5
            weights = scores.masked_fill(~mask[length - count :], float("-inf")).softmax(-1)
            worst = max(worst, float((torch.einsum("hqk,khd->qhd", weights, v) - x).abs().max()))
        return worst

    print(difference(True), difference(False))


main(*map(int, sys.argv[1:]))
