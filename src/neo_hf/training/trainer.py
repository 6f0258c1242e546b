"""The `Trainer` of transformers, for batches with loss weights."""

import torch
from accelerate.data_loader import IterableDatasetShard
from transformers import Trainer

from neo_hf.loss_neo import next_token_targets
from neo_hf.training.packing import PackedDataset
from neo_hf.training.streams import SampleStream


class NonFiniteLossError(RuntimeError):
    """The loss is NaN or infinite; the message names the samples of the batch."""


class NeoTrainer(Trainer):
    """
    `transformers.Trainer` with these differences:

    - The loss is divided by the sum of `loss_weight` over all batches and processes of a step, where `Trainer` divides
      by the number of tokens. Gradient accumulation and the number of processes do not change the result.
    - A `SampleStream` or `PackedDataset` is not sharded again: it gives each process its own share.
    - The model computes logits only if they are used.
    - A NaN or infinite loss raises a `NonFiniteLossError` with the `sample_names`, before the weights are updated.
    """

    def get_train_dataloader(self):
        # A stream gives each process its own share: do not let one process read for all, or shard the stream again.
        self.accelerator.dataloader_config.dispatch_batches = False
        loader = super().get_train_dataloader()
        if isinstance(loader.dataset, IterableDatasetShard) and isinstance(
            self.train_dataset, (SampleStream, PackedDataset)
        ):
            loader.dataset.num_processes, loader.dataset.process_index = 1, 0
        return loader

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor | int | None:
        if not batch_samples or not all("loss_weight" in batch for batch in batch_samples):
            return super()._get_num_items_in_batch(batch_samples, device)
        model = self.accelerator.unwrap_model(self.model)
        weight = sum(
            next_token_targets(
                batch["labels"],
                image_token_id=model._image_token_id,
                **{name: batch.get(name) for name in ("loss_weight", "attention_mask", "document_ids")},
            )[1].sum()
            for batch in batch_samples
        )
        weight = torch.as_tensor(weight, dtype=torch.float32, device=device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            weight = self.accelerator.gather(weight).sum() / self.get_tp_size()  # tensor-parallel ranks share a batch
        return weight

    @property
    def _loss_is_the_models(self) -> bool:
        return self.compute_loss_func is None and self.label_smoother is None

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        names = inputs.pop("sample_names", None)
        inputs.setdefault("skip_logits", model.training and self._loss_is_the_models)
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        if model.training and not torch.isfinite(loss):
            raise NonFiniteLossError(
                f"The loss of step {self.state.global_step + 1} is {loss.item()}. Samples of the batch: "
                f"{', '.join(names) if names else '(unnamed)'}. Saved checkpoints in {self.args.output_dir} are "
                "unaffected."
            )
        return (loss, outputs) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        return super().prediction_step(
            model,
            {**inputs, "skip_logits": prediction_loss_only and self._loss_is_the_models},
            prediction_loss_only,
            ignore_keys,
        )
