"""
Attention alone: tiles over runs of keys, SDPA with a dense mask, and FlexAttention, at NEO's head sizes on a CPU.

    python benchmarks/attention.py [--tokens 1024 4096 16384 32768]

Reports seconds for tiles, and the others' ratios to them, on prompts of large images and of small frames: 2 heads and
one key/value head (queries and keys 256 wide, values 128), float32, one thread, the faster of two runs. Times include
building the mask, but not compiling FlexAttention.
"""

import argparse
import time

import torch
from torch.nn import functional as F
from torch.nn.attention.flex_attention import flex_attention
from tqdm import tqdm

from neo_hf.attention_neo import TiledAttention, find_key_runs

SCALE = 128**-0.5
TEXT = 14  # tokens before each image


def best(function) -> float:
    times = []
    for _ in range(2):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096, 16384, 32768])
    args = parser.parse_args()
    torch.set_num_threads(1)
    compiled = torch.compile(flex_attention, dynamic=True)
    lines = [
        "| tokens | tokens per image | tiles | SDPA, dense mask | FlexAttention |",
        "| --- | --- | --- | --- | --- |",
    ]
    for length in (progress := tqdm(args.tokens)):
        for image in (1010, 64):
            progress.set_postfix(tokens=length, image=image)
            places = torch.arange(length)[None] % (image + TEXT)
            images = torch.where(places >= TEXT, torch.arange(length)[None] // (image + TEXT), -1)
            query, key, value = torch.randn(3, 1, 2, length, 256).unbind()
            key, value = key[:, :1].contiguous(), value[:, :1, :, :128].contiguous()

            # T indices that imply these images.
            temporal = torch.where(places == TEXT, 1, (places < TEXT).long()).cumsum(-1)

            def runs(temporal=temporal):
                return find_key_runs(torch.stack([temporal] * 3))

            def tiles(query=query, key=key, value=value, runs=runs):
                TiledAttention.apply(query, key, value, runs(), SCALE)

            def dense(query=query, key=key, value=value, images=images):
                mask = torch.ones(query.shape[2], query.shape[2], dtype=torch.bool).tril_()
                mask |= (images[0, :, None] == images[0]) & (images[0] >= 0)
                F.scaled_dot_product_attention(
                    query, key, F.pad(value, (0, 128)), mask[None, None], scale=SCALE, enable_gqa=True
                )

            def flex(query=query, key=key, value=value, runs=runs):
                compiled(query, key, value, block_mask=runs().block_mask, scale=SCALE, enable_gqa=True)

            flex()  # compiles
            reference, others = best(tiles), [best(function) for function in (dense, flex)]
            cells = [f"{length:,}", str(image), f"{reference:.2f} s", *(f"{t / reference:.2f}" for t in others)]
            lines.append(f"| {' | '.join(cells)} |")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
