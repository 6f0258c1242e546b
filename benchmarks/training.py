"""
Training on documents of very unequal length, packed or padded: useful tokens per second.

    python benchmarks/training.py [--documents 64] [--max-length 1024] [--repeats 3]

Both train on the same text documents, with the same maximum number of tokens per batch: a padded batch has as many
documents, in random order, as fit when padded to the longest. The ideal is the speed of padding if padding tokens cost
nothing: its speed divided by its share of real tokens. Packed and padded alternate; figures are medians.
"""

import argparse
import statistics
import time

import torch

from neo_hf import NeoConfig, NeoForConditionalGeneration
from neo_hf.training import PackedCollator, PaddedCollator, fill_rows


def make_documents(count: int, max_length: int) -> list[dict]:
    """Random documents whose lengths are log-uniform from 16 to `max_length` tokens."""
    generator = torch.Generator().manual_seed(0)
    lengths = (16 * (max_length / 16) ** torch.rand(count, generator=generator)).long().tolist()
    documents = [torch.randint(0, 4000, (length,), generator=generator) for length in lengths]
    return [{"input_ids": ids, "labels": ids.clone()} for ids in documents]


def padded_rows(documents: list[dict], max_length: int) -> list[list[dict]]:
    batches: list[list[dict]] = [[]]
    for document in documents:
        batch = [*batches[-1], document]
        if len(batch) * max(len(document["input_ids"]) for document in batch) > max_length:
            batches.append([document])
        else:
            batches[-1] = batch
    return batches


def seconds(model: NeoForConditionalGeneration, batches: list[dict]) -> float:
    start = time.perf_counter()
    for batch in batches:
        model(**batch, skip_logits=True).loss.backward()
        model.zero_grad()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=64)
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    text_config = {
        "vocab_size": 4096,
        "eos_token_id": 4092,
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "num_pre_buffer_layers": 1,
    }
    torch.manual_seed(0)
    config = NeoConfig(
        text_config=text_config,
        vision_config={"hidden_size": 64},
        image_token_id=4093,
        image_start_token_id=4094,
        image_end_token_id=4095,
    )
    model = NeoForConditionalGeneration(config).to(device).train()

    documents = make_documents(arguments.documents, arguments.max_length)
    real = sum(len(document["input_ids"]) for document in documents)
    pad, pack = PaddedCollator(0), PackedCollator(0, arguments.max_length)
    batches = {
        "padded": [pad(batch) for batch in padded_rows(documents, arguments.max_length)],
        "packed": [pack([row]) for row in fill_rows(documents, arguments.max_length)],
    }
    batches = {
        kind: [{name: value.to(device) for name, value in batch.items()} for batch in kind_batches]
        for kind, kind_batches in batches.items()
    }
    share = {kind: real / sum(batch["input_ids"].numel() for batch in rows) for kind, rows in batches.items()}
    times: dict[str, list[float]] = {kind: [] for kind in batches}
    for rows in batches.values():  # warm up
        seconds(model, rows[:1])
    for _ in range(arguments.repeats):
        for kind, rows in batches.items():
            times[kind].append(seconds(model, rows))
    speed = {kind: real / statistics.median(values) for kind, values in times.items()}
    ideal = speed["padded"] / share["padded"]
    print(
        f"{len(documents)} documents, {real:,} tokens, batches of at most {arguments.max_length} tokens, on {device}"
    )
    for kind in batches:
        print(
            f"{kind}: {len(batches[kind])} batches, {share[kind]:.0%} of their tokens real, "
            f"{speed[kind]:,.0f} real tokens/s"
        )
    print(f"packed / padded: {speed['packed'] / speed['padded']:.2f} x; packed / ideal: {speed['packed'] / ideal:.2f}")


if __name__ == "__main__":
    main()
