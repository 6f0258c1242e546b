"""Two processes with a sample each per step; in the seventh, one of them gets labels that the model has not learnt."""

import itertools
import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from helpers import random_model, random_prompt, tiny_config
from transformers import TrainerCallback, TrainingArguments

from neo_hf.training import NeoTrainer, PaddedCollator, SkipOnLossSpike

weights = []


class Record(TrainerCallback):
    def on_step_end(self, args, state, control, model=None, **kwargs):
        weights.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))


ids, pixels, grids = random_prompt(torch.Generator().manual_seed(0), [(1, 2)], text=6)
sample = {
    "input_ids": ids,
    "labels": ids.masked_fill(ids == 501, -100),
    "pixel_values": pixels,
    "image_grid_hw": grids,
}
data = [sample] * 16
data[12] = {**sample, "labels": sample["labels"].roll(1)}
arguments = TrainingArguments(
    sys.argv[1],
    max_steps=8,
    learning_rate=3e-2,
    per_device_train_batch_size=1,
    save_strategy="no",
    report_to="none",
    remove_unused_columns=False,
    use_cpu=True,
    ddp_backend="gloo",
)
callbacks = [SkipOnLossSpike(2, window=3), Record()]
trainer = NeoTrainer(random_model(tiny_config()), arguments, PaddedCollator(0), data, callbacks=callbacks)
trainer._get_train_sampler = lambda dataset: torch.utils.data.SequentialSampler(dataset)
trainer.train()
both = [torch.empty_like(weights[-1]) for _ in range(2)]
dist.all_gather(both, weights[-1])
assert torch.equal(*both)
changed = [not torch.equal(before, after) for before, after in itertools.pairwise(weights)]
Path(sys.argv[1], f"changed_{dist.get_rank()}.json").write_text(json.dumps(changed))
dist.destroy_process_group()
os._exit(0)  # at Python's own end, threads of Gloo that still hold tensors can abort the process
