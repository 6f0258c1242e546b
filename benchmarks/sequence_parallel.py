"""
Training on one long row: memory per process when a group of processes shares it, relative to one process.

    python benchmarks/sequence_parallel.py [--tokens 16384] [--sizes 1 2 4]

Memory is the peak of a process in a training step above what it held before, after a step on a short row: resident
memory on a CPU, allocated memory on CUDA, where there must be as many devices as processes. The row is packed with
documents of 2,048 tokens, half of them images. All groups give the same loss. Each process has one thread.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from neo_hf import NeoConfig, NeoForConditionalGeneration
from neo_hf.training import PackedCollator
from neo_hf.training.sequence_parallel import SequenceParallel

IMAGE, IMAGE_START, IMAGE_END, DOCUMENT = 4093, 4094, 4095, 2048


def make_model(checkpointing: bool) -> NeoForConditionalGeneration:
    text_config = {
        "vocab_size": 4096,
        "eos_token_id": 4092,
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "num_pre_buffer_layers": 2,
    }
    ids = {"image_token_id": IMAGE, "image_start_token_id": IMAGE_START, "image_end_token_id": IMAGE_END}
    torch.manual_seed(0)
    model = NeoForConditionalGeneration._from_config(
        NeoConfig(text_config=text_config, vision_config={"hidden_size": 256}, **ids)
    )
    if checkpointing:
        model.gradient_checkpointing_enable()
    return model.train()


def make_row(tokens: int) -> dict:
    generator = torch.Generator().manual_seed(0)
    samples = []
    for _ in range(tokens // DOCUMENT):
        ids = torch.randint(0, 4000, (DOCUMENT,), generator=generator)
        ids[0], ids[1 : 1 + DOCUMENT // 2], ids[1 + DOCUMENT // 2] = IMAGE_START, IMAGE, IMAGE_END
        grid = torch.tensor([[2 * 32, 2 * DOCUMENT // 64]])
        pixels = torch.randn(int(grid.prod()), 768, generator=generator)
        samples.append({"input_ids": ids, "labels": ids, "pixel_values": pixels, "image_grid_hw": grid})
    return PackedCollator(0, tokens)([samples])


def measure(tokens: int, size: int, checkpointing: bool):
    """In a process of a group: one step on a short row, then one on the long row."""
    on_cuda = torch.cuda.is_available()
    dist.init_process_group("nccl" if on_cuda else "gloo")
    device = torch.device("cuda", dist.get_rank()) if on_cuda else torch.device("cpu")
    if on_cuda:
        torch.cuda.set_device(device)
    model = make_model(checkpointing).to(device)
    parallel = SequenceParallel(model, size) if size > 1 else None

    def step(batch: dict) -> float:
        batch = {name: value.to(device) for name, value in batch.items()}
        total = batch["loss_weight"].sum()
        if parallel is not None:
            batch = parallel.slice_targets(batch, IMAGE)
        loss = model(**batch, num_items_in_batch=total, skip_logits=True).loss
        loss.backward()
        return loss.item()

    def held(peak: bool) -> float:
        if on_cuda:
            return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
        if peak:
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    step(make_row(DOCUMENT))
    row = make_row(tokens)
    before, start = held(peak=False), time.perf_counter()
    loss = torch.tensor(step(row))
    seconds = time.perf_counter() - start
    dist.all_reduce(loss := loss.to(device))
    if dist.get_rank() == 0:
        print(json.dumps({"mb": (held(peak=True) - before) / 1e6, "loss": loss.item(), "seconds": seconds}))
    dist.destroy_process_group()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--measure", type=int, nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        size, checkpointing = arguments.measure
        return measure(arguments.tokens, size, bool(checkpointing))
    print(f"A row of {arguments.tokens} tokens, torch {torch.__version__}\n")
    print("| gradient checkpointing | processes | MB per process | of one process | loss | seconds |")
    print("| --- | --- | --- | --- | --- | --- |")
    for checkpointing in (False, True):
        first = None
        for size in arguments.sizes:
            command = ["torch.distributed.run", "--standalone", "--nproc-per-node", size, __file__]
            command += ["--tokens", arguments.tokens, "--measure", size, int(checkpointing)]
            run = subprocess.run(
                [sys.executable, "-m", *map(str, command)],
                capture_output=True,
                text=True,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
            if run.returncode:
                sys.exit(run.stderr)
            found = json.loads(run.stdout.strip().splitlines()[-1])
            first = first or found["mb"]
            figures = f"{found['mb']:,.0f} | {found['mb'] / first:.0%} | {found['loss']:.5f} | {found['seconds']:.1f}"
            print(f"| {'yes' if checkpointing else 'no'} | {size} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
