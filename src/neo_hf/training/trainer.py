"""The `Trainer` of transformers, for batches with loss weights."""

import os
import re
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import Trainer
from transformers.training_args import OptimizerNames

from neo_hf.loss_neo import next_token_targets
from neo_hf.publishing.model_card import TrainingRun, count_parameters, placeholder_id, render_model_card
from neo_hf.training.callbacks import ShareOfStream
from neo_hf.training.packing import PackedDataset
from neo_hf.training.planning import flops_per_token, peak_flops
from neo_hf.training.samples import normalize_patches
from neo_hf.training.sequence_parallel import SequenceParallel
from neo_hf.training.stages import parameter_count
from neo_hf.training.streams import SampleStream, StreamLoader


class NonFiniteLossError(RuntimeError):
    """The loss is NaN or infinite; the message names the samples of the batch."""


def num_left_out(dataset) -> tuple[int, int]:
    """How many records this process skipped as bad, and left out as longer than a row."""
    stream = getattr(dataset, "samples", dataset)
    return getattr(stream, "num_skipped", 0), getattr(dataset, "num_dropped", 0)


def source_names(dataset) -> list[str]:
    """The names of the sources of a stream, or of its rows, if it has several; no names otherwise."""
    sources = getattr(getattr(dataset, "samples", dataset), "sources", ())
    return [source.name for source in sources] if len(sources) > 1 else []


def mean_by_name(names: list[str], losses: list[float], weights: list[float]) -> dict[str, float]:
    """`loss/NAME` of each name that has any weight, from sums of weighted losses and of weights."""
    sums: dict[str, tuple[float, float]] = {}
    for name, loss, weight in zip(names, losses, weights, strict=True):
        total = sums.get(name, (0.0, 0.0))
        sums[name] = (total[0] + loss, total[1] + weight)
    return {f"loss/{name}": loss / weight for name, (loss, weight) in sums.items() if weight}


def training_history(log: list[dict]) -> tuple[list[dict], dict[str, float]]:
    """From a Trainer's log, a row per evaluation (or one for the end), and the last evaluation's other metrics."""
    rows, scores, loss = [], {}, None
    for entry in log:
        loss = entry.get("loss", loss)
        if "eval_loss" in entry:
            rows.append({"step": entry["step"], "training loss": loss, "validation loss": entry["eval_loss"]})
            timing = ("eval_loss", "eval_runtime", "eval_samples_per_second", "eval_steps_per_second")
            scores = {
                name.removeprefix("eval_"): value
                for name, value in entry.items()
                if name.startswith("eval_") and name not in timing
            }
    if not rows:
        rows = [{"step": log[-1]["step"] if log else 0, "training loss": loss}]
    return [{k: f"{v:.4f}" if isinstance(v, float) else v for k, v in row.items()} for row in rows], scores


class NeoTrainer(Trainer):
    """
    `transformers.Trainer` with these differences:

    - The loss is divided by the sum of `loss_weight` over all batches and processes of a step, where `Trainer` divides
      by the number of tokens. Gradient accumulation and the number of processes do not change the result.
    - A `SampleStream`, or a `PackedDataset` of one, gives each process its own share. A checkpoint holds where it is,
      and a resumed run continues there (`StreamLoader`), where `Trainer` reads again what was seen. With
      `ignore_data_skip`, it begins the stream anew. `epoch` in the log is the share of the run that is done.
    - With bf16, `loss_weight`, its sum and the losses stay float32 under FSDP2 and DeepSpeed too, where accelerate and
      `Trainer` would round them.
    - With `torch_compile`, layers are compiled one by one, since the whole model as one graph would need a dense mask.
    - Batches are not sliced among processes (`dispatch_batches`): patches are not rows.
    - Patches that are uint8 are normalised on the device, with the settings of the processor.
    - Weight decay spares all norms. `Trainer` does not know `q_norm_h` and the like by their names.
    - The model computes logits only if they are used.
    - A tied output head is saved once, however the model is sharded. With sharded checkpoints of FSDP, `save_model`
      writes a whole model, and each checkpoint has the configuration and the processor beside its shards.
    - `create_model_card` writes NEO's card.
    - With the training loss it logs `tokens_per_second` (of all processes, without padding), `row_fill` (the share of
      the batches that is not padding), `num_skipped` and `num_overlong` (records left out since the processes started)
      and, on GPUs whose peak is known, `mfu` (model FLOPs utilisation, see `planning.flops_per_token`). Of a stream of
      several sources, it logs `loss/NAME` for each source, the weighted mean over its tokens since the last log.
    - A NaN or infinite loss raises a `NonFiniteLossError` with the `sample_names`, before the weights are updated.
    - With `sequence_parallel_size` n, groups of n processes train on the same rows, each on a slice of their tokens
      (`SequenceParallel`). Evaluation divides whole rows among all processes.

    Raises:
        ValueError: `sequence_parallel_size` does not divide the number of processes or of attention heads, or is
            combined with what it cannot be.
    """

    # Tokens and places in the batches since the last log, and per source the sums of weighted losses and of weights.
    _counted: torch.Tensor | None = None
    _source_losses: torch.Tensor
    _counting_since = 0.0
    _stream_loader: StreamLoader | None = None
    _sequence_parallel: SequenceParallel | None = None

    def __init__(self, *args, sequence_parallel_size: int = 1, **kwargs):
        super().__init__(*args, **kwargs)
        if sequence_parallel_size == 1:
            return
        conflicts = {
            "a train_dataset that is not a SampleStream or a PackedDataset of one": not self._trains_on_a_stream,
            "compute_loss_func or label smoothing": not self._loss_is_the_models,
            "model_init": self.model_init is not None,
            "average_tokens_across_devices=False": not self.args.average_tokens_across_devices,
            "torch_compile": self.args.torch_compile,
            "tensor, context or sequence parallelism of accelerate or DeepSpeed": (
                self.get_tp_size() * self.get_cp_size() * self.get_sp_size() > 1
            ),
        }
        if found := [name for name, is_found in conflicts.items() if is_found]:
            raise ValueError(
                f"sequence_parallel_size={sequence_parallel_size} cannot be combined with {' or '.join(found)}."
            )
        self._sequence_parallel = SequenceParallel(self.model, sequence_parallel_size)

    def create_accelerator_and_postprocess(self):
        if self.args.accelerator_config.dispatch_batches is None:
            # One process would read for all and slice the batches, patches as if they were rows.
            self.args.accelerator_config.dispatch_batches = False
        super().create_accelerator_and_postprocess()
        # With torch_compile. As one graph, the model would attend with a dense mask and break at reads by the host.
        self.accelerator.state.dynamo_plugin.use_regional_compilation = True
        if self.accelerator.is_fsdp2 and (policy := self.accelerator.state.fsdp_plugin.mixed_precision_policy):
            # As it is, the policy rounds what goes into and comes out of each unit: loss weights, their sum, the loss.
            # Everything else has the dtype of the gathered weights anyway.
            exact = replace(policy, cast_forward_inputs=False, output_dtype=None)
            self.accelerator.state.fsdp_plugin.mixed_precision_policy = exact

    def get_sp_size(self) -> int:
        """The number of processes that train on the same rows."""
        return super().get_sp_size() if self._sequence_parallel is None else self._sequence_parallel.size

    @property
    def _trains_on_a_stream(self) -> bool:
        dataset = self.train_dataset
        return isinstance(dataset.samples if isinstance(dataset, PackedDataset) else dataset, SampleStream)

    @property
    def _reader(self) -> tuple[int, int]:
        """Which reader of data this process is, and of how many: a sequence-parallel group is one."""
        return self.args.process_index // self.get_sp_size(), self.args.world_size // self.get_sp_size()

    @property
    def _is_first_of_reader(self) -> bool:
        return self.args.process_index % self.get_sp_size() == 0

    def get_train_dataloader(self):
        dataset = self.train_dataset
        if not self._trains_on_a_stream:
            return super().get_train_dataloader()
        # The loader itself continues where it was: nothing is to be skipped.
        self._resumes_stream = self._stream_loader is not None or not self.args.ignore_data_skip
        self.args.ignore_data_skip = True
        if self._stream_loader is None:
            self.add_callback(ShareOfStream())
        self._stream_loader = StreamLoader(
            dataset,
            self.data_collator,
            *self._reader,
            batch_size=self._train_batch_size,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            prefetch_factor=self.args.dataloader_prefetch_factor,
        )
        return self._stream_loader

    def _stream_state_file(self, checkpoint: str) -> Path:
        return Path(checkpoint) / f"stream_state_{self._reader[0]}.pt"

    def _save_rng_state(self, output_dir: str):
        super()._save_rng_state(output_dir)
        if self._stream_loader is not None and self._is_first_of_reader:
            path = self._stream_state_file(output_dir)
            torch.save(self._stream_loader.state_dict(), path.with_suffix(".tmp"))
            os.replace(path.with_suffix(".tmp"), path)

    def _load_rng_state(self, checkpoint: str | None):
        super()._load_rng_state(checkpoint)
        if checkpoint is None or self._stream_loader is None or not self._resumes_stream:
            return
        path = self._stream_state_file(checkpoint)
        if not path.is_file():
            raise FileNotFoundError(
                f"{checkpoint} has no {path.name}, which says where the data was: it was saved without, or by fewer "
                "processes. To train on from its weights with the data from the beginning, set ignore_data_skip."
            )
        self._stream_loader.load_state_dict(torch.load(path, weights_only=True))

    def _prepare_inputs(self, inputs):
        loss_weight = inputs.get("loss_weight")
        inputs = super()._prepare_inputs(inputs)
        if loss_weight is not None:  # with DeepSpeed, `Trainer` rounds floats to the dtype of the model
            inputs["loss_weight"] = loss_weight.to(self.args.device)
        patches = inputs.get("pixel_values")
        if patches is not None and patches.dtype == torch.uint8:
            image_processor = getattr(self.processing_class, "image_processor", None)
            if image_processor is None:
                raise ValueError(
                    "pixel_values are uint8, and to normalise them NeoTrainer needs processing_class=processor, got "
                    f"{self.processing_class!r:.100}."
                )
            inputs["pixel_values"] = normalize_patches(patches, image_processor)
        return inputs

    def get_batch_samples(self, *args, **kwargs):
        if self._counted is None:
            self._counted, self._counting_since = torch.zeros(2, device=self.args.device), time.perf_counter()
            self._source_losses = torch.zeros(len(source_names(self.train_dataset)), 2, device=self.args.device)
        batches, num_items = super().get_batch_samples(*args, **kwargs)
        for batch in batches:
            ids = batch["input_ids"]
            not_padding = batch.get("attention_mask", ids != self._pad_token_id)
            counts = torch.stack([not_padding.sum(), torch.tensor(ids.numel(), device=ids.device)])
            self._counted += counts.to(self.args.device)
        return batches, num_items

    @property
    def _pad_token_id(self) -> int:
        known = getattr(self.processing_class, "tokenizer", self.model.config.get_text_config())
        return -1 if known.pad_token_id is None else known.pad_token_id

    def log(self, logs, start_time=None):
        if "loss" in logs and self._counted is not None:
            seconds = time.perf_counter() - self._counting_since
            left_out = torch.tensor(num_left_out(self.train_dataset), device=self.args.device)
            counted = torch.cat([self._counted, left_out]) * self._is_first_of_reader  # a group counts once
            numbers = torch.cat([counted, self._source_losses.flatten()])
            tokens, places, num_skipped, num_overlong, *sums = self.accelerator.reduce(numbers, "sum").tolist()
            logs |= {"num_skipped": int(num_skipped), "num_overlong": int(num_overlong)}
            logs |= {"tokens_per_second": tokens / seconds, "row_fill": tokens / places}
            logs |= mean_by_name(source_names(self.train_dataset), sums[::2], sums[1::2])
            if self.args.device.type == "cuda" and (peak := peak_flops(torch.cuda.get_device_name())):
                flops = flops_per_token(self.model) * logs["tokens_per_second"]
                logs["mfu"] = flops / (peak * self.args.world_size)
            self._counted = None
        super().log(logs, start_time)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor | int | None:
        if not batch_samples or not all("loss_weight" in batch for batch in batch_samples):
            return super()._get_num_items_in_batch(batch_samples, device)
        weight = sum(self._target_weights(batch).sum() for batch in batch_samples)
        weight = torch.as_tensor(weight, dtype=torch.float32, device=device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            sharing = self.get_tp_size() * self.get_sp_size()  # processes with the same batch
            weight = self.accelerator.gather(weight).sum() / sharing
        return weight

    def _target_weights(self, batch: dict) -> torch.Tensor:
        """The weight (B, L) of predicting the token after each."""
        names = ("loss_weight", "attention_mask", "document_ids")
        options = {name: batch.get(name) for name in names}
        return next_token_targets(batch["labels"], image_token_id=self._image_token_id, **options)[1]

    def create_model_card(self, license=None, model_name=None, finetuned_from=None, dataset=(), stage=None):
        """
        Write `output_dir/README.md`: the architecture, examples, and what this run did.

        Args:
            license: identifier as the Hub spells it.
            model_name: Hub id from which the card's examples load the model.
            finetuned_from: Hub id or folder of the model that training started from; by default as it was loaded.
            dataset: Hub ids or files of the training data.
            stage: what `prepare_for_stage` was called with.
        """
        if not self.is_world_process_zero():
            return
        model, args = self.accelerator.unwrap_model(self.model), self.args
        trained = parameter_count(p for p in model.parameters() if p.requires_grad)
        recipe = {
            **({"stage": stage} if stage else {}),
            "trained parameters": f"{trained:,}, of a model of {count_parameters(model.config)['total']:,}",
            "steps": self.state.global_step,
            "rows per step": self.get_total_train_batch_size(args),
            "tokens per row": getattr(self.data_collator, "max_length", "those of the longest sample"),
            "loss weighting": getattr(self.data_collator, "loss_weighting", "token"),
            "learning rate": f"{args.learning_rate:g}, {args.lr_scheduler_type.value}, warm-up {args.warmup_steps:g}",
            "optimizer": f"{OptimizerNames(args.optim).value}, betas {args.adam_beta1:g} and {args.adam_beta2:g}",
            "weight decay": f"{args.weight_decay:g}",
            "gradient clipping": f"{args.max_grad_norm:g}",
            "precision": "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32",
            "seed": args.seed,
        }
        history, scores = training_history(self.state.log_history)
        card = render_model_card(
            model.config,
            model_name or placeholder_id(args.output_dir),
            license=license,
            training=TrainingRun(
                base_model=finetuned_from or model.name_or_path,
                data=[dataset] if isinstance(dataset, str) else list(dataset or ()),
                recipe=recipe,
                history=history,
                scores=scores,
                versions={name: version(name) for name in ("neo-hf", "transformers", "torch", "accelerate")},
            ),
        )
        card.save(Path(args.output_dir) / "README.md")

    def get_decay_parameter_names(self, model):
        names = super().get_decay_parameter_names(model)
        return [name for name in names if not re.search(r"_norm_[hw]\.", name)]

    def save_model(self, output_dir=None, _internal_call=False):
        if not self.is_fsdp_enabled or "SHARDED" not in str(self.accelerator.state.fsdp_plugin.state_dict_type):
            return super().save_model(output_dir, _internal_call)
        # `Trainer` then saves neither configuration nor processor, and no weights at the end.
        output_dir = output_dir or self.args.output_dir
        if not _internal_call:
            self._save(output_dir, self.accelerator.get_state_dict(self.model))
        elif self.args.should_save:
            self.model.config.save_pretrained(output_dir)
            if self.processing_class is not None:
                self.processing_class.save_pretrained(output_dir)

    def _save(self, output_dir=None, state_dict=None):
        # FSDP2 and ZeRO-2 gather a tied output head as a tensor of its own.
        tied = getattr(self.accelerator.unwrap_model(self.model), "all_tied_weights_keys", {})
        if state_dict is not None:
            state_dict = {name: tensor for name, tensor in state_dict.items() if name not in tied}
        super()._save(output_dir, state_dict)

    @property
    def _image_token_id(self) -> int:
        return self.accelerator.unwrap_model(self.model)._image_token_id

    @property
    def _loss_is_the_models(self) -> bool:
        return self.compute_loss_func is None and self.label_smoother is None

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        names, source_ids = inputs.pop("sample_names", None), inputs.pop("source_ids", None)
        inputs.setdefault("skip_logits", model.training and self._loss_is_the_models)
        if self._sequence_parallel is not None and model.training:
            inputs = self._sequence_parallel.slice_targets(inputs, self._image_token_id)
            source_ids = None if source_ids is None else self._sequence_parallel.slice(source_ids)
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        if model.training and not torch.isfinite(loss):
            raise NonFiniteLossError(
                f"The loss of step {self.state.global_step + 1} is {loss.item()}. Samples of the batch: "
                f"{', '.join(names) if names else '(unnamed)'}. Saved checkpoints in {self.args.output_dir} are "
                "unaffected."
            )
        token_loss = outputs.get("token_loss") if isinstance(outputs, dict) else None
        is_counting = model.training and self._counted is not None and len(self._source_losses) > 0
        if is_counting and source_ids is not None and token_loss is not None:
            weights = self._target_weights(inputs) if "labels" in inputs else inputs["loss_weight"]
            sums = torch.stack([token_loss.float() * weights, weights], dim=-1).flatten(0, 1)
            self._source_losses.index_add_(0, source_ids.flatten().clamp(min=0), sums)  # padding has no weight
        return (loss, outputs) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        return super().prediction_step(
            model,
            {**inputs, "skip_logits": prediction_loss_only and self._loss_is_the_models},
            prediction_loss_only,
            ignore_keys,
        )
