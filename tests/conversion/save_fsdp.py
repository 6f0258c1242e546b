"""Save a sharded model as the Trainer does under FSDP: torchrun --nproc-per-node 2 save_fsdp.py RAW OUT"""

import os
import sys

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from neo_hf import NeoForConditionalGeneration

raw, out = sys.argv[1:]
dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (dist.get_world_size(),))
model = NeoForConditionalGeneration.from_pretrained(raw)
for layer in model.model.language_model.layers:
    fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)
dcp.save({"model": get_model_state_dict(model)}, checkpoint_id=out)
dist.destroy_process_group()
os._exit(0)  # at Python's own end, threads of Gloo that still hold tensors can abort the process
