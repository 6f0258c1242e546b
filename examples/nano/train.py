"""Train NEO-nano from scratch on one CPU: a text-only LLM, then NEO's three stages on the drawn world of `world.py`.

    python examples/nano/train.py --output_dir nano-run

writes `nano-run/NEO-nano`, a Hub-format folder, `log.jsonl` with losses and accuracies, and a folder per stage. An
interrupted run resumes after the last complete stage.
"""

import itertools
import json
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from matplotlib.figure import Figure
from tqdm import tqdm
from transformers import HfArgumentParser, Qwen2Tokenizer, Qwen3Config, Qwen3ForCausalLM
from world import World

from neo_hf import NeoForConditionalGeneration, NeoImageProcessor, NeoProcessor
from neo_hf.conversion import convert_hub_to_raw, convert_raw_to_hub, init_from_qwen3
from neo_hf.indexing_neo import document_starts
from neo_hf.loss_neo import IGNORE_INDEX
from neo_hf.tokenization import add_neo_tokens
from neo_hf.training import PackedCollator, encode_record, fill_rows, prepare_for_stage

TASKS = ("caption", "attribute", "relation", "count", "change", "motion", "digits")


@dataclass
class Stage:
    """
    Steps, and the weight of each kind of sample. The learning rates, `peak` times those of the run, decay over the
    last `decay` of the steps.
    """

    steps: int
    weights: dict[str, float]
    decay: float = 0.0
    peak: float = 1.0


STAGES = {
    "llm": Stage(600, {"text": 1}),
    "pretrain": Stage(700, {"caption": 4, "digits": 2, "text": 2}),
    "midtrain": Stage(
        3000,
        {"caption": 2, "attribute": 1, "relation": 3, "count": 3, "change": 2, "motion": 2, "digits": 2, "text": 1},
    ),
    "sft": Stage(
        6500,
        {
            "caption": 4.5,
            "scene": 3,
            "alike": 3,
            "attribute": 1,
            "where": 1,
            "relation": 3,
            "count": 2.5,
            "change": 4,
            "motion": 0.7,
            "digits": 5,
            "text": 0.5,
        },
        decay=0.9,
    ),
    # Each of these has more of what the stage before did worst.
    "sft-2": Stage(
        2000,
        {
            "caption": 3,
            "scene": 4,
            "alike": 3,
            "attribute": 0.5,
            "where": 0.5,
            "relation": 4,
            "count": 1,
            "change": 3,
            "motion": 0.7,
            "digits": 8,
            "text": 0.5,
        },
        decay=1.0,
        peak=0.5,
    ),
    "sft-3": Stage(
        3500,
        {
            "caption": 2,
            "scene": 2,
            "alike": 2,
            "attribute": 0.5,
            "where": 0.5,
            "relation": 8,
            "count": 1.5,
            "change": 6,
            "motion": 0.7,
            "digits": 5,
            "text": 0.3,
        },
        decay=1.0,
        peak=0.6,
    ),
    # Relations of shapes of one colour.
    "sft-4": Stage(
        1600,
        {
            "caption": 2,
            "scene": 2,
            "color": 8,
            "alike": 2,
            "attribute": 0.5,
            "relation": 3,
            "count": 1.5,
            "change": 4,
            "motion": 0.7,
            "digits": 6,
            "text": 0.3,
        },
        decay=1.0,
        peak=0.5,
    ),
}


@dataclass
class Arguments:
    output_dir: Path = field(default=Path("nano-run"), metadata={"help": "folder for the run"})
    seed: int = 0
    rows: int = field(default=8, metadata={"help": "packed rows per step"})
    row_length: int = field(default=256, metadata={"help": "tokens per packed row"})
    muon_lr: float = field(default=0.02, metadata={"help": "peak learning rate of the matrices of the layers"})
    adamw_lr: float = field(default=3e-3, metadata={"help": "peak learning rate of everything else"})
    scale: float = field(default=1.0, metadata={"help": "multiplies the steps of every stage"})
    eval_samples: int = field(default=200, metadata={"help": "unseen samples per task at each evaluation"})
    threads: int = 1


def train_tokenizer(seed: int) -> Qwen2Tokenizer:
    """A byte-level tokenizer in Qwen's format for the world's words, with ChatML's and NEO's special tokens."""
    weights = dict.fromkeys((*TASKS, "text"), 1.0)
    samples = itertools.islice(World(seed).stream(weights), 5000)
    corpus = [part.get("text", "") for s in samples for m in s["messages"] for part in m["content"]]
    alphabet = Qwen2Tokenizer(vocab={}, merges=[])
    tokenizer = alphabet.train_new_from_iterator(
        [*corpus, "user", "assistant", "system"] * 2, vocab_size=600, new_special_tokens=["<|im_start|>", "<|im_end|>"]
    )
    tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "<|endoftext|>"
    return add_neo_tokens(tokenizer)


def batches(records: Iterable[dict], processor: NeoProcessor, rows: int, length: int) -> Iterator[dict]:
    """Packed batches, in which every token counts the same."""
    samples = (encode_record(record, processor) for record in records)
    collator = PackedCollator(processor.tokenizer.pad_token_id, length, loss_weighting="token")
    packed = fill_rows(samples, length)
    while batch := list(itertools.islice(packed, rows)):
        yield collator(batch)


def optimizers(model: torch.nn.Module, args: Arguments) -> list[torch.optim.Optimizer]:
    """Muon on the matrices of the layers, AdamW on the rest."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    matrices = {name: p for name, p in trained.items() if ".layers." in name and p.ndim == 2}
    rest = [p for name, p in trained.items() if name not in matrices]
    both: list[torch.optim.Optimizer] = [torch.optim.Muon(matrices.values(), lr=args.muon_lr, weight_decay=0.01)]
    if rest:
        both.append(torch.optim.AdamW(rest, lr=args.adamw_lr, betas=(0.9, 0.95), weight_decay=0.01))
    return both


def logits(model: torch.nn.Module, batch: dict) -> torch.Tensor:
    inputs = ("input_ids", "document_ids", "pixel_values", "image_grid_hw")
    return model(**{name: batch[name] for name in inputs if name in batch}).logits


@torch.no_grad()
def evaluate(
    forward: Callable[[dict], torch.Tensor],
    processor: NeoProcessor,
    world: World,
    count: int,
    tasks: Iterable[str] = TASKS,
) -> dict[str, float]:
    """
    Share of `count` samples per task for which greedy decoding would give exactly the expected answer: each of its
    tokens is the most probable one after those before it, which the logits of a single forward show. `forward` takes a
    batch of one sample per row.
    """
    accuracy = {}
    for task in tasks:
        records = itertools.islice(world.stream({task: 1}), count)
        samples = [encode_record(record, processor) for record in records]
        longest = max(len(sample["input_ids"]) for sample in samples)
        collator = PackedCollator(processor.tokenizer.pad_token_id, longest)
        correct = 0
        for start in range(0, count, 50):
            batch = collator([[sample] for sample in samples[start : start + 50]])
            targets = batch["labels"][:, 1:]
            wrong = (forward(batch)[:, :-1].argmax(-1) != targets) & (targets != IGNORE_INDEX)
            correct += int((~wrong.any(-1)).sum())
        accuracy[task] = round(correct / count, 4)
    return accuracy


def train(name: str, model: torch.nn.Module, processor: NeoProcessor, args: Arguments, log) -> None:
    stage = STAGES[name]
    steps = round(stage.steps * args.scale)
    both = optimizers(model, args)

    def factor(step: int) -> float:
        warm_up = min(1.0, (step + 1) / 50)
        return stage.peak * warm_up * min(1.0, (steps - step) / max(1, stage.decay * steps))

    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, factor) for optimizer in both]
    world = World(args.seed + 100 * list(STAGES).index(name))
    stream = itertools.islice(batches(world.stream(stage.weights), processor, args.rows, args.row_length), steps)
    start, mean = time.time(), 0.0
    model.train()
    for step, batch in enumerate(tqdm(stream, name, total=steps, mininterval=10), start=1):
        if name == "llm":
            places = torch.arange(args.row_length).expand_as(batch["input_ids"])
            starts = torch.where(document_starts(batch["document_ids"]), places, 0).cummax(-1).values
            loss = model(batch["input_ids"], position_ids=places - starts, labels=batch["labels"]).loss
        else:
            loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(both, schedules, strict=True):
            optimizer.step()
            schedule.step()
        model.zero_grad()
        mean += loss.item() / 50
        if step % 50 == 0:
            entry = {"stage": name, "step": step, "loss": round(mean, 4), "seconds": round(time.time() - start)}
            if name != "llm" and (step % 500 == 0 or step == steps):
                model.eval()
                unseen = World(args.seed + 1, test=True)
                entry |= {"accuracy": evaluate(partial(logits, model), processor, unseen, args.eval_samples)}
                model.train()
            print(json.dumps(entry), file=log, flush=True)
            mean = 0.0


def plot(folder: Path):
    """Write `training.png`: loss and accuracy over the stages, from `log.jsonl`."""
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    starts = dict(zip(STAGES, itertools.accumulate((0, *(stage.steps for stage in STAGES.values()))), strict=False))
    figure = Figure(figsize=(9, 6), layout="constrained")
    upper, lower = figure.subplots(2, sharex=True)
    steps = [starts[entry["stage"]] + entry["step"] for entry in entries]
    upper.semilogy(steps, [entry["loss"] for entry in entries], color="black", linewidth=1)
    upper.set_ylabel("loss")
    for task in TASKS:
        points = [(step, 100 * e["accuracy"][task]) for step, e in zip(steps, entries, strict=True) if "accuracy" in e]
        lower.plot(*zip(*points, strict=True), marker=".", label=task)
    lower.set_ylabel("unseen scenes answered exactly (%)")
    lower.set_xlabel("steps")
    lower.legend()
    for name, start in starts.items():
        for ax in (upper, lower):
            ax.axvline(start, color="silver", linewidth=1)
        upper.annotate(
            name, (start, 1), xycoords=("data", "axes fraction"), xytext=(3, -12), textcoords="offset points"
        )
    figure.savefig(folder / "training.png", dpi=100)


def main():
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    folders = {name: args.output_dir / name for name in STAGES}
    with open(args.output_dir / "log.jsonl", "a") as log:
        if not (folders["llm"] / "config.json").exists():
            tokenizer = train_tokenizer(args.seed)
            config = Qwen3Config(
                vocab_size=len(tokenizer),
                hidden_size=128,
                intermediate_size=384,
                num_hidden_layers=4,
                num_attention_heads=4,
                num_key_value_heads=1,
                head_dim=32,
                max_position_embeddings=4096,
                rope_parameters={"rope_type": "default", "rope_theta": 1e6},
                tie_word_embeddings=True,
                eos_token_id=tokenizer.eos_token_id,
            )
            llm = Qwen3ForCausalLM(config)
            train("llm", llm, NeoProcessor(image_processor(), tokenizer), args, log)
            tokenizer.save_pretrained(folders["llm"])
            llm.save_pretrained(folders["llm"])
        previous = args.output_dir / "init"
        if not previous.exists():
            vision = {"patch_size": 8, "hidden_size": 192, "min_pixels": 32 * 32, "max_pixels": 128 * 128}
            init_from_qwen3(folders["llm"], previous, num_pre_buffer_layers=2, vision_config=vision, seed=args.seed)
        for name in ("pretrain", "midtrain", "sft", "sft-2", "sft-3", "sft-4"):
            if not folders[name].exists():
                processor = NeoProcessor.from_pretrained(previous)
                model = NeoForConditionalGeneration.from_pretrained(previous)
                prepare_for_stage(model, name.partition("-")[0])
                train(name, model, processor, args, log)
                unfinished = args.output_dir / f"{name}.unfinished"
                model.save_pretrained(unfinished)
                processor.save_pretrained(unfinished)
                unfinished.rename(folders[name])
            previous = folders[name]
    # The route of the released models: half precision, the raw layout, then a Hub repository.
    half, raw, final = (args.output_dir / name for name in ("half", "raw", "NEO-nano"))
    NeoForConditionalGeneration.from_pretrained(previous, dtype=torch.float16).save_pretrained(half)
    NeoProcessor.from_pretrained(previous).save_pretrained(half)
    convert_hub_to_raw(half, raw, force=True)
    convert_raw_to_hub(raw, final, verify=True, force=True)
    plot(args.output_dir)


def image_processor() -> NeoImageProcessor:
    return NeoImageProcessor(patch_size=8, min_pixels=32 * 32, max_pixels=128 * 128)


if __name__ == "__main__":
    main()
