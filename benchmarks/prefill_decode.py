"""
Time of prefill, decoding and patch embedding under each attention implementation, at a tenth of NEO-2B's depth.

    python benchmarks/prefill_decode.py [--lengths 256 1024 4096] [--repeats 5]

Prompts are one picture between two lines of text, weights are random, dtype is float32 on a CPU and bfloat16 on CUDA.
Implementations take turns within a repeat; figures are medians in milliseconds and ratios to eager of the same run.
"""

import argparse
import platform
import statistics
import time
from collections import defaultdict

import torch
import transformers
from tqdm import tqdm

from neo_hf import NeoConfig, NeoForConditionalGeneration

LAYERS = 4
TEXT_TOKENS = 32


def prompt(config, tokens, device):
    """One picture of `tokens - TEXT_TOKENS` visual tokens in a grid as square as can be."""
    visual = tokens - TEXT_TOKENS
    rows = max(n for n in range(1, int(visual**0.5) + 1) if visual % n == 0)
    grid = torch.tensor([[2 * rows, 2 * visual // rows]])
    half = torch.randint(0, 150_000, (TEXT_TOKENS // 2 - 1,))
    picture = torch.full((visual,), config.image_token_id)
    ends = [torch.tensor([config.image_start_token_id]), torch.tensor([config.image_end_token_id])]
    ids = torch.cat([half, ends[0], picture, ends[1], half])[None]
    inputs = {"input_ids": ids, "pixel_values": torch.randn(4 * visual, 768), "image_grid_hw": grid}
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def clock(function, device):
    """Result and time of a call in milliseconds."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = function()
    if device == "cuda":
        torch.cuda.synchronize()
    return result, 1e3 * (time.perf_counter() - start)


@torch.no_grad()
def measure(model, inputs, times, steps):
    device = model.device.type
    pictures = {name: inputs[name] for name in ("pixel_values", "image_grid_hw")}
    times["patch embedding"].append(clock(lambda: model.get_image_features(**pictures), device)[1])
    outputs, elapsed = clock(lambda: model(**inputs, use_cache=True, logits_to_keep=1), device)
    times["prefill"].append(elapsed)
    cache, token = outputs.past_key_values, outputs.logits[:, -1:].argmax(-1)
    _, elapsed = clock(lambda: [model(input_ids=token, past_key_values=cache) for _ in range(steps)], device)
    times["decode step"].append(elapsed / steps)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 1024, 4096], help="tokens of a prompt")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="decoding steps per repeat")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = NeoConfig(text_config={"num_hidden_layers": LAYERS, "num_pre_buffer_layers": 1})
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = NeoForConditionalGeneration._from_config(config, dtype=dtype).eval().to(device)
    name = torch.cuda.get_device_name() if device == "cuda" else f"{platform.processor()} x {torch.get_num_threads()}"
    print(f"{name}, {dtype}, torch {torch.__version__}, transformers {transformers.__version__}, {LAYERS} layers\n")
    print(
        "| tokens | implementation | patch embedding ms | prefill ms | decode step ms | prefill ratio | decode ratio |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- |")
    implementations = ("eager", "sdpa", "flex_attention")
    for length in arguments.lengths:
        inputs = prompt(config, length, device)
        times = {implementation: defaultdict(list) for implementation in implementations}
        for repeat in tqdm(range(arguments.repeats + 1), desc=f"{length} tokens", leave=False):
            for implementation in implementations:
                model.set_attn_implementation(implementation)
                # The first round compiles and warms up.
                measure(model, inputs, times[implementation] if repeat else defaultdict(list), arguments.steps)
        medians = {i: {part: statistics.median(values) for part, values in times[i].items()} for i in times}
        for implementation, median in medians.items():
            figures = [median["patch embedding"], median["prefill"], median["decode step"]]
            figures += [median[part] / medians["eager"][part] for part in ("prefill", "decode step")]
            print(f"| {length} | {implementation} | " + " | ".join(f"{figure:.3g}" for figure in figures) + " |")


if __name__ == "__main__":
    main()
