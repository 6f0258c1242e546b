"""The paper's ablation of mask and rotary encoding (Table 3) in miniature.

    python examples/nano/ablate.py --llm nano-run/llm --output_dir ablation

For each seed, five variants of NEO-nano start from the same LLM and see the same samples in the same order; only the
mask or the indices differ. They are trained on scenes of squares in 64 x 64 pixels and tested on unseen scenes of that
size and of 96 x 96 pixels, larger than any in training. Fixed before the first run: variants, seeds, steps, tasks and
the metric, mean accuracy over the tasks at each size. All variants have the H and W heads. Theta is 1e6 for T and 1e4
for H and W unless stated otherwise. Complete runs are not repeated.
"""

import itertools
import json
import statistics
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
from matplotlib.figure import Figure
from scipy.stats import t as student
from tqdm import tqdm
from train import Arguments, batches, evaluate, optimizers
from transformers import HfArgumentParser
from world import World

from neo_hf import NeoForConditionalGeneration, NeoProcessor, allocate_position_ids
from neo_hf.conversion import init_from_qwen3
from neo_hf.indexing_neo import document_starts, image_ids

VARIANTS = {
    "native": "mixed mask, Native-RoPE",
    "causal": "causal mask, Native-RoPE",
    "1d": "mixed mask, 1-D RoPE",
    "mrope": "mixed mask, M-RoPE",
    "theta": "mixed mask, Native-RoPE, theta 1e6 for H and W",
}
WEIGHTS = {"caption": 1.0, "attribute": 1.0, "count": 1.0}
SIZES = (64, 96)  # pixels
KINDS = ("square",)  # the variants differ in how they see positions


@dataclass
class AblationArguments:
    llm: Path = field(metadata={"help": "folder of the text-only LLM that train.py leaves"})
    output_dir: Path = Path("ablation")
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    steps: int = 600
    rows: int = 4
    row_length: int = 256
    eval_samples: int = 500
    threads: int = 1


def indices(variant: str, batch: dict, config) -> tuple[torch.Tensor, torch.Tensor]:
    """The (3, B, L) indices and the (B, 1, L, L) mask, True where a query attends to a key, of a packed batch."""
    ids, documents = batch["input_ids"], batch["document_ids"]
    grids = batch.get("image_grid_hw")
    native = allocate_position_ids(
        ids,
        grids,
        image_token_id=config.image_token_id,
        image_start_token_id=config.image_start_token_id,
        document_ids=documents,
    )
    places = torch.arange(ids.shape[1]).expand_as(ids)
    first = torch.where(document_starts(documents), places, 0).cummax(-1).values
    images = image_ids(native[0], documents)

    mask = places[:, :, None] >= places[:, None, :]
    if variant != "causal":
        mask = mask | ((images[:, :, None] == images[:, None, :]) & (images[:, None, :] >= 0))
    mask = (mask & (documents[:, :, None] == documents[:, None, :]))[:, None]

    if variant == "1d":
        return (places - first).expand(3, -1, -1), mask
    if variant == "mrope":
        # The text after an image continues past its longer side; rows and columns count from the start of the image.
        longer = torch.zeros_like(ids)
        is_image = ids == config.image_token_id
        ends = is_image & ~torch.nn.functional.pad(is_image[:, 1:], (0, 1))
        if grids is not None:
            longer[ends] = grids.amax(-1) // 2 - 1
        before = longer.cumsum(-1) - longer
        start = native[0] + before - before.gather(1, first)
        return torch.stack([start, start + native[1], start + native[2]]), mask
    return native, mask


def run(variant: str, seed: int, args: AblationArguments) -> dict:
    torch.manual_seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        vision = {"patch_size": 8, "hidden_size": 192, "min_pixels": 32 * 32, "max_pixels": 128 * 128}
        init_from_qwen3(args.llm, Path(folder) / "init", num_pre_buffer_layers=2, vision_config=vision, seed=seed)
        processor = NeoProcessor.from_pretrained(Path(folder) / "init")
        model = NeoForConditionalGeneration.from_pretrained(Path(folder) / "init")
    if variant == "theta":
        for axis in ("height", "width"):
            model.config.text_config.rope_parameters[axis]["rope_theta"] = 1e6

    def forward(batch: dict, **kwargs):
        position_ids, mask = indices(variant, batch, model.config)
        inputs = {name: batch[name] for name in ("input_ids", "pixel_values", "image_grid_hw") if name in batch}
        return model(**inputs, position_ids=position_ids, attention_mask=mask, use_cache=False, **kwargs)

    both = optimizers(model, Arguments())

    def factor(step: int) -> float:
        return min(1.0, (step + 1) / 50, (args.steps - step) / (0.4 * args.steps))

    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, factor) for optimizer in both]
    records = World(seed, kinds=KINDS).stream(WEIGHTS)
    stream = itertools.islice(batches(records, processor, args.rows, args.row_length), args.steps)
    model.train()
    for batch in tqdm(stream, f"{variant} {seed}", total=args.steps, mininterval=10):
        forward(batch, labels=batch["labels"]).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(both, schedules, strict=True):
            optimizer.step()
            schedule.step()
        model.zero_grad()
    model.eval()
    accuracy = {
        size: evaluate(
            lambda batch: forward(batch).logits,
            processor,
            World(1000 + seed, test=True, sizes=((size, size),), kinds=KINDS),
            args.eval_samples,
            WEIGHTS,
        )
        for size in SIZES
    }
    return {"variant": variant, "seed": seed, "accuracy": accuracy}


def interval(values: list[float]) -> tuple[float, float]:
    """The mean and the half-width of its 95 % confidence interval (Student's t over seeds)."""
    spread = statistics.stdev(values) / len(values) ** 0.5
    return statistics.fmean(values), float(student.ppf(0.975, len(values) - 1)) * spread


def report(results: list[dict], folder: Path):
    """Write `table.md` and `ablation.png`: mean accuracy over tasks, and its paired difference from "native" (%)."""

    def mean(result: dict, size: int) -> float:
        return 100 * statistics.fmean(result["accuracy"][str(size)].values())

    scores = {(r["variant"], size): {} for r in results for size in SIZES}
    for r in results:
        for size in SIZES:
            scores[r["variant"], size][r["seed"]] = mean(r, size)
    lines = [
        "| variant | 64 x 64 | 96 x 96, unseen | difference from the first row at 96 x 96, paired by seed |",
        "| --- | --- | --- | --- |",
    ]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots(1, len(SIZES), sharey=True)
    for row, (variant, label) in enumerate(VARIANTS.items()):
        cells = []
        for ax, size in zip(axes, SIZES, strict=True):
            values = scores[variant, size]
            centre, half = interval([*values.values()])
            cells.append(f"{centre:.1f} ± {half:.1f}")
            ax.barh(row, centre, xerr=half, height=0.6, color="C0" if variant == "native" else "0.75", capsize=3)
            ax.plot(list(values.values()), [row] * len(values), "k.", markersize=4)
        native = scores["native", SIZES[-1]]
        differences = [value - native[seed] for seed, value in scores[variant, SIZES[-1]].items()]
        centre, half = interval(differences) if variant != "native" else (0.0, 0.0)
        lines.append(f"| {label} | {cells[0]} | {cells[1]} | {f'{centre:+.1f} ± {half:.1f}' if half else ''} |")
    for ax, size in zip(axes, SIZES, strict=True):
        ax.set_title(f"{size} x {size} pixels" + (", unseen" if size > SIZES[0] else ""))
        ax.set_xlabel("answered exactly (%)")
        ax.set_xlim(0, 100)
    axes[0].set_yticks(range(len(VARIANTS)), VARIANTS.values())
    axes[0].invert_yaxis()
    figure.savefig(folder / "ablation.png", dpi=120)
    (folder / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def main():
    (args,) = HfArgumentParser(AblationArguments).parse_args_into_dataclasses()
    torch.set_num_threads(args.threads)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    file = args.output_dir / "results.jsonl"
    results = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    done = {(r["variant"], r["seed"]) for r in results}
    for seed, variant in itertools.product(args.seeds, VARIANTS):
        if (variant, seed) not in done:
            result = json.loads(json.dumps(run(variant, seed, args)))
            results.append(result)
            with open(file, "a") as out:
                print(json.dumps(result), file=out)
    report(results, args.output_dir)


if __name__ == "__main__":
    main()
