"""Save a ZeRO checkpoint: DS_ACCELERATOR=cpu torchrun --nproc-per-node 2 save_zero.py RAW OUT STAGE"""

import os
import sys

import deepspeed
import torch

from neo_hf import NeoForConditionalGeneration

raw, out, stage = sys.argv[1:]
deepspeed.init_distributed("gloo")
model = NeoForConditionalGeneration.from_pretrained(raw)
model.model.patch_embed.dense_embedding.requires_grad_(False)  # frozen weights are stored apart
parameters = [[p for p in model.parameters() if p.requires_grad and (p.ndim == 1) is flat] for flat in (True, False)]
engine, *_ = deepspeed.initialize(
    model=model,
    model_parameters=[{"params": group} for group in parameters],
    config={
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": int(stage)},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True}},
    },
)
engine.save_checkpoint(out)
torch.distributed.destroy_process_group()
os._exit(0)  # at Python's own end, threads of Gloo that still hold tensors can abort the process
