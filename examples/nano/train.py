"""Trains NEO-nano from nothing on one CPU: a text-only LLM, then NEO's three stages on the drawn world of `world.py`.

    python examples/nano/train.py --output_dir nano-run

leaves `nano-run/NEO-nano`, a Hub-format folder, `log.jsonl` with losses and accuracies, and the folder of each stage.
An interrupted run goes on after the last stage that was finished.
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
from neo_hf.tokenization import add_neo_tokens
from neo_hf.training import prepare_for_stage

TASKS = ("caption", "attribute", "relation", "count", "change", "motion", "digits")


@dataclass
class Stage:
    """Steps, and the share of each kind of sample. The learning rate falls over the last `decay` of the steps."""

    steps: int
    weights: dict[str, float]
    decay: float = 0.0


STAGES = {
    "llm": Stage(600, {"text": 1}),
    "pretrain": Stage(700, {"caption": 4, "digits": 2, "text": 2}),
    "midtrain": Stage(
        3000,
        {"caption": 2, "attribute": 1, "relation": 3, "count": 3, "change": 2, "motion": 2, "digits": 2, "text": 1},
    ),
    "sft": Stage(
        6000,
        {
            "caption": 3,
            "scene": 1,
            "attribute": 2,
            "where": 2,
            "relation": 4,
            "count": 3,
            "change": 3,
            "motion": 0.7,
            "digits": 2,
            "text": 0.5,
        },
        decay=0.9,
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
    """A byte-level vocabulary of the world's words, in Qwen's format, with ChatML's and NEO's special tokens."""
    weights = dict.fromkeys((*TASKS, "text"), 1.0)
    samples = itertools.islice(World(seed).stream(weights), 5000)
    corpus = [part.get("text", "") for s in samples for m in s["messages"] for part in m["content"]]
    alphabet = Qwen2Tokenizer(vocab={}, merges=[])
    tokenizer = alphabet.train_new_from_iterator(
        [*corpus, "user", "assistant", "system"] * 2, vocab_size=600, new_special_tokens=["<|im_start|>", "<|im_end|>"]
    )
    tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "<|endoftext|>"
    return add_neo_tokens(tokenizer)


class Encoder:
    """Chat messages to training samples, many at a time."""

    def __init__(self, processor: NeoProcessor):
        self.processor = processor
        tokens = processor.tokenizer
        self.header = tokens.encode("<|im_start|>assistant\n", add_special_tokens=False)
        self.end = tokens.convert_tokens_to_ids("<|im_end|>")

    def __call__(self, samples: list[dict]) -> list[dict]:
        texts = [self.processor.apply_chat_template(sample["messages"], tokenize=False) for sample in samples]
        images = [
            [part["image"] for message in sample["messages"] for part in message["content"] if part["type"] == "image"]
            for sample in samples
        ]
        inputs = self.processor(text=texts, images=images, padding=False)
        grids = iter(inputs.get("image_grid_hw", ()))
        pixels = inputs.get("pixel_values")
        encoded, first = [], 0
        for ids, its_images in zip(inputs["input_ids"], images, strict=True):
            own = [torch.as_tensor(next(grids)) for _ in its_images]
            count = sum(int(grid.prod()) for grid in own)
            encoded.append(
                {
                    "input_ids": torch.tensor(ids),
                    "labels": torch.tensor(self.labels(ids)),
                    "pixel_values": torch.as_tensor(pixels[first : first + count]) if its_images else None,
                    "image_grid_hw": torch.stack(own) if its_images else None,
                }
            )
            first += count
        return encoded

    def labels(self, ids: list[int]) -> list[int]:
        """The assistant's tokens, `<|im_end|>` and newline included; -100 elsewhere."""
        labels, learnt, n = [-100] * len(ids), False, len(self.header)
        for place, token in enumerate(ids):
            if ids[place - n : place] == self.header:
                learnt = True
            if learnt:
                labels[place] = token
            if place and ids[place - 1] == self.end:
                learnt = False
        return labels


def pack(samples: Iterable[dict], rows: int, length: int) -> Iterator[dict]:
    """Batches of `rows` rows of `length` tokens, each sample in the first row with room for it."""
    packed: list[list[dict]] = [[] for _ in range(rows)]
    free = [length] * rows
    for sample in samples:
        size = len(sample["input_ids"])
        if size > length:
            raise ValueError(f"A sample of {size} tokens does not fit into rows of {length}.")
        row = next((row for row in range(rows) if free[row] >= size), None)
        if row is None:
            yield collate(packed, length)
            packed, free, row = [[] for _ in range(rows)], [length] * rows, 0
        packed[row].append(sample)
        free[row] -= size


def collate(packed: list[list[dict]], length: int) -> dict:
    batch = {
        "input_ids": torch.zeros(len(packed), length, dtype=torch.long),
        "labels": torch.full((len(packed), length), -100),
        "document_ids": torch.full((len(packed), length), -1),
    }
    for row, samples in enumerate(packed):
        place = 0
        for number, sample in enumerate(samples):
            span = slice(place, place := place + len(sample["input_ids"]))
            batch["input_ids"][row, span] = sample["input_ids"]
            batch["labels"][row, span] = sample["labels"]
            batch["document_ids"][row, span] = number
    for name in ("pixel_values", "image_grid_hw"):
        parts = [sample[name] for samples in packed for sample in samples if sample[name] is not None]
        if parts:
            batch[name] = torch.cat(parts)
    return batch


def encode_stream(samples: Iterable[dict], encoder: Encoder, count: int = 32) -> Iterator[dict]:
    samples = iter(samples)
    while chunk := list(itertools.islice(samples, count)):
        yield from encoder(chunk)


def optimizers(model: torch.nn.Module, args: Arguments) -> list[torch.optim.Optimizer]:
    """Muon on the matrices of the layers, AdamW on the rest."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    matrices = {name: p for name, p in trained.items() if ".layers." in name and p.ndim == 2}
    rest = [p for name, p in trained.items() if name not in matrices]
    both: list[torch.optim.Optimizer] = [torch.optim.Muon(matrices.values(), lr=args.muon_lr, weight_decay=0.01)]
    if rest:
        both.append(torch.optim.AdamW(rest, lr=args.adamw_lr, betas=(0.9, 0.95), weight_decay=0.01))
    return both


def answered(logits: torch.Tensor, batch: dict) -> torch.Tensor:
    """
    (documents,) boolean: whether greedy decoding would give each answer exactly. It does if every token of the answer
    is the most probable one after those before it, so the logits of one forward tell.
    """
    labels = batch["labels"][:, 1:]
    wrong = (logits[:, :-1].argmax(-1) != labels) & (labels != -100)
    documents = batch["document_ids"][:, 1:]
    return torch.stack(
        [
            ~wrong[row][documents[row] == number].any()
            for row in range(len(wrong))
            for number in range(int(documents[row].max()) + 1)
        ]
    )


def logits(model: torch.nn.Module, batch: dict) -> torch.Tensor:
    return model(**{name: value for name, value in batch.items() if name != "labels"}).logits


@torch.no_grad()
def evaluate(
    forward: Callable[[dict], torch.Tensor], encoder: Encoder, world: World, count: int, tasks: Iterable[str] = TASKS
) -> dict[str, float]:
    """Share of `count` samples of each task that `forward`, a batch to its logits, answers exactly."""
    accuracy = {}
    for task in tasks:
        encoded = list(encode_stream(itertools.islice(world.stream({task: 1}), count), encoder))
        longest = max(len(sample["input_ids"]) for sample in encoded)
        batches = (collate([[sample] for sample in encoded[i : i + 50]], longest) for i in range(0, count, 50))
        results = [answered(forward(batch), batch) for batch in batches]
        accuracy[task] = round(torch.cat(results).float().mean().item(), 4)
    return accuracy


def train(name: str, model: torch.nn.Module, encoder: Encoder, args: Arguments, log) -> None:
    stage = STAGES[name]
    steps = round(stage.steps * args.scale)
    both = optimizers(model, args)

    def factor(step: int) -> float:
        warm_up = min(1.0, (step + 1) / 50)
        return warm_up * min(1.0, (steps - step) / max(1, stage.decay * steps))

    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, factor) for optimizer in both]
    world = World(args.seed + 100 * list(STAGES).index(name))
    batches = pack(encode_stream(world.stream(stage.weights), encoder), args.rows, args.row_length)
    start, mean = time.time(), 0.0
    model.train()
    for step, batch in enumerate(tqdm(itertools.islice(batches, steps), name, total=steps, mininterval=10), start=1):
        if name == "llm":
            documents = batch.pop("document_ids")
            starts = torch.nn.functional.pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=True)
            places = torch.arange(args.row_length).expand_as(documents)
            batch["position_ids"] = places - torch.where(starts, places, 0).cummax(-1).values
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
                entry |= {"accuracy": evaluate(partial(logits, model), encoder, unseen, args.eval_samples)}
                model.train()
            print(json.dumps(entry), file=log, flush=True)
            mean = 0.0


def plot(folder: Path):
    """`training.png`: loss and accuracy of the three stages, from `log.jsonl`."""
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
            train("llm", llm, Encoder(NeoProcessor(image_processor(), tokenizer)), args, log)
            tokenizer.save_pretrained(folders["llm"])
            llm.save_pretrained(folders["llm"])
        previous = args.output_dir / "init"
        if not previous.exists():
            vision = {"patch_size": 8, "hidden_size": 192, "min_pixels": 32 * 32, "max_pixels": 128 * 128}
            init_from_qwen3(folders["llm"], previous, num_pre_buffer_layers=2, vision_config=vision, seed=args.seed)
        for name in ("pretrain", "midtrain", "sft"):
            if not folders[name].exists():
                processor = NeoProcessor.from_pretrained(previous)
                model = NeoForConditionalGeneration.from_pretrained(previous)
                prepare_for_stage(model, name)
                train(name, model, Encoder(processor), args, log)
                unfinished = args.output_dir / f"{name}.unfinished"
                model.save_pretrained(unfinished)
                processor.save_pretrained(unfinished)
                unfinished.rename(folders[name])
            previous = folders[name]
    # As the released models travel: half precision, the raw layout, then a Hub repository.
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
