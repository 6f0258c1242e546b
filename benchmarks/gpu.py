"""
NEO-2B on a GPU, compared with its other attention paths and with Qwen3-VL-2B.

    python benchmarks/gpu.py [--parts attention training] [--append benchmarks/RESULTS.md]

Random weights at full depth, bfloat16. Measured are attention alone (FlexAttention with the kernel options that the
project chooses, with PyTorch's and with those for small cards; SDPA with a dense mask; SDPA's fast kernels, called for
each run of text or image), time to first token, decoding, and a training step on 16K packed tokens with its share of
the card's peak rate (MFU). Candidates alternate within a round; figures are medians, peak memory is beyond what was in
use before. What fails, for lack of memory for instance, is named in its cell. `--tiny` is a smoke test on a narrow
model and short prompts, also on a CPU.
"""

import argparse
import gc
import statistics
import sys
from functools import partial
from pathlib import Path

import torch
import transformers
from reports import publish, table
from speed import (
    DEVICE,
    DTYPE,
    TEXT_TOKENS,
    TINY,
    WIDTHS,
    build_neo,
    build_qwen,
    clock,
    first_token,
    image_prompt,
    neo_inputs,
    patch_embedding_operations,
    qwen_inputs,
)
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right
from tqdm import tqdm
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.qwen3.modeling_qwen3 import eager_attention_forward

from neo_hf.attention_neo import (
    MAX_FLEX_GRAPHS,
    SMALL_SHARED_MEMORY,
    attend_by_blocks,
    attend_by_sdpa,
    find_key_runs,
    kernel_options_of,
)

# Peak rates of dense bfloat16 matrix products from data sheets, in FLOP/s, by a part of the card's name.
PEAKS = {
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


class Attention(torch.nn.Module):
    """What the attention functions of transformers read from a layer."""

    num_key_value_groups = 2
    is_causal = True


def compare(functions, rounds):
    """
    Median seconds and peak bytes of each function, or the error that it raised. Functions alternate; the first round
    is a warm-up and does not count.
    """
    times = {name: [] for name in functions}
    peaks, results = {}, {}
    for number in range(rounds + 1):
        for name, function in functions.items():
            if name in results:
                continue
            if DEVICE == "cuda":
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            try:
                seconds = clock(function)[1]
            except RuntimeError as error:
                print(f"{name}: {error}", file=sys.stderr)
                results[name] = type(error).__name__
                gc.collect()
                torch.cuda.empty_cache()
                continue
            if number:
                times[name].append(seconds)
            if DEVICE == "cuda":
                peaks[name] = torch.cuda.max_memory_allocated() - before
    medians = {name: (statistics.median(values), peaks.get(name)) for name, values in times.items() if values}
    return {name: results.get(name, medians.get(name)) for name in functions}


def attend_by_segments(query, key, value, segments, scale):
    """
    SDPA for each run of text (causal) or image (bidirectional), over all keys up to its end: no mask is stored, so its
    fast kernels apply. Same shapes and result as attention with the mask of the runs.
    """
    value = F.pad(value, (0, query.shape[-1] - value.shape[-1]))
    parts = []
    for start, end, is_image in segments:
        mask = None if is_image or end - start == 1 else causal_lower_right(end - start, end)
        parts.append(
            F.scaled_dot_product_attention(
                query[:, :, start:end], key[:, :, :end], value[:, :, :end], mask, scale=scale, enable_gqa=True
            )
        )
    return torch.cat(parts, 2)[..., : value.shape[-1] // 2].transpose(1, 2)


def measure_attention(images, side, text, tiny):
    """Attention of one layer, forward, and forward with backward."""
    widths = TINY if tiny else WIDTHS
    size = text + side**2 + 2
    length = images * size
    # T indices: each text token has its own, an image one.
    places = torch.arange(length, device=DEVICE) % size
    steps = (places <= text + 1) | (places == size - 1)
    runs = find_key_runs(torch.stack([steps.long().cumsum(-1)[None]] * 3))
    segments = []
    for image in range(images):
        start = image * size + text + 1
        segments += [(max(start - text - 2, 0), start, False), (start, start + side**2, True)]
    segments.append((length - 1, length, False))
    module, scale = Attention().train(), 128**-0.5
    inputs = [
        torch.randn(1, widths[heads], length, width, device=DEVICE, dtype=DTYPE)
        for heads, width in (("num_attention_heads", 256), ("num_key_value_heads", 256), ("num_key_value_heads", 128))
    ]
    dense = runs.dense()
    added = torch.zeros(dense.shape, dtype=DTYPE, device=DEVICE).masked_fill(~dense, torch.finfo(DTYPE).min)
    small = kernel_options_of(DTYPE, SMALL_SHARED_MEMORY, (8, 9))
    candidates = {
        "FlexAttention": lambda *x: attend_by_blocks(module, *x, runs, scale)[0],
        "PyTorch's options": lambda *x: flex_attention_forward(module, *x, runs.block_mask, scaling=scale)[0],
        "options of small cards": lambda *x: attend_by_blocks(module, *x, runs, scale, kernel_options=small)[0],
        "SDPA, dense mask": lambda *x: attend_by_sdpa(module, *x, dense, scale)[0],
        "SDPA, run by run": lambda *x: attend_by_segments(*x, segments, scale),
        "eager": lambda *x: eager_attention_forward(module, *x, added, scale)[0],
    }
    outputs = {}

    @torch.no_grad()
    @torch._dynamo.config.patch(recompile_limit=MAX_FLEX_GRAPHS)
    def forward(name):
        outputs[name] = candidates[name](*inputs)

    # Beyond the limit, FlexAttention would run uncompiled, and make all scores.
    @torch._dynamo.config.patch(recompile_limit=MAX_FLEX_GRAPHS)
    def both(name):
        output = candidates[name](*(x.detach().requires_grad_() for x in inputs))
        output.backward(torch.ones_like(output))

    results = {
        step: compare({name: partial(run, name) for name in candidates}, 5)
        for step, run in (("forward", forward), ("forward and backward", both))
    }
    reference = next(iter(outputs))
    for name, output in outputs.items():
        difference = float((output - outputs[reference]).abs().max())
        if difference > 0.05:
            raise AssertionError(f"{name} differs from {reference} by {difference:.3f} at {length} tokens.")
    return results


def by_implementation(model, run):
    """The function with each of the model's attention implementations."""

    def switched(name):
        model.set_attn_implementation(name)
        run()

    return {name: partial(switched, name) for name in ("neo", "sdpa", "eager")}


@torch.no_grad()
def measure_first_token(neo, qwen, images, side):
    prompt = image_prompt(images, side)
    functions = by_implementation(neo, first_token(neo, neo_inputs(*prompt)))
    return compare(functions | {"Qwen3-VL": first_token(qwen, qwen_inputs(*prompt))}, 5)


def measure_decoding(neo, qwen, images, side, tokens):
    """Seconds per token of `generate()` after the first: with a growing cache, and compiled with a static one."""
    prompt = image_prompt(images, side)
    neo.set_attn_implementation("neo")
    functions = {}
    for name, model, inputs in (("neo", neo, neo_inputs(*prompt)), ("Qwen3-VL", qwen, qwen_inputs(*prompt))):
        for cache in (None, "static"):
            for count in (1, tokens + 1):
                functions[name, cache, count] = partial(
                    model.generate,
                    **inputs,
                    min_new_tokens=count,
                    max_new_tokens=count,
                    do_sample=False,
                    cache_implementation=cache,
                )
    results = compare(functions, 3)
    per_token = {}
    for name, cache, count in functions:
        if count > 1:
            whole, first = results[name, cache, count], results[name, cache, 1]
            failed = next((x for x in (whole, first) if isinstance(x, str)), None)
            per_token[name, cache or "growing"] = failed or ((whole[0] - first[0]) / tokens, whole[1])
    return per_token


def measure_training(model, inputs, modes, rounds=3):
    """A step of AdamW in each of `modes`, {name: function that prepares the model}."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)

    def step(prepare):
        prepare()
        model(**inputs, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return compare({name: partial(step, prepare) for name, prepare in modes.items()}, rounds)


def layer_modes(model):
    """A function that chooses whether the layers of a model are checkpointed, and whether they are compiled."""
    layers = [layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer)]
    for layer in layers:
        layer.compile()
    compiled = [layer._compiled_call_impl for layer in layers]

    def choose(is_checkpointed, is_compiled):
        model.gradient_checkpointing_enable() if is_checkpointed else model.gradient_checkpointing_disable()
        for layer, call in zip(layers, compiled, strict=True):
            layer._compiled_call_impl = call if is_compiled else None

    return choose


def measure_neo_training(model, ids, grids, documents):
    """On a packed row."""
    choose = layer_modes(model)

    def mode(implementation, *how):
        def prepare():
            model.set_attn_implementation(implementation)
            choose(*how)

        return prepare

    inputs = neo_inputs(ids, grids) | {"document_ids": documents, "skip_logits": True, "labels": ids}
    modes = {
        "checkpointed": mode("neo", True, False),
        "checkpointed, SDPA": mode("sdpa", True, False),
        "checkpointed, compiled": mode("neo", True, True),
        "compiled": mode("neo", False, True),
    }
    return measure_training(model, inputs, modes)


def measure_qwen_training(model, ids, grids, rows):
    """On a batch of documents of the same length, which needs no packing."""
    choose = layer_modes(model)
    inputs = qwen_inputs(ids, grids)
    inputs = {k: x.view(rows, -1) if k in ("input_ids", "mm_token_type_ids") else x for k, x in inputs.items()}
    inputs["labels"] = inputs["input_ids"].masked_fill(inputs["mm_token_type_ids"] == 1, -100)
    modes = {
        "Qwen3-VL, checkpointed": partial(choose, True, False),
        "Qwen3-VL, checkpointed, compiled": partial(choose, True, True),
    }
    return measure_training(model, inputs, modes)


def training_operations(model, ids, grids, documents):
    """Floating-point operations of forward and backward, without those of recomputed layers."""
    config = model.config.text_config
    layer = model.get_decoder().layers[0]
    linear = sum(weight.numel() for weight in layer.parameters() if weight.ndim == 2) * ids.shape[1]
    runs = find_key_runs(model.model.get_position_ids(ids, grids, document_ids=documents), document_ids=documents)
    pairs = int((runs.last - runs.first).sum())
    attention = pairs * config.num_attention_heads * (config.qk_head_dim + config.head_dim)
    head = model.lm_head.weight.numel() * int((ids != model.config.image_token_id).sum())
    forward = 2 * (config.num_hidden_layers * (linear + attention) + head)
    return 3 * (forward + patch_embedding_operations(model, int(grids.prod(-1).sum())))


def cells(results, unit=1e3):
    """A cell per result: milliseconds, ratio to the first, peak memory."""
    first = next(iter(results.values()))
    line = []
    for result in results.values():
        if isinstance(result, str):
            line.append(result)
            continue
        seconds, peak = result
        parts = [f"{unit * seconds:,.2f} ms"]
        if not isinstance(first, str):
            parts.append(f"{seconds / first[0]:.2f}")
        if peak is not None:
            parts.append(f"{peak / 2**20:,.0f} MB")
        line.append(", ".join(parts))
    return line


def report_attention(tiny):
    side, text, counts = (4, 6, (2, 3)) if tiny else (32, 14, (1, 4, 16))
    lines = []
    for images in tqdm(counts, "attention", file=sys.stderr):
        for step, results in measure_attention(images, side, text, tiny).items():
            lines.append([f"{images * (side**2 + text + 2):,}", step, *cells(results)])
    return "Attention of one layer:\n\n" + table(["tokens", "", *results], lines)


def report_first_token(tiny):
    side, counts = (4, (2, 3)) if tiny else (32, (1, 4, 16))
    neo, qwen = build_models(tiny)
    lines = []
    for images in tqdm(counts, "first token", file=sys.stderr):
        results = measure_first_token(neo, qwen, images, side)
        lines.append([f"{images * (side**2 + TEXT_TOKENS + 2):,}", *cells(results)])
    return "Time to first token:\n\n" + table(["tokens", *results], lines)


def report_decoding(tiny):
    images, side, tokens = (3, 4, 4) if tiny else (4, 32, 64)
    results = measure_decoding(*build_models(tiny), images, side, tokens)
    names = [f"{name}, {cache} cache" for name, cache in results]
    return f"A decoding step of `generate()` after {images} images:\n\n" + table(names, [cells(results)])


def report_training(tiny):
    rows, side, text = (2, 4, 16) if tiny else (16, 22, 538)
    ids, grids = image_prompt(rows, side, text)
    documents = torch.arange(rows, device=DEVICE).repeat_interleave(ids.shape[1] // rows)[None]
    neo = build_models(tiny, names=("neo",))[0].train()
    operations = training_operations(neo, ids, grids, documents)
    results = measure_neo_training(neo, ids, grids, documents)
    del neo
    gc.collect()
    results |= measure_qwen_training(build_models(tiny, names=("qwen",))[0].train(), ids, grids, rows)
    title = (
        f"A training step on {ids.numel():,} tokens, {rows} documents, and NEO's share of the card's peak rate (MFU):"
    )
    rates = ["" if "Qwen" in name else mfu(operations, result) for name, result in results.items()]
    return f"{title}\n\n" + table(list(results), [cells(results), rates])


def mfu(operations, result):
    peak = next(
        (rate for name, rate in PEAKS.items() if DEVICE == "cuda" and name in torch.cuda.get_device_name()), None
    )
    if isinstance(result, str) or peak is None:
        return ""
    rate = operations / result[0]
    return f"{rate / peak:.0%} ({rate / 1e12:,.0f} TFLOP/s)"


def build_models(tiny, names=("neo", "qwen")):
    build = {
        "neo": partial(build_neo, 2 if tiny else 40, tiny=tiny),
        "qwen": partial(build_qwen, tiny, *((2, 2, (0,)) if tiny else (28, 24, (5, 11, 17)))),
    }
    return [build[name]() for name in names]


REPORTS = {
    "attention": report_attention,
    "first-token": report_first_token,
    "decoding": report_decoding,
    "training": report_training,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=list(REPORTS), default=list(REPORTS), help="what to measure")
    parser.add_argument("--append", type=Path, help="file that the results are added to")
    parser.add_argument("--tiny", action="store_true", help="see that it runs")
    arguments = parser.parse_args()
    if DEVICE != "cuda" and not arguments.tiny:
        parser.error("no CUDA device was found; --tiny runs a smoke test without one")
    transformers.logging.set_verbosity_error()

    parts = ["Each cell: time, its ratio to the first of the row, peak memory.\n"]
    for name in arguments.parts:
        parts.append(REPORTS[name](arguments.tiny))
        print(parts[-1], file=sys.stderr)  # not lost if a later part fails
        gc.collect()
        if DEVICE == "cuda":
            torch.cuda.empty_cache()
    card = torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU"
    publish(card, [str(DTYPE).removeprefix("torch.")], "GPU (`gpu.py`)", "\n".join(parts), arguments.append)


if __name__ == "__main__":
    main()
