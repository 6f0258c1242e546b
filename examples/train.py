"""
Train NEO: any stage, or a fine-tune.

    python examples/train.py examples/recipes/2b-sft.yaml --model NEO-2B --train_data chats.jsonl --output_dir out

The recipe comes first and sets defaults that the options override. Run the same command again to resume from the last
checkpoint in output_dir. For several GPUs, run it under `torchrun` or `accelerate launch`; see docs/training.md.
"""

import json
import logging
import sys
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from transformers import HfArgumentParser, TrainerCallback, TrainingArguments, set_seed

from neo_hf import NeoConfig, NeoForConditionalGeneration
from neo_hf.loading import NANO, load_model_and_processor, load_processor
from neo_hf.publishing.model_card import read_license
from neo_hf.training import (
    NeoTrainer,
    PackedCollator,
    PackedDataset,
    PaddedCollator,
    SampledAnswers,
    SampleStream,
    StopOnLossSpike,
    fill_rows,
    load_samples,
    prepare_for_stage,
)
from neo_hf.training.arguments import DataArguments
from neo_hf.training.stages import STAGES


@dataclass
class ModelArguments:
    model: str = field(metadata={"help": "Hub id; folder in Hub format, raw or from `neo-hf init`; or `nano`."})
    stage: str = field(default="sft", metadata={"help": f"What to train: {', '.join(STAGES)}."})
    random_weights: bool = field(
        default=False, metadata={"help": "Use only the configuration and processor of the model."}
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
    name = NANO if arguments.model == "nano" else arguments.model
    options = {"dtype": arguments.dtype}
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
    logging.basicConfig(level=logging.INFO if training_args.should_log else logging.WARNING)
    training_args.remove_unused_columns = False  # the collator needs them, not the model
    set_seed(training_args.seed)

    train_sources = data_args.sources(data_args.train_data, data_args.train_weights)
    eval_sources = data_args.sources(data_args.eval_data)
    model, processor = load(model_args)
    prepare_for_stage(model, model_args.stage)

    train_data = SampleStream(train_sources, processor, seed=training_args.seed, weighting=data_args.weighting)
    eval_data = eval_samples = load_samples(eval_sources, processor)
    pad, weighting = processor.tokenizer.pad_token_id, data_args.loss_weighting
    if data_args.max_length is None:
        collator = PaddedCollator(pad, weighting)
    else:
        if too_long := [sample["name"] for sample in eval_samples if len(sample["input_ids"]) > data_args.max_length]:
            raise ValueError(f"eval_data has samples of more than {data_args.max_length} tokens: {too_long}.")
        train_data = PackedDataset(train_data, data_args.max_length)
        eval_data = list(fill_rows(eval_samples, data_args.max_length))
        collator = PackedCollator(pad, data_args.max_length, weighting)

    callbacks: list[TrainerCallback] = [SampledAnswers(eval_samples[: data_args.num_answers], processor)]
    if model_args.stop_on_loss_spike is not None:
        callbacks.append(StopOnLossSpike(model_args.stop_on_loss_spike))
    trainer = NeoTrainer(
        model,
        training_args,
        data_collator=collator,
        train_dataset=train_data,
        eval_dataset=eval_data or None,
        processing_class=processor,
        callbacks=callbacks,
    )
    trainer.train(training_args.resume_from_checkpoint or last_checkpoint(training_args.output_dir))
    trainer.save_model()
    trainer.save_state()
    trainer.create_model_card(
        license=read_license(Path(model_args.model)),
        finetuned_from=model_args.model,
        dataset=data_args.train_data,
        stage=model_args.stage,
    )


if __name__ == "__main__":
    main()
