"""Save a ZeRO-3 checkpoint: DS_ACCELERATOR=cpu torchrun --nproc-per-node 2 save_zero3.py RAW OUT"""

import sys

import deepspeed
import torch

from neo_hf import NeoForConditionalGeneration

raw, out = sys.argv[1:]
deepspeed.init_distributed("gloo")
model = NeoForConditionalGeneration.from_pretrained(raw)
engine, *_ = deepspeed.initialize(
    model=model,
    model_parameters=model.parameters(),
    config={
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True}},
    },
)
engine.save_checkpoint(out)
torch.distributed.destroy_process_group()
