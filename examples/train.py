"""
Train NEO: any stage, or a fine-tune.

    python examples/train.py examples/recipes/2b-sft.yaml --model NEO-2B --train_data chats.jsonl --output_dir out

The recipe comes first and sets defaults that the options override. Run the same command again to resume from the last
checkpoint in output_dir. For several GPUs, run it under `torchrun` or `accelerate launch`; see docs/training.md.
"""

import json
import logging
import math
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from transformers import BitsAndBytesConfig, HfArgumentParser, TrainerCallback, TrainingArguments, set_seed

from neo_hf import NeoConfig, NeoForConditionalGeneration
from neo_hf.loading import load_model_and_processor, load_processor, resolve_model
from neo_hf.publishing.model_card import read_license
from neo_hf.training import (
    NeoTrainer,
    PackedCollator,
    PackedDataset,
    PaddedCollator,
    SampledAnswers,
    SampleStream,
    SkipOnLossSpike,
    Source,
    StopOnLossSpike,
    fill_rows,
    load_samples,
    prepare_for_stage,
)
from neo_hf.training.arguments import DataArguments
from neo_hf.training.checks import check_rows, check_source
from neo_hf.training.sequence_parallel import check_divides
from neo_hf.training.stages import STAGES

logger = logging.getLogger(__name__)

# Of attention and MLP; those of the output head, the embeddings and the patches are not adapted.
PROJECTIONS = r".*\.layers\.\d+\.(self_attn|mlp)\.\w+_proj(_hw)?"


@dataclass
class ModelArguments:
    model: str = field(metadata={"help": "Hub id; folder in Hub format, raw or from `neo-hf init`; or `nano`."})
    stage: str = field(default="sft", metadata={"help": f"What to train: {', '.join(STAGES)}."})
    random_weights: bool = field(
        default=False, metadata={"help": "Use only the configuration and processor of the model."}
    )
    lora_rank: int | None = field(
        default=None,
        metadata={"help": "Train LoRA adapters of this rank on the layers' projections, with alpha twice the rank."},
    )
    load_in_4bit: bool = field(
        default=False, metadata={"help": "With --lora_rank: keep the weights beneath the adapters in 4 bits (QLoRA)."}
    )
    dtype: str = field(default="float32", metadata={"help": "Of the weights; see --bf16 for computing in bfloat16."})
    attn_implementation: str | None = field(
        default=None, metadata={"help": "neo, eager, sdpa or flex_attention; by default the model's own, neo."}
    )
    stop_on_loss_spike: float | None = field(
        default=None,
        metadata={
            "help": "Stop when a logged loss exceeds this many times the median of the last 20, for instance 3."
        },
    )
    skip_on_loss_spike: float | None = field(
        default=None,
        metadata={"help": "Skip the update of a step whose loss exceeds this many times the median of the last 20."},
    )
    min_pixels: int | None = field(default=None, metadata={"help": "Pixel budget per image; saved with the model."})
    max_pixels: int | None = field(default=None, metadata={"help": "Pixel budget per image; saved with the model."})


def parse_arguments(argv: list[str]):
    if argv and argv[0].endswith((".yaml", ".yml")):
        recipe = yaml.safe_load(Path(argv[0]).read_text())
        options = []
        for name, value in recipe.items():
            values = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
            options += [f"--{name}", *map(str, values)]
        argv = options + argv[1:]
    return HfArgumentParser((ModelArguments, DataArguments, TrainingArguments)).parse_args_into_dataclasses(argv)


def load(arguments: ModelArguments):
    name = resolve_model(arguments.model)
    options: dict[str, Any] = {"dtype": arguments.dtype}
    if arguments.load_in_4bit:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="bfloat16"
        )
    if arguments.attn_implementation is not None:
        options["attn_implementation"] = arguments.attn_implementation
    if arguments.random_weights:
        processor = load_processor(name)
        config = NeoConfig.from_pretrained(name)
        model = NeoForConditionalGeneration._from_config(config, **options)
    else:
        model, processor = load_model_and_processor(name, **options)
    for name in ("min_pixels", "max_pixels"):
        if (value := getattr(arguments, name)) is not None:
            setattr(processor.image_processor, name, value)
    return model, processor


def add_adapters(model, arguments: ModelArguments):
    """LoRA adapters on the projections of all layers, the only parameters that are trained."""
    if arguments.stage != "sft":
        raise ValueError(f"--lora_rank is for the stage sft, got {arguments.stage!r}.")
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    if arguments.load_in_4bit:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)  # the Trainer's option
    rank = arguments.lora_rank
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=PROJECTIONS))


def save_merged(adapter: Path, arguments: ModelArguments, folder: str):
    """Save the model with the adapters merged into its weights as they are without quantisation."""
    from peft import PeftModel

    model, processor = load(replace(arguments, load_in_4bit=False))
    PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(folder)
    processor.save_pretrained(folder)


def count_steps(sources: list[Source], processor, data_args: DataArguments, training_args: TrainingArguments) -> int:
    """
    The steps of `num_train_epochs` passes over the sources. All records are encoded once to count the rows that they
    fill. Without weights of their own, sources are drawn by their size, so that a pass has each record about once.
    """
    reports = [check_source(source, processor) for source in sources]
    for report in reports:
        if not report.lengths:
            raise ValueError(f"{report.name} has no good record: {next(iter(report.bad.values()), 'it is empty')}")
    num_rows = sum(len(report.lengths) for report in reports)
    if data_args.max_length is not None:
        num_rows = check_rows(reports, data_args.max_length).num_rows
    if not num_rows:
        raise ValueError(f"No sample of the training data fits a row of {data_args.max_length} tokens.")
    if data_args.train_weights is None:
        for source, report in zip(sources, reports, strict=True):
            source.weight = sum(report.lengths) if data_args.weighting == "tokens" else len(report.lengths)
    num_readers = training_args.world_size // data_args.sequence_parallel_size
    per_step = training_args.train_batch_size * training_args.gradient_accumulation_steps * num_readers
    num_steps = math.ceil(training_args.num_train_epochs * num_rows / per_step)
    logger.info(
        "A pass over the training data has %d rows; %g epochs are %d steps of %d rows.",
        num_rows,
        training_args.num_train_epochs,
        num_steps,
        per_step,
    )
    return num_steps


def last_checkpoint(folder: str) -> str | None:
    """The last complete checkpoint: trainer_state.json, which is written last, can be read."""
    states = Path(folder).glob("checkpoint-[0-9]*/trainer_state.json")
    for path in sorted(states, key=lambda path: int(path.parent.name.split("-")[-1]), reverse=True):
        try:
            json.loads(path.read_text())
            return str(path.parent)
        except ValueError:
            continue
    return None


def main():
    model_args, data_args, training_args = parse_arguments(sys.argv[1:])
    size = data_args.sequence_parallel_size
    check_divides(size, training_args.world_size, "the number of processes")
    check_divides(size, data_args.max_length or 0, "max_length")
    if model_args.load_in_4bit and model_args.lora_rank is None:
        raise ValueError("--load_in_4bit trains nothing without --lora_rank.")
    logging.basicConfig(level=logging.INFO if training_args.should_log else logging.WARNING)
    training_args.remove_unused_columns = False  # the collator needs them, not the model
    set_seed(training_args.seed)

    train_sources = data_args.sources(data_args.train_data, data_args.train_weights)
    eval_sources = data_args.sources(data_args.eval_data)
    model, processor = load(model_args)
    if model_args.lora_rank is None:
        prepare_for_stage(model, model_args.stage)
    else:
        model = add_adapters(model, model_args)

    if training_args.max_steps <= 0:
        training_args.max_steps = count_steps(train_sources, processor, data_args, training_args)
    train_data = SampleStream(train_sources, processor, seed=training_args.seed, weighting=data_args.weighting)
    eval_data = eval_samples = load_samples(eval_sources, processor)
    pad, weighting = processor.tokenizer.pad_token_id, data_args.loss_weighting
    if data_args.max_length is None:
        collator = PaddedCollator(pad, weighting, pad_to_multiple_of=size)
    else:
        if too_long := [sample["name"] for sample in eval_samples if len(sample["input_ids"]) > data_args.max_length]:
            raise ValueError(f"eval_data has samples of more than {data_args.max_length} tokens: {too_long}.")
        train_data = PackedDataset(train_data, data_args.max_length)
        eval_data = list(fill_rows(eval_samples, data_args.max_length))
        collator = PackedCollator(pad, data_args.max_length, weighting)

    callbacks: list[TrainerCallback] = [SampledAnswers(eval_samples[: data_args.num_answers], processor)]
    if model_args.stop_on_loss_spike is not None:
        callbacks.append(StopOnLossSpike(model_args.stop_on_loss_spike))
    if model_args.skip_on_loss_spike is not None:
        callbacks.append(SkipOnLossSpike(model_args.skip_on_loss_spike))
    trainer = NeoTrainer(
        model,
        training_args,
        data_collator=collator,
        train_dataset=train_data,
        eval_dataset=eval_data or None,
        processing_class=processor,
        callbacks=callbacks,
        sequence_parallel_size=size,
    )
    trainer.train(training_args.resume_from_checkpoint or last_checkpoint(training_args.output_dir))
    stage = model_args.stage
    if model_args.lora_rank is None:
        trainer.save_model()
    else:
        stage += f", LoRA of rank {model_args.lora_rank}" + " on 4-bit weights" * model_args.load_in_4bit
        adapter = Path(training_args.output_dir) / "adapter"
        trainer.save_model(str(adapter))
        if trainer.is_world_process_zero():
            save_merged(adapter, model_args, training_args.output_dir)
    trainer.save_state()
    trainer.create_model_card(
        license=read_license(Path(model.name_or_path)),
        finetuned_from=model_args.model,
        dataset=data_args.train_data,
        stage=stage,
    )


if __name__ == "__main__":
    main()
