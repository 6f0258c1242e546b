"""
Live video and long prompts, on random weights, in float32 on a CPU.

1. Frames arrive one by one: `NeoStream` compared with recomputing the whole prompt at each frame, both without logits.
   Total seconds, seconds per frame as the video grows, peak memory of the process.
2. Prefill of long prompts of frames: FlexAttention, which builds no L x L mask, compared with SDPA and a dense mask.
   Memory is what the prefill adds.

Each measurement runs in its own process, so that peak memory is its own, on one thread. Seconds are CPU seconds, which
exclude other load on the machine.
"""

import argparse
import json
import resource
import subprocess
import sys
import time

FRAME_SIDE = 384  # pixels: 144 visual tokens


def peak_megabytes() -> float:
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, kilobytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def build_model(attn_implementation="sdpa", **text_config):
    import torch

    from neo_hf import NeoConfig, NeoForConditionalGeneration

    torch.manual_seed(0)
    torch.set_num_threads(1)
    config = NeoConfig(
        text_config={"num_pre_buffer_layers": 1, "vocab_size": 151_936, **text_config},
        vision_config={"hidden_size": 128},
    )
    return NeoForConditionalGeneration._from_config(config, attn_implementation=attn_implementation).eval()


def measure_stream(kind: str, num_frames: int) -> dict:
    """Seconds per frame and peak memory for `kind` "stream" or "recompute"."""
    import numpy as np
    import torch

    from neo_hf import NeoImageProcessor, NeoProcessor
    from neo_hf.processing_neo import format_timestamp
    from neo_hf.streaming import NeoStream
    from neo_hf.tokenization import load_qwen_package_tokenizer

    model = build_model(
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
    )
    processor = NeoProcessor(NeoImageProcessor(), load_qwen_package_tokenizer())
    random = np.random.default_rng(0)
    frames = [random.integers(0, 256, (FRAME_SIDE, FRAME_SIDE, 3), dtype=np.uint8) for _ in range(num_frames)]
    stream = NeoStream(model, processor)
    text, features, seconds = "<|im_start|>user\n", [], []
    for number, frame in enumerate(frames):
        started = time.process_time()
        if kind == "stream":
            stream.add_frame(frame, number)
        else:
            features.append(processor.video_processor([[frame]], return_tensors="pt"))  # each frame once, as above
            lead = "" if number == 0 else "\n"
            image = processor.replace_image_token(features[number], 0)
            text += f"{lead}[{format_timestamp(number)}]:{image}"
            inputs = processor.tokenizer(text, return_tensors="pt")
            for key in ("pixel_values", "image_grid_hw"):
                inputs[key] = torch.cat([each[key] for each in features])
            with torch.no_grad():
                model(**inputs, logits_to_keep=torch.empty(0, dtype=torch.long))
        seconds.append(time.process_time() - started)
    return {"seconds": seconds, "megabytes": peak_megabytes()}


def measure_prefill(attn_implementation: str, num_tokens: int) -> dict:
    """Seconds and memory of a prefill of `num_tokens` tokens, in frames of 64 visual tokens."""
    import torch

    model = build_model(
        attn_implementation,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        vocab_size=151_936,
    )
    config = model.config
    frame = [9, config.image_start_token_id, *[config.image_token_id] * 64, config.image_end_token_id]

    def inputs(length: int) -> dict:
        count = length // len(frame)
        text = [9] * (length - count * len(frame))
        return {
            "input_ids": torch.tensor([frame * count + text]),
            "pixel_values": torch.randn(count * 256, 768),
            "image_grid_hw": torch.full((count, 2), 16),
        }

    with torch.no_grad():
        # Twice, since FlexAttention recompiles at the second length, for all lengths that follow.
        for length in (1024, 2048):
            model(**inputs(length), logits_to_keep=1)
        before = peak_megabytes()
        given = inputs(num_tokens)
        started = time.process_time()
        model(**given, logits_to_keep=1)
        seconds = time.process_time() - started
    return {"seconds": seconds, "megabytes": peak_megabytes() - before}


def measure(*arguments) -> dict:
    run = subprocess.run(
        [sys.executable, __file__, "--measure", *map(str, arguments)], stdout=subprocess.PIPE, check=True
    )
    return json.loads(run.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=64)
    parser.add_argument("--tokens", type=int, nargs="*", default=[8192, 32768])
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        what, kind, number = args.measure
        print(json.dumps({"stream": measure_stream, "prefill": measure_prefill}[what](kind, int(number))))
        return

    stream, recompute = (measure("stream", kind, args.frames) for kind in ("stream", "recompute"))
    print(f"{args.frames} frames of {FRAME_SIDE}x{FRAME_SIDE} pixels, one by one")
    print(f"{'frame':>10} {'NeoStream':>12} {'recompute':>12} {'ratio':>8}")
    for number in sorted({2**power for power in range(20) if 2**power < args.frames} | {args.frames}):
        new, whole = stream["seconds"][number - 1], recompute["seconds"][number - 1]
        print(f"{number:>10} {new * 1000:>9.0f} ms {whole * 1000:>9.0f} ms {whole / new:>7.1f}x")
    new, whole = sum(stream["seconds"]), sum(recompute["seconds"])
    print(f"{'total':>10} {new:>10.1f} s {whole:>10.1f} s {whole / new:>7.1f}x")
    new, whole = stream["megabytes"], recompute["megabytes"]
    print(f"{'peak':>10} {new:>9.0f} MB {whole:>9.0f} MB")

    print("\nPrefill of frames of 64 visual tokens, one layer")
    print(f"{'tokens':>10} {'FlexAttention':>22} {'dense mask (SDPA)':>22} {'time':>8} {'memory':>8}")
    for number in args.tokens:
        flex, dense = (measure("prefill", kind, number) for kind in ("flex_attention", "sdpa"))
        cells = [f"{each['seconds']:>8.2f} s {each['megabytes']:>8.0f} MB" for each in (flex, dense)]
        ratios = [f"{dense[key] / flex[key]:>7.1f}x" for key in ("seconds", "megabytes")]
        print(f"{number:>10} {cells[0]:>22} {cells[1]:>22} {ratios[0]} {ratios[1]}")


if __name__ == "__main__":
    main()
